"""Has the trials of a study trained: keeps its configuration, trains the teacher, starts workers and watches them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pkd_dist.config.paths import project_path
from pkd_dist.config.schema import Config
from pkd_dist.data import answers, sources, tasks
from pkd_dist.errors import Preempted, UserError
from pkd_dist.files import first_free, make_folder, sha256, write_atomically
from pkd_dist.lock import waiting_lock
from pkd_dist.model import digests, encoder
from pkd_dist.model.student import INIT_METHODS
from pkd_dist.search.processes import Process, Processes, last_error
from pkd_dist.search.shared import BASE_STAGES, SweepConfig, make_own_folder
from pkd_dist.search.shares import Share
from pkd_dist.search.study import WORKERS, Study
from pkd_dist.stages.base import Markers
from pkd_dist.stages.context import Resolved
from pkd_dist.stages.translation import translate
from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.progress import Bar

_POLL_SECONDS = 0.5
_RESTARTS = 10
"""How many times in a row workers may be killed without finishing a trial, before the command gives up."""


def frozen(sweep: SweepConfig, name: str) -> SweepConfig:
    """Keep the configuration file in the folder, so that an edit does not change a study that runs."""
    path, content = sweep.folder / name, project_path(sweep.file).read_bytes()
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, lambda tmp: tmp.write_bytes(content))
    return replace(sweep, file=str(path))


def identity(config: Config, run: Resolved) -> dict[str, object]:
    """Return what decides the results of a study, by dotted key: settings, and the content of the files that they name."""
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
    }
    return found | ({"run.seed": config.run.seed} if teacher.finetune else {})


@dataclass
class _Worker:
    process: Process
    log: Path
    share: Share | None


@dataclass(frozen=True)
class Crew:
    """The workers of a study on this machine.

    Attributes:
        sweep: The configuration, as the workers read it.
        arguments: Of each worker, beside the configuration; see `cli.worker`.
    """

    sweep: SweepConfig
    study: Study
    processes: Processes
    arguments: Sequence[str] = ()

    def fine_tune(self, launcher: Sequence[str] = ()) -> None:
        """Fine-tune the teacher, under a launcher if one is given."""
        self.run_shared(self.sweep.teacher_folder, self.sweep.of_teacher(), ("data", "teacher"), launcher)

    def run_shared(
        self, folder: Path, overrides: Sequence[str], stages: Sequence[str], launcher: Sequence[str] = ()
    ) -> None:
        """Run stages of what all points share, on all cores; see `Processes.run`."""
        with waiting_lock(self.sweep.folder / WORKERS / "bases"):
            make_own_folder(folder)
            log.info("%s: %s: %s", self.processes.command, folder, ", ".join(stages))
            arguments = ["--config", self.sweep.file, *self.sweep.given, *overrides, "--stages", ",".join(stages)]
            self.processes.run(arguments, folder / "log.txt", launcher)

    def make_caches(self, points: Iterable[Sequence[str]], shares: Sequence[Share | None]) -> None:
        """Make the missing caches of points before several workers start on a CPU.

        One of them would make a cache with its share of the cores, while the others wait. A single worker has all cores, and on
        GPUs a worker makes a cache as fast as a process of its own.

        Args:
            shares: Of the workers.
        """
        if len(shares) == 1 or any(share and share.devices for share in shares):
            return
        for folder, overrides in dict(map(self.sweep.of_base, points)).items():
            if not Markers(folder, translate).done("cache"):
                self.run_shared(folder, overrides, BASE_STAGES)

    def train_all(self, shares: Sequence[Share | None], watch: Callable[[int], str]) -> None:
        """Have workers train all trials; a worker that is killed is replaced, and its trial continued.

        Args:
            shares: What each worker may use; None: everything.
            watch: Called with the number of workers, again and again; returns what the progress bar says.

        Raises:
            UserError, DivergedError, Preempted: As a worker ended.
        """
        study = self.study
        workers = [self._start(share) for share in shares] if not study.done else []
        if workers:
            self._announce(len(workers))
        ended, died = study.ended, 0
        watch(len(workers))
        with Bar(self.processes.command, len(study.trials), ended) as bar:
            while workers:
                time.sleep(_POLL_SECONDS)
                now, total, note = study.ended, len(study.trials), watch(len(workers))
                if now > ended:
                    bar.grow(total)
                    bar.advance(now - ended, note)
                    ended, died = now, 0
                statuses = [(worker, worker.process.poll()) for worker in workers]
                killed = [
                    each for each, status in statuses if status is not None and not self._ended_well(each, status)
                ]
                died += bool(killed)  # if what they are forked from is killed, all of them end at once
                if died > _RESTARTS:
                    raise UserError(
                        f"workers were killed {died} times without finishing a run; the last one: {last_error(killed[-1].log)}"
                    )
                workers = [worker for worker, status in statuses if status is None]
                workers += [self._start(worker.share) for worker in killed]
        watch(0)

    def _announce(self, workers: int) -> None:
        command, folder, ignored = self.processes.command, self.sweep.folder, self.sweep.load().cache.dir
        log.info("%s: %d worker(s), with logs in %s", command, workers, folder / WORKERS)
        if ignored:
            log.info("%s: cache.dir (%s) is ignored; caches are in %s", command, ignored, folder / "bases")

    def _ended_well(self, worker: _Worker, status: int) -> bool:
        """Return whether a worker found nothing left to train; False: it was killed. Raises its error."""
        if status >= 0 and status != Preempted.exit_status:
            self.processes.require_success(worker.process, worker.log, status)
            return True
        self.processes.forget(worker.process)
        log.info("%s: a worker was killed (status %d); another one continues its trial", self.processes.command, status)
        return False

    def _start(self, share: Share | None) -> _Worker:
        sweep, host = self.sweep, socket.gethostname()
        folder = first_free(sweep.folder / WORKERS / f"{host}-{os.getpid()}")
        make_folder(folder)
        variables = {}
        if share:
            variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(len(share.cores))
            if share.devices:
                variables["CUDA_VISIBLE_DEVICES"] = ",".join(share.devices)
        where = ["--config", sweep.file, "--output", str(sweep.folder), "--worker", folder.name]
        arguments = [self.study.kind, *where, *self.arguments, *sweep.given]
        cores = share.cores if share and share.pinned else ()
        process = self.processes.start("pkd_dist.cli.worker", arguments, folder / "log.txt", variables, cores)
        return _Worker(process, folder / "log.txt", share)
