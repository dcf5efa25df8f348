"""`pkd sweep`: prepares the study, starts workers, watches them, and has the winner trained.

    configuration -> study, teacher, base -> workers: trial, trial, ... -> winner -> best.yaml, final/seed-N, tables

Every step finds what an earlier call has done. Several calls, also on other machines, may work on one folder.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from optuna.trial import TrialState

from pkd_dist import limits
from pkd_dist.config.schema import Config
from pkd_dist.data import tasks
from pkd_dist.errors import UserError
from pkd_dist.lock import waiting_lock
from pkd_dist.metric_names import DIVERGENCE, METRICS, MULTILABEL_METRICS
from pkd_dist.search.crew import Crew, frozen, identity
from pkd_dist.search.forks import Forks
from pkd_dist.search.outcome import PAGE, Outcome, find
from pkd_dist.search.processes import Processes
from pkd_dist.search.shared import SweepConfig, needs_own_base
from pkd_dist.search.shares import shares, visible_devices
from pkd_dist.search.space import Space
from pkd_dist.search.study import STATES, TOGETHER, WORKERS, Study, shown_value
from pkd_dist.search.trial import clean
from pkd_dist.stages.context import Resolved, resolve
from pkd_dist.telemetry.endpoint import Access, load_access
from pkd_dist.telemetry.metrics import RunMetrics
from pkd_dist.telemetry.publish import publishing


@dataclass(frozen=True)
class Opened:
    """A sweep whose configuration is checked.

    Attributes:
        objective: A key of the figures on dev.
        reported: The one that the pruner compares: the divergence, unless a point may have no teacher.
    """

    sweep: SweepConfig
    config: Config
    run: Resolved
    space: Space
    objective: str
    reported: str

    @property
    def one_base(self) -> bool:
        """Whether all points have the base of the configuration itself."""
        return not any(needs_own_base(key, self.config) for key in self.space.distributions)

    def study(self) -> Study:
        return Study(self.sweep.folder, self.config.sweep, self.space)


def open_sweep(config_file: str, overrides: list[str], output: Path) -> Opened:
    """Check the configuration of a sweep; writes nothing.

    Raises:
        UserError: It cannot be used.
    """
    sweep = SweepConfig(config_file, tuple(overrides), output)
    config = sweep.load()
    run = resolve(config, config_file, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    space = Space.of(sweep, run.source_config)
    if config.teacher.finetune and config.student.init == "first_k":
        raise UserError(
            "first_k copies the model before fine-tuning, but all points share one fine-tuned teacher; give that model's folder "
            "as student.init, with student.num_layers", "student.init",
        )  # fmt: skip
    objective = config.sweep.objective or run.task.main_metric
    known = _metrics(run.task)
    if objective not in known or (objective == DIVERGENCE and not run.needs_teacher):
        raise UserError(f"{objective!r} is not scored on dev; allowed: {', '.join(known)}", "sweep.objective")
    if config.sweep.sampler == "grid":
        next(space.points())  # checks that every key has a list of values, and how many points there are
    alpha = space.distributions.get("distill.alpha")
    without_teacher = alpha is not None and (0 in getattr(alpha, "choices", ()) or getattr(alpha, "low", 1) == 0)
    reported = DIVERGENCE if run.needs_teacher and not without_teacher else objective
    return Opened(sweep, config, run, space, objective, reported)


def _metrics(task: tasks.Task) -> list[str]:
    """Return the names of what is scored on dev."""
    correlations = ("pearson", "spearman", "pearson_spearman")
    if not task.has_labels:
        own: Sequence[str] = ("agreement",)
    elif task.multilabel:
        own = MULTILABEL_METRICS
    elif task.multiple_choice:
        own = ("accuracy",)
    elif task.regression:
        own = correlations
    else:
        own = [name for name in METRICS if name not in (*correlations, *MULTILABEL_METRICS, "agreement")]
    return [*own, DIVERGENCE]


def run(opened: Opened, workers: int | None, trials_only: bool = False, forks: Forks | None = None) -> Outcome | None:
    """Run a sweep to its end.

    Args:
        workers: Processes on this machine; None: one for each GPU, without GPUs one for each core.
        trials_only: End when no trial is left, and return None: another call finds the winner.
        forks: See `Processes`.

    Raises:
        UserError, DivergedError, Preempted: See `errors.py`.
    """
    from pkd_dist.search import page  # brings plotly, which the workers do not need

    processes = Processes("sweep", forks)
    devices, cores = visible_devices(), sorted(os.sched_getaffinity(0))[: limits.cores()]
    count = workers or len(devices) or len(cores)
    access = load_access(opened.config.metrics) if opened.config.metrics.enabled else Access()
    study = opened.study()
    study.prepare(identity(opened.config, opened.run), opened.objective)
    sweep = frozen(opened.sweep, "sweep.yaml")
    for trial in study.trials:
        if trial.state.is_finished():  # a kill may have left its checkpoints
            clean(sweep, trial.number)
    metrics = RunMetrics()
    with processes.stopped_on_signal(), publishing(metrics, opened.config.metrics, access, sweep.folder, 0):
        crew, parts = Crew(sweep, study, processes), shares(count, devices, cores, one_rank=True)
        if opened.config.teacher.finetune:
            crew.fine_tune()
        if opened.one_base and opened.run.cached and not study.done:  # else workers make what they need
            crew.make_caches([[]], parts)
        crew.train_all(parts, lambda working: _show(study, opened.objective, working, metrics))
        if trials_only:
            return None
        with waiting_lock(sweep.folder / WORKERS / "final"):
            outcome = find(sweep, study, opened.objective, processes)
            page.write(outcome, study, sweep.folder / PAGE)
            return outcome


def _show(study: Study, objective: str, workers: int, metrics: RunMetrics) -> str:
    """Set the metrics of the study, and return the best value so far as text."""
    trials = study.trials
    states = [STATES[trial.state] for trial in trials]
    values = [trial.value for trial in trials if trial.state is TrialState.COMPLETE and trial.value is not None]
    best = shown_value(max(values), objective) if values else None
    running = (trial.user_attrs for trial in trials if trial.state is TrialState.RUNNING)
    together = [int(attributes[TOGETHER]) for attributes in running if TOGETHER in attributes]
    numbers = {name: states.count(name) for name in STATES.values()}
    metrics.show_sweep(numbers, workers, statistics.fmean(together or [0]), objective, best)
    return "" if best is None else f"best {objective} {best:.4f}"
