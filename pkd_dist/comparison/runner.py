"""`pkd compare`: several methods over several seeds, on one teacher and one cache of its outputs.

    OUTPUT/teacher/                the teacher, fine-tuned once (if the configuration asks for it)
    OUTPUT/cache-*/                teacher outputs, shared by all runs that need the same text and states
    OUTPUT/METHOD/seed-N/          a run, up to its evaluation; its output is in log.txt
    OUTPUT/compare.json, .md, .png the table

Each run is a process of the launcher. It resumes where it was stopped and does nothing where nothing changed, so rerunning
the same command completes a comparison. A call with other methods or seeds adds to the table of the folder.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from types import FrameType
from typing import NoReturn, cast

from pkd_dist.comparison.methods import Overrides, as_arguments
from pkd_dist.comparison.shares import Share, require_divisible, shares, visible_devices, with_own_port
from pkd_dist.comparison.table import RunResults, Summary, as_markdown, one_line, plot, read_summary, summarize
from pkd_dist.config.load import load
from pkd_dist.config.schema import Config
from pkd_dist.config.task import Task
from pkd_dist.data import answers, sources, tasks, text
from pkd_dist.distributed.signals import SIGNALS
from pkd_dist.errors import DivergedError, Preempted, UserError
from pkd_dist.evaluation.results import Results
from pkd_dist.files import digest_of, read_object, sha256, write_atomically, write_json
from pkd_dist.model import digests, encoder
from pkd_dist.model.families import num_layers
from pkd_dist.model.layers import LayerMap, layer_map
from pkd_dist.model.student import planned_depth, tokenizer_of
from pkd_dist.stages.context import teacher_name
from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.progress import Bar

TRAIN_MODULE = "pkd_dist.train"
RUN_OVERRIDES: Overrides = {
    "metrics.enabled": False, "evaluate.latency_samples": 10, "evaluate.throughput_samples": 64,
}  # fmt: skip
"""Of every run. Speed measured next to other runs means little, so it is measured briefly."""
_STOPPED = "compare: stopped; finished runs are kept, rerun the same command to resume"


@dataclass(frozen=True)
class Trial:
    """One run of a comparison."""

    method: str
    seed: int
    folder: Path
    overrides: Overrides


def train_command(launcher: str) -> list[str]:
    """Return the command that runs `pkd_dist.train` under a launcher.

    Args:
        launcher: `deepspeed`, `torchrun`, `python`, or a starter of processes such as `mpirun` or `srun`, with its
            options; empty: this Python.
    """
    prefix = shlex.split(launcher) or [sys.executable]
    programs = [Path(argument).name for argument in prefix]
    if "deepspeed" in programs:
        return [*prefix, "--module", TRAIN_MODULE]
    if any(program == "torchrun" or program.startswith("python") for program in programs):
        return [*prefix, "-m", TRAIN_MODULE]
    return [*prefix, sys.executable, "-m", TRAIN_MODULE]


def _unset(task: Task) -> dict[str, bool]:
    """Return the settings that earlier versions did not have, if they are at their defaults, so that digests stay the same."""
    return {
        name: True
        for name in ("split", "duplicates", "label_separator")
        if getattr(task, name) == Task.model_fields[name].default
    }


def _as_json(overrides: Overrides) -> Overrides:
    return cast(Overrides, json.loads(json.dumps(overrides)))


class Comparison:
    """All runs of a comparison.

    Args:
        config_file, overrides: The configuration that all runs share.
        methods: Name -> overrides.
        output: Folder of everything.
        launcher: See `train_command`.
        jobs: Concurrent runs; they share the cores and the GPUs.

    Raises:
        UserError: The configuration of a method is invalid; nothing was run.
    """

    def __init__(
        self,
        config_file: str,
        overrides: Sequence[str],
        methods: Mapping[str, Overrides],
        seeds: Sequence[int],
        output: Path,
        launcher: str,
        jobs: int,
    ):
        devices = visible_devices() if jobs > 1 else []
        if jobs > 1:
            require_divisible(launcher, devices)
        if len(set(seeds)) < len(seeds):
            raise UserError(f"{', '.join(map(str, seeds))}: a seed is duplicated; give each once", "--seeds")
        self.config_file, self.given, self.output = config_file, list(overrides), output
        self.launcher, self.command, self.jobs = launcher, train_command(launcher), jobs
        self._shares: SimpleQueue[Share] = SimpleQueue()
        for share in shares(jobs, devices, sorted(os.sched_getaffinity(0)), one_rank=not launcher):
            self._shares.put(share)
        if not shutil.which(self.command[0]):
            raise UserError(f"{self.command[0]!r} is not a program on PATH; give one such as deepspeed", "--launcher")
        self.base = self._resolved({})
        if sources.is_file(self.base.task.data):
            text.read_all(self.base.task.data, tasks.resolve(self.base.task))
        self.folder = encoder.locate(*self._model())
        self.teacher, self.tokenizer = encoder.load_config(self.folder), encoder.load_tokenizer(self.folder)
        self.methods = {name: self._complete(method) for name, method in methods.items()}
        self.depths = {name: self._checked_depth(name, method) for name, method in self.methods.items()}
        self.trials = [self._trial(name, seed) for seed in seeds for name in self.methods]
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = threading.Event()

    def _resolved(self, overrides: Overrides) -> Config:
        return load(self.config_file, [*self.given, *as_arguments({"run.dir": str(self.output), **overrides})])

    def _model(self) -> tuple[str, str]:
        """Return the model whose tokenizer and shape the runs have, and the setting that names it."""
        answered = bool(self.base.teacher.answers)
        return (self.base.student.init, "student.init") if answered else (self.base.teacher.models[0], "teacher.model")

    def _depth(self, config: Config) -> int:
        own = tokenizer_of(config.student, self.tokenizer)
        return planned_depth(config.student, self.teacher, own, config.student_length)

    def _complete(self, method: Overrides) -> Overrides:
        """Add what a method's starting weights need.

        The number of layers defaults to that of the configuration's student. `first_k` needs the model before fine-tuning,
        since the teacher of the runs is a fine-tuned one.
        """
        student, made = self.base.student, dict(method)
        init = str(method.get("student.init", student.init))
        if init != student.init and student.layers is not None:
            made.setdefault("student.layers", None)
        if init in ("random", "first_k") and not made.get("student.num_layers"):
            made["student.num_layers"] = self._depth(self.base)
        if init == "first_k" and self.base.teacher.finetune:
            made["student.init"] = self.base.teacher.models[0]
        return made

    def _checked_depth(self, name: str, method: Overrides) -> int:
        """Return the layers of a method's student, if its pairs of layers are possible."""
        try:
            config = self._resolved(method)
        except UserError as error:
            raise UserError(f"method {name}: {error}") from None
        depth = self._depth(config)
        self._paired(config, depth)
        return depth

    def _paired(self, config: Config, depth: int) -> list[int]:
        """Return the paired teacher layers, without the embeddings."""
        pairs = self._layer_map(config, depth).pairs
        return [teacher_layer for student_layer, teacher_layer in pairs if student_layer]

    def _layer_map(self, config: Config, depth: int) -> LayerMap:
        return layer_map(config.distill, num_layers(self.teacher), depth)

    def _trial(self, name: str, seed: int) -> Trial:
        folder = self.output / name / f"seed-{seed}"
        overrides = self.methods[name] | {"run.seed": seed, "run.dir": str(folder), "evaluate.result_dir": None}
        if self.base.teacher.finetune:
            overrides |= {"teacher.model": self._finetuned(), "teacher.finetune": None}
        config = self._resolved(overrides)
        by_token = config.distill.all_tokens and config.distill.compares_states
        if not by_token and config.cache.layers is None:
            overrides["cache.layers"] = "all"  # so that it also serves methods added later
        overrides["cache.dir"] = str(self.output / self._cache_name(config, self.depths[name], by_token))
        return Trial(name, seed, folder, overrides)

    def _finetuned(self) -> str | list[str]:
        """Return the folders of the teachers that are fine-tuned first; a plain path where there is one."""
        teacher, run = self.base.teacher, self.output / "teacher"
        count = max(len(teacher.models), len((teacher.finetune and teacher.finetune.seeds) or ()))
        folders = [str(run / teacher_name(number)) for number in range(1, count + 1)]
        return folders[0] if count == 1 else folders

    def _cache_name(self, config: Config, depth: int, by_token: bool) -> str:
        """Return a name that runs share if they need the same teacher outputs."""
        task = config.task
        unlabeled = [sha256(path) for path in sources.unlabeled_paths(task.unlabeled, tasks.resolve(task))]
        settings = task.model_dump(mode="json", exclude={"augment": {"min_confidence"}, **_unset(task)})
        read = [settings, unlabeled, self._data_digests]
        paired: list[object] = [self._paired(config, depth), config.distill.pair_embeddings]
        if attention := self._layer_map(config, depth).attention:
            paired.append([teacher_layer for _, teacher_layer in attention])
        pairs = paired if by_token else None
        digest = digest_of([self._teacher_identity, read, config.cache.model_dump(mode="json"), pairs])
        return f"cache-{'tokens' if by_token else 'cls'}-{digest[:8]}"

    @cached_property
    def _identity(self) -> str:
        """What all rows of a table have in common: the data, the teacher, and the settings that methods do not change."""
        sections = {"task", "teacher", "student", "distill", "train"}
        settings = self.base.model_dump(mode="json", include=sections, exclude={"task": _unset(self.base.task)})
        return digest_of([settings, self._data_digests, self._teacher_identity])

    @cached_property
    def _teacher_identity(self) -> object:
        made = self.base.teacher.model_dump(mode="json")
        if self.base.teacher.finetune:
            return [made, self.base.run.seed]
        if self.base.teacher.answers:
            return [made["answers_are"], *(sha256(path) for path in answers.paths_of(self.base.teacher.answers))]
        folders = [encoder.locate(model) for model in self.base.teacher.models]
        found = [digests.weights_digest(folder) for folder in folders]
        return found[0] if len(found) == 1 else found

    @cached_property
    def _data_digests(self) -> dict[str, str]:
        task = tasks.resolve(self.base.task)
        return sources.digests(self.base.task.data, sources.available(self.base.task.data, task), task)

    def run(self) -> Summary:
        """Run the trials that are not finished, write the table after each, and return it.

        Raises:
            UserError: A run failed; the other active runs were stopped and resume when the command is rerun.
            DivergedError: Runs diverged; all others are finished.
            Preempted: A signal stopped it.
        """
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.output} cannot be a folder ({error.strerror}); choose another", "--output"
            ) from None
        with self._stop_on_signal(), Bar("compare", len(self.trials)) as bar:
            if self.base.teacher.finetune:
                self._launch(self.output / "teacher", {"run.dir": str(self.output / "teacher")}, "data,teacher")
            results, diverged = self._run_trials(bar)
        if diverged:
            named = "; ".join(f"{trial.method}, seed {trial.seed}" for trial in diverged)
            raise DivergedError(f"compare: {named} diverged; the table in {self.output} has the other runs")
        return self._write(results, self._earlier())

    def _run_trials(self, bar: Bar) -> tuple[RunResults, list[Trial]]:
        """Return the results of the trials, and those that diverged."""
        results: dict[str, dict[int, Results]] = {name: {} for name in self.methods}
        earlier = self._earlier()
        diverged: list[Trial] = []
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(self._train, trial): trial for trial in self.trials}
            try:
                for future in as_completed(futures):
                    trial = futures[future]
                    bar.advance()
                    try:
                        result = future.result()
                    except DivergedError as error:
                        diverged.append(trial)
                        log.info("compare: %s", error)
                        continue
                    results[trial.method][trial.seed] = result
                    log.info("compare: %s, seed %d: %s", trial.method, trial.seed, one_line(result))
                    self._write(results, earlier)  # long comparisons show intermediate results
            except BaseException:
                self._stop()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return results, diverged

    def _earlier(self) -> Summary | None:
        """Return the table that earlier calls left, without the rows that cannot be compared with this call's."""
        path = self.output / "compare.json"
        found = read_summary(path)
        if found is None:
            if path.exists():
                log.info("compare: %s is damaged; the rows of earlier calls are left out of the table", path)
            return None
        if found.get("of") != self._identity:
            log.info("compare: %s has rows of another configuration; they are left out of the table", self.output)
            return None
        for name in [name for name in self.methods if name in found["methods"]]:
            if found["methods"][name].get("overrides") != _as_json(self.methods[name]):
                log.info(
                    "compare: %s has other settings than before; its earlier seeds are left out of the table", name
                )
                del found["methods"][name]
        return found

    def _write(self, results: RunResults, earlier: Summary | None) -> Summary:
        made = {name: by_seed for name, by_seed in results.items() if by_seed}
        summary = summarize(self.base, made, self.depths, earlier)
        summary["of"] = self._identity
        for name in made:
            summary["methods"][name]["overrides"] = _as_json(self.methods[name])
        write_json(self.output / "compare.json", summary)
        table = as_markdown(summary)
        write_atomically(self.output / "compare.md", lambda tmp: tmp.write_text(table, encoding="utf-8"))
        write_atomically(self.output / "compare.png", lambda tmp: plot(summary).savefig(tmp, format="png", dpi=150))
        return summary

    def _train(self, trial: Trial) -> Results:
        share = self._shares.get()
        try:
            self._launch(trial.folder, trial.overrides, "data,teacher,cache,init,distill,evaluate", share)
        finally:
            self._shares.put(share)
        path = trial.folder / "results_eval.json"
        try:
            return cast(Results, read_object(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); rerun the same command to write it again") from None

    def _launch(self, folder: Path, overrides: Overrides, stages: str, share: Share | None = None) -> None:
        """Run stages of a run in a process of their own and wait for it.

        Args:
            share: What it may use of this host beside other runs; None: everything.

        Raises:
            UserError, DivergedError, Preempted: As the run ended.
        """
        folder.mkdir(parents=True, exist_ok=True)
        arguments = [*self.given, *as_arguments({**RUN_OVERRIDES, **overrides}), "--stages", stages]
        environment, command = dict(os.environ), self.command
        if share and self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(len(share.cores)))
            if share.devices:
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(share.devices)
            if self.launcher:
                command = with_own_port(command, self.launcher, environment)
        with open(folder / "log.txt", "ab") as output:
            start = output.tell()
            job = subprocess.Popen(
                [*command, "--config", self.config_file, *arguments],
                stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment,
            )  # fmt: skip
            if share and self.jobs > 1 and self.launcher:
                with suppress(ProcessLookupError):  # before it has started its ranks, which divide its cores
                    os.sched_setaffinity(job.pid, share.cores)
            status = self._wait(job)
        if self._stopped.is_set() or status == Preempted.exit_status:
            raise Preempted(_STOPPED, signal.SIGTERM)
        if status:
            lines = (folder / "log.txt").read_bytes()[start:].decode(errors="replace").splitlines()
            why = next((line for line in reversed(lines) if line.startswith("pkd: ")), "pkd: it printed no error")
            kind = DivergedError if status == DivergedError.exit_status else UserError
            raise kind(f"{folder}: status {status}: {why.removeprefix('pkd: ')} (full output: {folder / 'log.txt'})")

    def _wait(self, job: subprocess.Popen[bytes]) -> int:
        self._running.add(job)
        if self._stopped.is_set():
            job.terminate()
        try:
            status = job.wait()
        except Preempted:  # the signal arrived in this thread
            job.terminate()
            job.wait()
            raise
        self._running.discard(job)
        return status

    def _stop(self) -> None:
        self._stopped.set()
        for job in list(self._running):
            job.terminate()

    @contextmanager
    def _stop_on_signal(self) -> Iterator[None]:
        """Stop on the signals that stop a run: the runs commit a checkpoint."""

        def interrupt(number: int, frame: FrameType | None) -> NoReturn:
            raise Preempted(_STOPPED, number)

        numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        before = {number: signal.signal(number, interrupt) for number in numbers}
        try:
            yield
        except Preempted:
            self._stop()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
