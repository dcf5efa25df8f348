"""`pkd sweep`: prepares the study, starts workers, watches them, and has the winner trained.

    configuration -> study, teacher, base -> workers: trial, trial, ... -> winner -> best.yaml, final/seed-N, tables

Every step finds what an earlier call has done. Several calls, also on other machines, may work on one folder.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from optuna.trial import TrialState

from pkd_dist import limits
from pkd_dist.comparison.shares import Share, shares, visible_devices
from pkd_dist.config.paths import project_path
from pkd_dist.config.schema import Config
from pkd_dist.data import answers, sources, tasks
from pkd_dist.errors import Preempted, UserError
from pkd_dist.files import first_free, make_folder, sha256, write_atomically
from pkd_dist.lock import waiting_lock
from pkd_dist.metric_names import DIVERGENCE, METRICS, MULTILABEL_METRICS
from pkd_dist.model import digests, encoder
from pkd_dist.model.student import INIT_METHODS
from pkd_dist.search import page
from pkd_dist.search.outcome import PAGE, Outcome, find
from pkd_dist.search.processes import Processes, last_error
from pkd_dist.search.shared import BASE_STAGES, SweepConfig, needs_own_base
from pkd_dist.search.space import Space
from pkd_dist.search.study import STATES, WORKERS, Study, shown_value
from pkd_dist.search.trial import clean
from pkd_dist.stages.context import Resolved, resolve
from pkd_dist.telemetry.endpoint import Access, load_access
from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.metrics import RunMetrics
from pkd_dist.telemetry.progress import Bar
from pkd_dist.telemetry.publish import publishing

_POLL_SECONDS = 0.5
_RESTARTS = 10
"""Workers that may die one after the other without finishing a trial, before the sweep gives up."""


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
        list(space.points())  # checks that every key has a list of values
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


def run(opened: Opened, workers: int | None, trials_only: bool = False) -> Outcome | None:
    """Run a sweep to its end.

    Args:
        workers: Processes on this machine; None: one for each GPU, without GPUs one for each core.
        trials_only: End when no trial is left, and return None: another call finds the winner.

    Raises:
        UserError, DivergedError, Preempted: See `errors.py`.
    """
    sweep, processes = opened.sweep, Processes()
    devices, cores = visible_devices(), sorted(os.sched_getaffinity(0))[: limits.cores()]
    count = workers or len(devices) or len(cores)
    access = load_access(opened.config.metrics) if opened.config.metrics.enabled else Access()
    study = opened.study()
    study.prepare(_identity(opened), opened.objective)
    opened = replace(opened, sweep=_frozen(sweep))
    sweep = opened.sweep
    for trial in study.trials:
        if trial.state.is_finished():  # a kill may have left its checkpoints
            clean(sweep, trial.number)
    metrics = RunMetrics()
    with processes.stopped_on_signal(), publishing(metrics, opened.config.metrics, access, sweep.folder, 0):
        _prepare(opened, processes)
        _train_all(opened, study, processes, shares(count, devices, cores, one_rank=True), metrics)
        if trials_only:
            return None
        with waiting_lock(sweep.folder / WORKERS / "final"):
            outcome = find(sweep, study, opened.objective, processes)
            page.write(outcome, study, sweep.folder / PAGE)
            return outcome


def _frozen(sweep: SweepConfig) -> SweepConfig:
    """Keep the configuration file in the folder, so that an edit does not change a sweep that runs."""
    path, content = sweep.folder / "sweep.yaml", project_path(sweep.file).read_bytes()
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, lambda tmp: tmp.write_bytes(content))
    return replace(sweep, file=str(path))


def _identity(opened: Opened) -> dict[str, object]:
    """Return what decides the results of a study, by dotted key: settings, and the content of the files that they name."""
    config, run = opened.config, opened.run
    task, teacher, student = config.task, config.teacher, config.student
    sections = {
        "task": {"data", "unlabeled"}, "teacher": {"model", "answers"}, "student": {"init"}, "distill": set(),
        "train": {"deepspeed", "log_every_steps"}, "cache": {"dir", "shard_rows", "mode", "max_disk_share"},
        "evaluate": {"result_dir", "latency_samples", "throughput_samples"},
        "sweep": {"trials", "budget", "final", "constraints", "students_per_step"},
    }  # fmt: skip
    content = config.model_dump(mode="json", include=set(sections), exclude=sections)
    found: dict[str, object] = {
        f"{section}.{key}": value for section, keys in content.items() for key, value in keys.items()
    }
    read = tasks.resolve(task)
    found |= {
        "data": sources.digests(task.data, sources.available(task.data, read), read),
        "task.unlabeled": [sha256(path) for path in sources.unlabeled_paths(task.unlabeled, read)],
        "teacher.answers": [sha256(path) for path in answers.paths_of(teacher.answers or ())],
        "teacher's weights": [digests.weights_digest(each.source) for each in run.teachers],
        "student.init": student.init
        if student.init in INIT_METHODS
        else digests.weights_digest(encoder.locate(student.init, "student.init")),
        "DeepSpeed JSON": run.deepspeed,
        "precision": [run.precision, run.teacher_precision],
    }
    return found | ({"run.seed": config.run.seed} if teacher.finetune else {})


def _prepare(opened: Opened, processes: Processes) -> None:
    """Train the teacher and build the base that all points share, on all cores; workers build the others."""
    sweep, config = opened.sweep, opened.config
    runs = []
    if config.teacher.finetune:
        runs.append((sweep.teacher_folder, sweep.of_teacher(), "data,teacher"))
    if not any(map(needs_own_base, opened.space.distributions)):
        folder, overrides = sweep.of_base([])
        runs.append((folder, overrides, ",".join(BASE_STAGES)))
    with waiting_lock(sweep.folder / WORKERS / "bases"):
        for folder, overrides, stages in runs:
            make_folder(folder)
            log.info("sweep: %s: %s", folder, stages.replace(",", ", "))
            arguments = ["--config", sweep.file, *sweep.given, *overrides, "--stages", stages]
            processes.run(arguments, folder / "log.txt")


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    log: Path
    share: Share


def _show(study: Study, opened: Opened, workers: int, metrics: RunMetrics) -> None:
    """Set the metrics of the study."""
    states = [trial.state for trial in study.trials]
    counts = {name: states.count(state) for state, name in STATES.items()}
    metrics.show_sweep(counts, workers, opened.objective, _best_value(study, opened.objective))


def _train_all(opened: Opened, study: Study, processes: Processes, parts: list[Share], metrics: RunMetrics) -> None:
    """Have workers train all trials; a worker that is killed is replaced, and its trial continued."""
    workers = [_start(opened, processes, share) for share in parts] if not study.done else []
    ended, died = _ended(study), 0
    _show(study, opened, len(workers), metrics)
    with Bar("sweep", len(study.trials), ended) as bar:
        while workers:
            time.sleep(_POLL_SECONDS)
            now, total = _ended(study), len(study.trials)
            if now > ended:
                bar.grow(total)
                bar.advance(now - ended, _best_so_far(study, opened.objective))
                ended, died = now, 0
            _show(study, opened, len(workers), metrics)
            for worker in [worker for worker in workers if worker.process.poll() is not None]:
                workers.remove(worker)
                status = worker.process.returncode
                if status >= 0 and status != Preempted.exit_status:
                    processes.require_success(worker.process, worker.log, status)
                    continue
                processes.forget(worker.process)
                died += 1
                if died > _RESTARTS:
                    raise UserError(
                        f"{died} workers were killed without finishing a trial; the last one: {last_error(worker.log)}"
                    )
                log.info("sweep: a worker was killed (status %d); another one continues its trial", status)
                workers.append(_start(opened, processes, worker.share))


def _start(opened: Opened, processes: Processes, share: Share) -> _Worker:
    sweep, host = opened.sweep, socket.gethostname()
    folder = first_free(sweep.folder / WORKERS / f"{host}-{os.getpid()}")
    make_folder(folder)
    variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(len(share.cores))}
    if share.devices:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(share.devices)
    arguments = ["--config", sweep.file, "--output", str(sweep.folder), "--worker", folder.name, *sweep.given]
    process = processes.start("pkd_dist.cli", ["sweep", *arguments], folder / "log.txt", variables)
    return _Worker(process, folder / "log.txt", share)


def _ended(study: Study) -> int:
    return sum(trial.state.is_finished() for trial in study.trials)


def _best_value(study: Study, objective: str) -> float | None:
    values = [trial.value for trial in study.trials if trial.state is TrialState.COMPLETE and trial.value is not None]
    return shown_value(max(values), objective) if values else None


def _best_so_far(study: Study, objective: str) -> str:
    best = _best_value(study, objective)
    return "" if best is None else f"best {objective} {best:.4f}"
