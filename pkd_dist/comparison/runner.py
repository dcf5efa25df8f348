"""`pkd compare`: several methods over several seeds, on one teacher and one cache of its answers.

    OUTPUT/teacher/                the teacher, fine-tuned once (where the configuration says so)
    OUTPUT/cache-*/                its answers, shared by all runs that ask for the same text and states
    OUTPUT/METHOD/seed-N/          a whole run, up to its evaluation; log.txt is what it said
    OUTPUT/compare.json, .md, .png the table

A method is a set of overrides of the run's configuration, and a run is the launcher's own process: it goes on where it was
stopped, and says "done" where nothing changed, so the same command completes a comparison.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pkd_dist.config.load import load
from pkd_dist.config.schema import PRESETS, Config
from pkd_dist.data import sources, tasks
from pkd_dist.errors import DivergedError, Preempted, UserError
from pkd_dist.files import digest_of, sha256, write_atomically, write_json
from pkd_dist.model import encoder
from pkd_dist.model.layers import paired_layers
from pkd_dist.model.student import planned_depth
from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.progress import Bar

SIDES = ("teacher", "student")
TRAIN = Path(__file__).resolve().parents[2] / "launcher" / "train.py"
Overrides = dict[str, Any]
"""Dotted key -> value."""

METHODS: dict[str, Overrides] = {
    "finetune": {"distill.alpha": 0.0, "distill.beta": 0.0},
    "kd": {"distill.beta": 0.0},
    "pkd-skip": {"distill.patience": "skip"},
    "pkd-last": {"distill.patience": "last"},
    "random": {"student.init": "random"},
    "first-k": {"student.init": "first_k"},
    "tokens": {"distill.states": "tokens"},
    "seed": {"distill.preset": "seed", **{f"distill.{key}": value for key, value in PRESETS["seed"].items()}},
}
"""What is compared by name; everything else is as the configuration says. `finetune`: labels alone. `kd`: and the teacher's
predictions. `pkd-skip`, `pkd-last`: and its layers. `random`, `first-k`: other starting weights. `tokens`: the states of
all tokens. `seed`: the seed's loss."""


@dataclass(frozen=True)
class Trial:
    """One run of a comparison."""

    method: str
    seed: int
    folder: Path
    overrides: Overrides


def parse_methods(names: str, own: Sequence[str]) -> dict[str, Overrides]:
    """The methods of `--methods a,b` and of each `--method "NAME: section.key=value ..."`.

    Raises:
        UserError: an unknown name, one that is given twice, or a text of another form.
    """
    chosen: dict[str, Overrides] = {}
    for name in (part.strip() for part in names.split(",") if part.strip()):
        if name not in METHODS:
            raise UserError(f"--methods: {name!r} is not known; allowed: {', '.join(METHODS)}; --method defines others")
        if name in chosen:
            raise UserError(f"--methods: {name} is named twice; name each once")
        chosen[name] = METHODS[name]
    for given in own:
        name, colon, rest = given.partition(":")
        name = name.strip()
        try:
            pairs = [part.partition("=") for part in shlex.split(rest)]
        except ValueError:  # a quotation mark that is not closed
            pairs = []
        if not colon or not pairs or not all(key and equals for key, equals, _ in pairs):
            raise UserError(f'--method: {given!r} is not of the form "NAME: section.key=value section.key=value"')
        if name in (*chosen, "teacher") or not re.fullmatch(r"[\w+-]+", name) or name.startswith("cache-"):
            raise UserError(f"--method: the name {name!r} is taken, or has other signs than letters, digits, - + _")
        chosen[name] = {key: Raw(value) for key, _, value in pairs}
    if not chosen:
        raise UserError(f"--methods: name at least one of {', '.join(METHODS)}")
    return chosen


ASIDE: Overrides = {"metrics.enabled": False, "evaluate.latency_samples": 10, "evaluate.throughput_samples": 64}
"""Of every run: beside others its speed says little, so it is taken briefly."""


class Raw(str):
    """A value as it was typed, in YAML."""


def as_arguments(overrides: Mapping[str, Any]) -> list[str]:
    return [f"{k}={v if isinstance(v, Raw) else json.dumps(v)}" for k, v in overrides.items()]


class Comparison:
    """All runs of a comparison, and where they stand.

    Args:
        config_file, overrides: the configuration that all runs share.
        methods: name -> overrides.
        output: folder of everything.
        launcher: command before `launcher/train.py`, such as `deepspeed --num_gpus 4`; empty: this Python.
        jobs: runs at a time; each gets its share of the cores.

    Raises:
        UserError: a configuration that is refused, of any method, before anything runs.
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
        if jobs > 1 and launcher:
            raise UserError(
                "--jobs: with --launcher one run at a time; the launcher's ranks have the machine to themselves"
            )
        if len(set(seeds)) < len(seeds):
            raise UserError(f"--seeds: {', '.join(map(str, seeds))}: one stands twice; give each once")
        self.config_file, self.given, self.output = config_file, list(overrides), output
        self.command = shlex.split(launcher) or [sys.executable]
        self.jobs, self.seeds = jobs, list(seeds)
        self.base = self._resolved({})
        self.folder = encoder.locate(self.base.teacher.model)
        self.teacher, self.tokenizer = encoder.load_config(self.folder), encoder.load_tokenizer(self.folder)
        self.methods = {name: self._complete(method) for name, method in methods.items()}
        self.depths = {name: self._require_possible(method) for name, method in self.methods.items()}
        self.trials = [self._trial(name, seed) for seed in seeds for name in self.methods]
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = threading.Event()

    def _resolved(self, overrides: Mapping[str, Any]) -> Config:
        return load(self.config_file, [*self.given, *as_arguments({"run.dir": str(self.output), **overrides})])

    def _depth(self, config: Config) -> int:
        return planned_depth(config.student, self.teacher, self.tokenizer, config.task.max_length)

    def _complete(self, method: Overrides) -> Overrides:
        """A method with what its starting weights need: as many layers as the configuration's student has where it names
        no number, and for `first_k` the model that the teacher was made from, since the runs' teacher is fine-tuned."""
        student, made = self.base.student, dict(method)
        init = str(method.get("student.init", student.init))
        if init != student.init and student.layers is not None:
            made.setdefault("student.layers", None)
        if init in ("random", "first_k") and not made.get("student.num_layers"):
            made["student.num_layers"] = self._depth(self.base)
        if init == "first_k" and self.base.teacher.finetune:
            made["student.init"] = self.base.teacher.model
        return made

    def _require_possible(self, method: Overrides) -> int:
        """The layers of a method's student. Raises UserError where a run of it would be refused for its layers."""
        config = self._resolved(method)
        depth = self._depth(config)
        self._paired(config, depth)
        return depth

    def _paired(self, config: Config, depth: int) -> tuple[int, ...]:
        distill = config.distill
        return paired_layers(distill.patience, encoder.num_layers(self.teacher), depth) if distill.beta else ()

    def _trial(self, name: str, seed: int) -> Trial:
        folder = self.output / name / f"seed-{seed}"
        overrides = self.methods[name] | {"run.seed": seed, "run.dir": str(folder), "evaluate.result_dir": None}
        if self.base.teacher.finetune:
            overrides |= {"teacher.model": str(self.output / "teacher" / "teacher"), "teacher.finetune": None}
        config = self._resolved(overrides)
        by_token = config.distill.states == "tokens" and config.distill.beta > 0
        if not by_token and config.cache.layers is None:
            overrides["cache.layers"] = "all"  # whatever method is added later finds its layers
        pairs = [self._paired(config, self.depths[name]), config.distill.pair_embeddings] if by_token else None
        answers = digest_of([self._teacher_identity, self._text(config), config.cache.model_dump(mode="json"), pairs])
        overrides["cache.dir"] = str(self.output / f"cache-{'tokens' if by_token else 'cls'}-{answers[:8]}")
        return Trial(name, seed, folder, overrides)

    @cached_property
    def _teacher_identity(self) -> Any:
        made = self.base.teacher.model_dump(mode="json")
        return [made, self.base.run.seed] if self.base.teacher.finetune else encoder.weights_digest(self.folder)

    @cached_property
    def _files(self) -> dict[str, str]:
        task = tasks.resolve(self.base.task)
        return sources.digests(self.base.task.data, sources.available(self.base.task.data, task), task)

    def _text(self, config: Config) -> Any:
        """Whatever the cached text depends on."""
        task = config.task
        more = [sha256(path) for path in sources.unlabeled_paths(task.unlabeled, tasks.resolve(task))]
        return [task.model_dump(mode="json"), more, self._files]

    # ------------------------------------------------------------------------------------------------------- running

    def run(self) -> dict[str, Any]:
        """Trains what is not trained yet, writes the table, and returns it.

        Raises:
            UserError: a run was refused, or failed; the others that were under way are stopped and go on with the same command.
            DivergedError: runs diverged, and all the others are done.
            Preempted: stopped by a signal.
        """
        try:
            self.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output: {self.output} cannot be a folder ({error.strerror}); choose another") from None
        results: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in self.methods}
        diverged: list[str] = []
        made: dict[str, Any] = {}
        with self._stoppable(), Bar("compare", len(self.trials)) as bar:
            if self.base.teacher.finetune:
                self._launch(self.output / "teacher", {"run.dir": str(self.output / "teacher")}, "data,teacher")
            with ThreadPoolExecutor(self.jobs) as pool:
                futures = {pool.submit(self._train, trial): trial for trial in self.trials}
                try:
                    for future in as_completed(futures):
                        trial = futures[future]
                        bar.advance()
                        try:
                            result = future.result()
                        except DivergedError as error:
                            diverged.append(f"{trial.method}, seed {trial.seed}")
                            log.info("compare: %s", error)
                            continue
                        results[trial.method][trial.seed] = result
                        log.info("compare: %s, seed %d: %s", trial.method, trial.seed, _in_a_line(result))
                        made = self._write(results)  # a comparison of days shows what it has
                except BaseException:
                    self._stop()
                    pool.shutdown(wait=True, cancel_futures=True)
                    raise
        if diverged:
            raise DivergedError(f"compare: {'; '.join(diverged)} diverged; the table in {self.output} is of the others")
        return made

    def _write(self, results: Mapping[str, Mapping[int, dict[str, Any]]]) -> dict[str, Any]:
        made = summary(self.base, {name: by_seed for name, by_seed in results.items() if by_seed}, self.depths)
        write_json(self.output / "compare.json", made)
        table = as_markdown(made)
        write_atomically(self.output / "compare.md", lambda tmp: tmp.write_text(table, encoding="utf-8"))
        write_atomically(self.output / "compare.png", lambda tmp: plot(made).savefig(tmp, format="png", dpi=150))
        return made

    def _train(self, trial: Trial) -> dict[str, Any]:
        self._launch(trial.folder, trial.overrides, "data,teacher,cache,init,distill,evaluate")
        return json.loads((trial.folder / "results_eval.json").read_text(encoding="utf-8"))

    def _launch(self, folder: Path, overrides: Overrides, stages: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        arguments = [*self.given, *as_arguments({**ASIDE, **overrides}), "--stages", stages]
        environment = dict(os.environ)
        if self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.jobs)))
        with open(folder / "log.txt", "ab") as said:
            start = said.tell()
            command = [*self.command, str(TRAIN), "--config", self.config_file, *arguments]
            job = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment)
            self._running.add(job)
            if self._stopped.is_set():
                job.terminate()
            try:
                status = job.wait()
            except Preempted:  # the signal came to this thread
                job.terminate()
                job.wait()
                raise
            self._running.discard(job)
        if self._stopped.is_set() or status == Preempted.exit_status:
            raise Preempted("compare: stopped; what is trained stays, and the same command goes on", signal.SIGTERM)
        if status:
            lines = (folder / "log.txt").read_bytes()[start:].decode(errors="replace").splitlines()
            why = next((line for line in reversed(lines) if line.startswith("pkd: ")), "pkd: it ended without a word")
            kind = DivergedError if status == DivergedError.exit_status else UserError
            raise kind(f"{folder}: status {status}: {why.removeprefix('pkd: ')} (all it said: {folder / 'log.txt'})")

    def _stop(self) -> None:
        self._stopped.set()
        for job in list(self._running):
            job.terminate()

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """SIGTERM is as good as Ctrl-C: the runs commit what they have."""

        def interrupt(number: int, frame: Any) -> None:
            raise Preempted("compare: stopped; what is trained stays, and the same command goes on", number)

        before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        except Preempted:
            self._stop()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------------- the table


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds, and half of its 95% interval (Student's t; None for one seed)."""
    from scipy.stats import t

    count = len(values)
    if count < 2:
        return float(np.mean(values)), None
    return float(np.mean(values)), float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))


def summary(
    config: Config, results: Mapping[str, Mapping[int, dict[str, Any]]], depths: Mapping[str, int]
) -> dict[str, Any]:
    """`compare.json`: per method its figures by seed, means and 95% intervals, also of the difference, seed by seed, to the
    first method of as many layers.

    Args:
        results: method -> seed -> results_eval.json; at least one of each.
        depths: method -> layers of its student.
    """
    metric = tasks.resolve(config.task).main_metric
    one = next(iter(next(iter(results.values())).values()))
    splits = ["dev", *one["splits"]]
    pooled = splits if metric == "accuracy" else ["dev"]  # what else a metric is, its mean over splits is not
    methods: dict[str, Any] = {}
    for name, by_seed in results.items():
        figures = {seed: _figures(result, splits, pooled, metric) for seed, result in sorted(by_seed.items())}
        keys = list(next(iter(figures.values())))
        columns = {key: [figures[seed][key] for seed in figures] for key in keys}
        methods[name] = {
            "seeds": {str(seed): values for seed, values in figures.items()},
            "mean": {key: interval(values)[0] for key, values in columns.items()},
            "half_interval_95": {key: interval(values)[1] for key, values in columns.items()},
            "layers": depths[name],
        }
    hold_against_first(methods)
    teacher = _figures(one, splits, pooled, metric, "teacher")
    about = {"task": one["task"], "metric": metric, "splits": splits, "pooled": pooled}
    return {**about, "teacher": teacher, "methods": methods}


def hold_against_first(methods: dict[str, Any]) -> None:
    """Adds `minus FIRST` to each method: by how much, seed by seed, it differs from the first method of its depth."""
    for name, method in methods.items():
        first = next(other for other in methods if methods[other]["layers"] == method["layers"])
        seeds = [seed for seed in method["seeds"] if seed in methods[first]["seeds"] and name != first]
        for key in [key for key in method if key.startswith("minus ")]:
            del method[key]
        for key in ("score", "agreement") if seeds else ():
            mean, half = interval([method["seeds"][s][key] - methods[first]["seeds"][s][key] for s in seeds])
            method.setdefault(f"minus {first}", {})[key] = {"mean": mean, "half_interval_95": half}


def _figures(
    result: dict[str, Any], splits: Sequence[str], pooled: Sequence[str], metric: str, side: str = "student"
) -> dict[str, float]:
    """`score` and `agreement` are over the pooled splits, each example counting once."""
    dev = {"n": result["n"], "agreement": result["compression"]["agreement"], **{s: result[s] for s in SIDES}}
    parts = {"dev": dev, **result["splits"]}
    sizes = [parts[split]["n"] for split in pooled]
    scores = {split: float(parts[split][side][metric]) for split in splits}
    agreements = [float(parts[split]["agreement"]) if side == "student" else 1.0 for split in pooled]
    return {
        **scores,
        "score": float(np.average([scores[split] for split in pooled], weights=sizes)),
        "agreement": float(np.average(agreements, weights=sizes)),
        **{key: float(result[side][key]) for key in ("parameters", "modelSize")},
    }


def _in_a_line(result: dict[str, Any]) -> str:
    scores = {"dev": result["main_metric"]}
    scores |= {split: figures["student"]["main_metric"] for split, figures in result["splits"].items()}
    shown = ", ".join(f"{split} {value:.4f}" for split, value in scores.items())
    return f"{shown}, agreement {result['compression']['agreement']:.4f}"


def rows(made: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table as (header, rows of text); scores and agreement in percent where they are shares."""
    splits = made["splits"]
    pooled = made["pooled"]
    scored = [*splits, *(["score"] if len(pooled) > 1 else []), "agreement"]
    names = {"score": " + ".join(pooled), "agreement": "agreement with the teacher"}
    header = ["method", "layers", "seeds", *(names.get(key, key) for key in scored), "parameters, M"]

    def shown(mean: float, half: float | None = None) -> str:
        return f"{100 * mean:.2f}" + ("" if half is None else f" ± {100 * half:.2f}")

    out = [
        [
            "teacher",
            "",
            "",
            *(shown(made["teacher"][key]) for key in scored),
            f"{made['teacher']['parameters'] / 1e6:.1f}",
        ]
    ]
    for name, method in made["methods"].items():
        mean, half = method["mean"], method["half_interval_95"]
        out.append(
            [
                name,
                str(method["layers"]),
                str(len(method["seeds"])),
                *(shown(mean[key], half[key]) for key in scored),
                f"{mean['parameters'] / 1e6:.1f}",
            ]
        )
    return header, out


def as_markdown(made: dict[str, Any]) -> str:
    header, body = rows(made)
    lines = [header, ["---"] * len(header), *body]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (
        f"{table}\n\n{made['metric']} and agreement in percent: means over seeds, ± half of the 95% interval of that mean "
        "(Student's t).\n"
    )


def plot(made: dict[str, Any]) -> Figure:
    """Scores and agreement of each method: a point a seed, the mean with its 95% interval, the teacher as a line."""
    methods = made["methods"]
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(methods)), layout="constrained")
    label = made["metric"] + " on " + " + ".join(made["pooled"])
    panels = (("score", f"{label}, %"), ("agreement", "agreement with the teacher, %"))
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        for place, method in enumerate(methods.values()):
            values = [100 * figures[key] for figures in method["seeds"].values()]
            axes.plot(values, [place] * len(values), "o", color="#8bb0d8", markersize=5)
            half = method["half_interval_95"][key]
            axes.errorbar(
                [100 * method["mean"][key]], [place], xerr=None if half is None else [100 * half], fmt="D",
                color="#1f4e8c", capsize=4, markersize=6,
            )  # fmt: skip
        if key == "score":
            axes.axvline(100 * made["teacher"][key], color="#b5541c", linestyle="--", linewidth=1.2)
            axes.set_title("dashed: the teacher", fontsize=9, loc="right", color="#b5541c")
        axes.set_xlabel(title)
        axes.grid(axis="x", color="#dddddd")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_yticks(range(len(methods)), list(methods))
        axes.set_ylim(len(methods) - 0.5, -0.5)
    return figure
