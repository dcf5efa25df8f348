"""`pkd compare`: several methods over several seeds, a study of runs that are neither searched nor pruned.

    OUTPUT/teacher/, bases/, study.journal, workers/   see `search`
    OUTPUT/METHOD/seed-N/          a run, up to its evaluation
    OUTPUT/compare.yaml            the configuration, as the workers read it
    OUTPUT/compare.json, .md, .png the table

Rerunning the same command completes a comparison. A call with other methods or seeds adds to its table.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from pkd_dist import limits
from pkd_dist.comparison.methods import Overrides, as_arguments
from pkd_dist.comparison.runs import RESULTS, SETTINGS, open_study
from pkd_dist.comparison.table import Summary, as_markdown, one_line, plot, summarize
from pkd_dist.config.schema import Config
from pkd_dist.data import sources, text
from pkd_dist.errors import DivergedError, UserError
from pkd_dist.evaluation.results import Results
from pkd_dist.files import digest_of, first_free, make_folder, move, write_atomically, write_json
from pkd_dist.lock import Lock
from pkd_dist.search.crew import Crew, frozen, identity, run_shared
from pkd_dist.search.processes import Processes
from pkd_dist.search.shared import SweepConfig
from pkd_dist.search.shares import Share, require_divisible, shares, train_command, visible_devices
from pkd_dist.search.study import JOURNAL, SEED, WORKERS, Named, Study
from pkd_dist.stages.context import Resolved, resolve
from pkd_dist.telemetry.log import log

TABLE = "compare.json"
RUN_OVERRIDES = ("metrics.enabled=false", "evaluate.latency_samples=10", "evaluate.throughput_samples=64")
"""Of every run. Speed measured next to other runs means little, so it is measured briefly."""


@dataclass(frozen=True)
class Comparison:
    """A comparison whose configuration is checked.

    Attributes:
        methods: Their facts are `overrides` and `layers`, the number of the student's.
        launcher: See `search.shares.train_command`; empty: workers train in their own process.
        shares: What each worker may use; None: everything.
    """

    sweep: SweepConfig
    config: Config
    run: Resolved
    methods: tuple[Named, ...]
    seeds: tuple[int, ...]
    launcher: str
    shares: tuple[Share | None, ...]

    def run_all(self) -> Summary:
        """Train the runs that are not finished, write the table after each, and return it.

        Raises:
            UserError: A run failed; the other active runs were stopped and resume when the command is rerun. Or the folder has a
                comparison of something else.
            DivergedError: Runs diverged; all others are finished.
            Preempted: A signal stopped it.
        """
        output, processes = self.sweep.folder, Processes("compare")
        try:
            make_folder(output / WORKERS / "compare")
        except OSError as error:
            raise UserError(f"{output} cannot be a folder ({error.strerror}); choose another", "--output") from None
        held = Lock(output / WORKERS / "compare").acquire()
        try:
            _keep_earlier_table(output)
            same = identity(self.config.model_copy(update={"sweep": SETTINGS}), self.run)
            study = open_study(output)
            study.prepare(same, self.run.task.main_metric)
            study.request(self.methods, self.seeds)
            sweep, table = frozen(self.sweep, "compare.yaml"), _Table(self.config, study, digest_of(same))
            launcher = train_command(self.launcher) if self.launcher else []
            with processes.stopped_on_signal():
                if self.config.teacher.finetune:
                    run_shared(
                        sweep, processes, sweep.teacher_folder, sweep.of_teacher(), ("data", "teacher"), launcher
                    )
                Crew(sweep, study, processes, self._of_workers()).train_all(self.shares, table.update)
        finally:
            held.release()
        return self._ended(table)

    def _of_workers(self) -> list[str]:
        own_port = ["--own-port"] if len(self.shares) > 1 else []
        return ["--launcher", self.launcher, *own_port] if self.launcher else []

    def _ended(self, table: _Table) -> Summary:
        found = table.results
        diverged = [
            f"{method.name}, seed {seed}" for method in self.methods for seed in self.seeds if seed not in found.get(method.name, {})
        ]  # fmt: skip
        if diverged:
            raise DivergedError(
                f"compare: {'; '.join(diverged)} diverged; the table in {self.sweep.folder} has the other runs"
            )
        return table.write()


def open_comparison(
    config_file: str,
    overrides: Sequence[str],
    methods: Mapping[str, Overrides],
    seeds: Sequence[int],
    output: Path,
    launcher: str = "",
    jobs: int = 1,
) -> Comparison:
    """Check a comparison; writes nothing.

    Args:
        config_file, overrides: The configuration that all runs share.
        methods: Name -> overrides.
        output: Folder of everything.
        launcher: Of each run; see `search.shares.train_command`. Empty: workers train runs in their own process.
        jobs: Runs at a time; they share the cores and the GPUs.

    Raises:
        UserError: The configuration of a method is invalid.
    """
    devices = visible_devices() if jobs > 1 else []
    if launcher and jobs > 1:
        require_divisible(launcher, devices)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{', '.join(map(str, seeds))}: a seed is duplicated; give each once", "--seeds")
    if launcher and not shutil.which(program := train_command(launcher)[0]):
        raise UserError(f"{program!r} is not a program on PATH; give one such as deepspeed", "--launcher")
    sweep = SweepConfig(config_file, (*overrides, *RUN_OVERRIDES), output)
    config, device = sweep.load(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = resolve(config, config_file, device)
    if sources.is_file(config.task.data):
        text.read_all(config.task.data, run.task)
    cores = sorted(os.sched_getaffinity(0))[: limits.cores()]
    return Comparison(
        sweep, config, run, tuple(_checked(sweep, run, name, method) for name, method in methods.items()), tuple(seeds), launcher,
        tuple(shares(jobs, devices, cores, one_rank=not launcher)) if jobs > 1 else (None,),
    )  # fmt: skip


def _checked(sweep: SweepConfig, run: Resolved, name: str, method: Overrides) -> Named:
    """Return a method as a point, if it can be trained."""
    made = _complete(run, method)
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        depth = resolve(sweep.load(as_arguments(made)), sweep.file, device).student_layers
    except UserError as error:
        raise UserError(f"method {name}: {error}") from None
    facts = {"overrides": json.loads(json.dumps(made)), "layers": depth}
    return Named(name, tuple(as_arguments(made)), facts)


def _complete(run: Resolved, method: Overrides) -> Overrides:
    """Add what a method's starting weights need.

    The number of layers defaults to that of the configuration's student. `first_k` needs the model before fine-tuning, since the
    teacher of the runs is a fine-tuned one.
    """
    student, teacher, made = run.config.student, run.config.teacher, dict(method)
    init = str(method.get("student.init", student.init))
    if init != student.init and student.layers is not None:
        made.setdefault("student.layers", None)
    if init in ("random", "first_k") and not made.get("student.num_layers"):
        made["student.num_layers"] = run.student_layers
    if init == "first_k" and teacher.finetune:
        made["student.init"] = teacher.models[0]
    return made


def _keep_earlier_table(output: Path) -> None:
    """Set aside a table of which no study knows: an earlier version wrote it."""
    path = output / TABLE
    if path.exists() and not (output / JOURNAL).exists():
        kept = first_free(path)
        move(path, kept)
        log.info("compare: the table of an earlier version is kept as %s; runs that are done are not run again", kept)


class _Table:
    """The results in a study, and the files that show them."""

    def __init__(self, config: Config, study: Study, identity: str):
        self._config, self._study, self._identity = config, study, identity
        self._known: set[int] | None = None
        self.results: dict[str, dict[int, Results]] = {}

    def update(self, workers: int = 0) -> str:
        """Log the runs that have finished since the last call, and show them in the files; returns no note."""
        trials = {trial.number: trial for trial in self._study.completed}
        for number, trial in trials.items():
            method, seed, found = Named.of(trial).name, trial.user_attrs[SEED], trial.user_attrs[RESULTS]
            self.results.setdefault(method, {})[seed] = found
            if self._known is not None and number not in self._known:
                log.info("compare: %s, seed %d: %s", method, seed, one_line(found))
        if trials and trials.keys() != self._known:
            self.write()  # long comparisons show intermediate results
        self._known = set(trials)
        return ""

    def write(self) -> Summary:
        """Write compare.json, .md and .png."""
        folder, facts = self._study.folder, {point.name: point.facts for point in map(Named.of, self._study.completed)}
        depths = {name: cast(int, found["layers"]) for name, found in facts.items()}
        summary = summarize(self._config, self.results, depths)
        summary["of"] = self._identity
        for name, method in summary["methods"].items():
            method["overrides"] = cast(Overrides, facts[name]["overrides"])
        write_json(folder / TABLE, summary)
        table = as_markdown(summary)
        write_atomically(folder / "compare.md", lambda tmp: tmp.write_text(table, encoding="utf-8"))
        write_atomically(folder / "compare.png", lambda tmp: plot(summary).savefig(tmp, format="png", dpi=150))
        return summary
