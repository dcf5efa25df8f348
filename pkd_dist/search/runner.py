"""`pkd sweep`: prepares the study, starts workers, watches them, and has the winner trained.

    configuration -> study, teacher, base -> workers: trial, trial, ... -> winner -> best.yaml, final/seed-N, tables

Every step finds what an earlier call has done. Several calls, also on other machines, may work on one folder.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from pkd_dist.comparison.shares import Share, shares, visible_devices
from pkd_dist.config.schema import Config
from pkd_dist.data import sources, tasks
from pkd_dist.errors import Preempted, UserError
from pkd_dist.files import first_free, make_folder
from pkd_dist.lock import Lock
from pkd_dist.metric_names import DIVERGENCE, METRICS, MULTILABEL_METRICS
from pkd_dist.model import digests, encoder
from pkd_dist.search import page
from pkd_dist.search.outcome import PAGE, Outcome, find
from pkd_dist.search.processes import Processes, last_error
from pkd_dist.search.shared import BASE_STAGES, SweepConfig, needs_own_base
from pkd_dist.search.space import Space
from pkd_dist.search.study import ENDED, STATES, WORKERS, Study, shown_value
from pkd_dist.stages.context import resolve
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
    """

    sweep: SweepConfig
    config: Config
    space: Space
    objective: str

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
    space = Space.of(config_file, [*overrides, f"run.dir={output}"], run.source_config)
    objective = config.sweep.objective or run.task.main_metric
    known = _metrics(run.task)
    if objective not in known or (objective == DIVERGENCE and not run.needs_teacher):
        raise UserError(f"{objective!r} is not scored on dev; allowed: {', '.join(known)}", "sweep.objective")
    if config.sweep.sampler == "grid":
        list(space.points())  # checks that every key has a list of values
    return Opened(sweep, config, space, objective)


def _metrics(task: tasks.Task) -> list[str]:
    """Return the names of what is scored on dev."""
    if not task.has_labels:
        return ["agreement", DIVERGENCE]
    if task.multilabel:
        return [*MULTILABEL_METRICS, DIVERGENCE]
    correlations = ["pearson", "spearman", "pearson_spearman"]
    single = [name for name in METRICS if name not in (*correlations, *MULTILABEL_METRICS, "agreement")]
    return [*(correlations if task.regression else single), DIVERGENCE]


def run(opened: Opened, workers: int | None, trials_only: bool = False) -> Outcome | None:
    """Run a sweep to its end.

    Args:
        workers: Processes on this machine; None: one for each GPU, without GPUs one for each core.
        trials_only: End when no trial is left, and return None: another call finds the winner.

    Raises:
        UserError, DivergedError, Preempted: See `errors.py`.
    """
    sweep, processes = opened.sweep, Processes()
    devices, cores = visible_devices(), sorted(os.sched_getaffinity(0))
    count = workers or len(devices) or len(cores)
    access = load_access(opened.config.metrics) if opened.config.metrics.enabled else Access()
    study = opened.study()
    study.prepare(_identity(opened), opened.objective)
    metrics = RunMetrics()
    with processes.stopped_on_signal(), publishing(metrics, opened.config.metrics, access, sweep.folder, 0):
        _prepare(opened, processes)
        _train_all(opened, study, processes, shares(count, devices, cores, one_rank=True), metrics)
        if trials_only:
            return None
        with _locked(sweep.folder / WORKERS / "final"):
            outcome = find(sweep, study, opened.objective, processes)
            page.write(outcome, study, sweep.folder / PAGE)
            return outcome


def _identity(opened: Opened) -> dict[str, object]:
    """Return what decides the results of a study, by dotted key."""
    config = opened.config
    searched = {"trials", "budget", "final", "constraints"}
    sections = {"task", "teacher", "student", "distill", "train", "cache", "evaluate"}
    content = config.model_dump(mode="json", include=sections)
    content["sweep"] = config.sweep.model_dump(mode="json", exclude=searched)
    found: dict[str, object] = {
        f"{section}.{key}": value for section, keys in content.items() for key, value in keys.items()
    }
    task = tasks.resolve(config.task)
    found["data"] = sources.digests(config.task.data, sources.available(config.task.data, task), task)
    if not config.teacher.answers:
        found["teacher's weights"] = [digests.weights_digest(encoder.locate(model)) for model in config.teacher.models]
    return found


def _prepare(opened: Opened, processes: Processes) -> None:
    """Train the teacher and build the base that all points share, on all cores; workers build the others."""
    sweep, config = opened.sweep, opened.config
    runs = []
    if config.teacher.finetune:
        runs.append((sweep.teacher_folder, sweep.of_teacher(), "data,teacher"))
    if not any(map(needs_own_base, opened.space.distributions)):
        folder, overrides = sweep.of_base([])
        runs.append((folder, overrides, ",".join(BASE_STAGES)))
    with _locked(sweep.folder / WORKERS / "bases"):
        for folder, overrides, stages in runs:
            make_folder(folder)
            log.info("sweep: %s: %s", folder, stages.replace(",", ", "))
            arguments = ["--config", sweep.file, *sweep.given, *overrides, "--stages", stages]
            processes.run(arguments, folder / "log.txt")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    make_folder(folder)
    held = Lock(folder).acquire(wait=True)
    try:
        yield
    finally:
        held.release()


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
    return sum(trial.state in ENDED for trial in study.trials)


def _best_value(study: Study, objective: str) -> float | None:
    values = [trial.value for trial in study.trials if trial.value is not None]
    return shown_value(max(values), objective) if values else None


def _best_so_far(study: Study, objective: str) -> str:
    best = _best_value(study, objective)
    return "" if best is None else f"best {objective} {best:.4f}"
