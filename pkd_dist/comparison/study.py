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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pkd_dist import limits
from pkd_dist.comparison.methods import Overrides, as_arguments
from pkd_dist.comparison.runs import RESULTS, SETTINGS, open_study
from pkd_dist.comparison.table import Summary, as_markdown, one_line, plot, summarize
from pkd_dist.config.schema import Config
from pkd_dist.data import sources, text
from pkd_dist.errors import DivergedError, UserError
from pkd_dist.evaluation.results import Results
from pkd_dist.files import digest_of, first_free, move, write_atomically, write_json
from pkd_dist.lock import Lock
from pkd_dist.search.crew import Crew, frozen, identity
from pkd_dist.search.forks import Forks
from pkd_dist.search.processes import Processes
from pkd_dist.search.shared import SweepConfig, make_own_folder
from pkd_dist.search.shares import Share, require_divisible, shares, train_command, visible_devices
from pkd_dist.search.study import JOURNAL, NAMED, SEED, WORKERS, Named, Study
from pkd_dist.stages.context import Resolved, resolve
from pkd_dist.telemetry.log import log

TABLE = "compare.json"
RUN_OVERRIDES = ("metrics.enabled=false", "evaluate.latency_samples=10", "evaluate.throughput_samples=64")
"""Of every run. Speed measured next to other runs means little, so it is measured briefly."""


@dataclass(frozen=True)
class Comparison:
    """A comparison whose configuration is checked.

    Attributes:
        run: What its runs have in common.
        methods: Their facts are `overrides` and `layers`, the number of the student's.
        launcher: See `search.shares.train_command`; empty: workers train in their own process.
        jobs: Runs at a time; they share the cores and the GPUs.
    """

    sweep: SweepConfig
    run: Resolved
    methods: list[Named]
    seeds: Sequence[int]
    launcher: str
    jobs: int

    def run_all(self, forks: Forks | None = None) -> Summary:
        """Train the runs that are not finished, write the table after each, and return it.

        Args:
            forks: See `Processes`.

        Raises:
            UserError: A run failed; the other active runs were stopped and resume when the command is rerun. Or the folder has a
                comparison of something else, or another call works on it.
            DivergedError: Runs diverged; all others are finished.
            Preempted: A signal stopped it.
        """
        output, wanted = self.sweep.folder, {(method.name, seed) for method in self.methods for seed in self.seeds}
        make_own_folder(output / WORKERS / "compare")
        held = Lock(output / WORKERS / "compare").acquire()
        try:
            table = self._train(forks)
        finally:
            held.release()
        if diverged := sorted(wanted - table.shown):
            named = "; ".join(f"{method}, seed {seed}" for method, seed in diverged)
            raise DivergedError(f"compare: {named} diverged; the table in {output} has the other runs")
        return table.write()

    def _train(self, forks: Forks | None) -> _Table:
        path = self.sweep.folder / TABLE
        if path.exists() and not (self.sweep.folder / JOURNAL).exists():
            move(path, kept := first_free(path))
            log.info("compare: the table of an earlier version is kept as %s; finished runs are not run again", kept)
        config, study = self.run.config, open_study(self.sweep.folder)
        processes = Processes("compare", forks)
        same = identity(config.model_copy(update={"sweep": SETTINGS}), self.run)
        study.prepare(same, self.run.task.main_metric)
        study.request(self.methods, self.seeds)
        table = _Table(config, study, digest_of(same))
        parts = self.parts(len(study.trials) - study.ended)
        launcher = ["--launcher", self.launcher, *(["--own-port"] if len(parts) > 1 else [])]
        crew = Crew(frozen(self.sweep, "compare.yaml"), study, processes, launcher if self.launcher else [])
        with processes.stopped_on_signal():
            if config.teacher.finetune and not study.done:
                crew.fine_tune(train_command(self.launcher) if self.launcher else [])
            if not self.launcher:
                crew.make_caches(self._cached(study), parts)
            crew.train_all(parts, table.update)
        return table

    def parts(self, runs: int) -> Sequence[Share | None]:
        """Return what each worker may use where so many runs are left; None: everything."""
        count = min(self.jobs, runs)
        if count < 2:
            return [None]
        cores = sorted(os.sched_getaffinity(0))[: limits.cores()]
        return shares(count, visible_devices(), cores, one_rank=not self.launcher)

    def _cached(self, study: Study) -> Iterator[list[str]]:
        """Yield the methods that are left to train and use a cache, as overrides."""
        left = {Named(*trial.user_attrs[NAMED]).name for trial in study.trials if not trial.state.is_finished()}
        for method in self.methods:
            if method.name in left and _resolved(self.sweep, method.overrides).cached:
                yield method.overrides


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
        methods: Name -> overrides of the configuration that all runs share.
        launcher: Of each run; see `Comparison`.
        jobs: See `Comparison`.

    Raises:
        UserError: The configuration of a method is invalid.
    """
    if launcher and jobs > 1:
        require_divisible(launcher, visible_devices())
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{', '.join(map(str, seeds))}: a seed is duplicated; give each once", "--seeds")
    if launcher and not shutil.which(program := train_command(launcher)[0]):
        raise UserError(f"{program!r} is not a program on PATH; give one such as deepspeed", "--launcher")
    fixed = {override.partition("=")[0] for override in RUN_OVERRIDES}
    if ignored := [override for override in overrides if override.partition("=")[0].strip() in fixed]:
        raise UserError(f"command line: {ignored[0]}: a comparison sets this for all of its runs; leave it out")
    sweep = SweepConfig(config_file, (*overrides, *RUN_OVERRIDES), output)
    run = _resolved(sweep)
    if sources.is_file(run.config.task.data):
        text.read_all(run.config.task.data, run.task)
    points = [_point(sweep, run, name, method) for name, method in methods.items()]
    return Comparison(sweep, run, points, seeds, launcher, jobs)


def _resolved(sweep: SweepConfig, overrides: Sequence[str] = ()) -> Resolved:
    return resolve(sweep.load(overrides), sweep.file, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _point(sweep: SweepConfig, run: Resolved, name: str, method: Overrides) -> Named:
    """Return a method as a point, with what its starting weights need.

    The number of layers defaults to that of the configuration's student. `first_k` needs the model before fine-tuning, since the
    teacher of the runs is a fine-tuned one.

    Raises:
        UserError: It cannot be trained.
    """
    student, teacher, made = run.config.student, run.config.teacher, dict(method)
    if "cache.dir" in made:
        raise UserError(f"method {name}: cache.dir cannot be set; a comparison has caches of its own")
    init = str(method.get("student.init", student.init))
    if init != student.init and student.layers is not None:
        made.setdefault("student.layers", None)
    if init in ("random", "first_k") and not made.get("student.num_layers"):
        made["student.num_layers"] = run.student_layers
    if init == "first_k" and teacher.finetune:
        made["student.init"] = teacher.models[0]
    arguments = as_arguments(made)
    try:
        depth = _resolved(sweep, arguments).student_layers
    except UserError as error:
        raise UserError(f"method {name}: {error}") from None
    return Named(name, arguments, {"overrides": json.loads(json.dumps(made)), "layers": depth})


class _Table:
    """The table of a study's results so far; `shown` is the method and the seed of each run in it."""

    def __init__(self, config: Config, study: Study, identity: str):
        self._config, self._study, self._identity = config, study, identity
        self.shown = self._results().keys()

    def _results(self) -> dict[tuple[str, int], Results]:
        attributes = [trial.user_attrs for trial in self._study.completed]
        return {(each[NAMED][0], each[SEED]): each[RESULTS] for each in attributes}

    def update(self, workers: int) -> str:
        """Log the runs that have finished since the last call, and write the table if there are any; returns no note."""
        found = self._results()
        for method, seed in [run for run in found if run not in self.shown]:
            log.info("compare: %s, seed %d: %s", method, seed, one_line(found[method, seed]))
        if found.keys() != self.shown:
            self.shown = found.keys()
            self.write()  # long comparisons show intermediate results
        return ""

    def write(self) -> Summary:
        """Write compare.json, .md and .png."""
        folder, results = self._study.folder, dict[str, dict[int, Results]]()
        for (method, seed), found in self._results().items():
            results.setdefault(method, {})[seed] = found
        facts = {name: each for name, _, each in (trial.user_attrs[NAMED] for trial in self._study.completed)}
        summary = summarize(self._config, results, facts, self._identity)
        write_json(folder / TABLE, summary)
        table = as_markdown(summary)
        write_atomically(folder / "compare.md", lambda tmp: tmp.write_text(table, encoding="utf-8"))
        write_atomically(folder / "compare.png", lambda tmp: plot(summary).savefig(tmp, format="png", dpi=150))
        return summary
