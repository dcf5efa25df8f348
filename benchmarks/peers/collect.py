"""Combine the measurements of a comparison into one JSON table.

FLOPs of matrix multiplications are counted from shapes (`Shape.forward_flops`); a backward pass counts as two forward passes.
*Executed* is what a contestant computes, padding included. *Useful* is what the task needs in any implementation: each
sentence once through the teacher and once per epoch through the student, unpadded, with the last layers for [CLS] only.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.peers.bench import CONTESTANTS, Bench
from benchmarks.peers.subject import shape_of
from benchmarks.scaling.model import Shape
from pkd_dist.config.load import load
from pkd_dist.config.schema import Config
from pkd_dist.data import tasks, text
from pkd_dist.data.batches import MULTIPLE, TrainingBatches
from pkd_dist.data.tokens import TokenSet, tokenize
from pkd_dist.model.encoder import load_config, load_tokenizer

VERSIONS = ("torch", "transformers", "deepspeed", "accelerate", "textbrewer", "numpy")


def collect(bench: Bench) -> dict[str, Any]:
    """Return all results so far. Ratios and shares are absent if a side of them is not measured."""
    config = load(common.CONFIG, bench.overrides(bench.seeds[0]))
    tokens, shapes, rounds = _tokens(bench, config), _shapes(bench, config), _read(bench, "peaks")
    peaks = {name: _median(rounds, name) for name in ("float32", "bfloat16") if rounds}
    needed = sum(useful(*shapes, tokens, config.train.epochs))
    stamp, versions = common.stamp(), {name: version(name) for name in VERSIONS}
    device = torch.cuda.get_device_name() if bench.device == "cuda" else "cpu"
    settings = {
        "tokens": int(tokens.offsets_N1[-1]), "examples": len(tokens), "epochs": config.train.epochs,
        "seeds": list(bench.seeds), "batch_size": config.train.batch_size, "learning_rate": config.train.learning_rate,
        "student_layers": config.student.layers, "teacher_layers": shapes[0].layers, "hidden_size": shapes[0].hidden,
        "slow_steps": bench.slow_steps, "max_length": config.task.max_length, "data": config.task.data,
    }  # fmt: skip
    out: dict[str, Any] = {
        "date": stamp.pop("date"), "machine": stamp | {"device": device, "versions": versions}, "settings": settings,
        "peak_flops_per_second": peaks, "useful_flops": needed, "contestants": {},
    }  # fmt: skip
    for name in (name for name in CONTESTANTS if CONTESTANTS[name].role != "recipe"):
        if found := _contestant(bench, name, config, tokens, shapes):
            for key, flops in (("useful_share", needed), ("executed_share", found["executed_flops"])):
                found[key] = _share(flops, found["seconds"], peaks, found["precision"])
            out["contestants"][name] = found
    out |= _engine(bench) | _teacher(bench) | _job(bench) | _ratios(out["contestants"], peaks)
    return out | _time_to_quality(bench, out.get("best_peer"))


def _tokens(bench: Bench, config: Config) -> TokenSet:
    task = tasks.resolve(config.task)
    split = text.read(config.task.data, "train", task, task.classes)
    return tokenize(split, load_tokenizer(str(bench.teacher)), config.task.max_length, bench.output / "tokens")


def _shapes(bench: Bench, config: Config) -> tuple[Shape, Shape]:
    """Return the shapes of teacher and student."""
    teacher, student = load_config(str(bench.teacher)), load_config(str(bench.teacher))
    student.num_hidden_layers = len(config.student.layers or ())
    return shape_of(teacher), shape_of(student)


def _read(bench: Bench, name: str, full: bool = False) -> list[dict[str, Any]]:
    return list(_by_seed(bench, name, full).values())


def _by_seed(bench: Bench, name: str, full: bool = False) -> dict[int, dict[str, Any]]:
    files = {seed: bench.file(name, seed, full) for seed in bench.seeds}
    return {seed: json.loads(path.read_text()) for seed, path in files.items() if path.exists()}


def _median(rounds: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.median(found[key] for found in rounds)


def _medians(rounds: Sequence[dict[str, Any]], key: str) -> dict[str, float]:
    return {name: _median([found[key] for found in rounds], name) for name in rounds[0][key]}


def _share(flops: float, seconds: float, peaks: dict[str, float], precision: str) -> float | None:
    return flops / seconds / peaks[precision] if precision in peaks else None


def _contestant(
    bench: Bench, name: str, config: Config, tokens: TokenSet, shapes: tuple[Shape, Shape]
) -> dict[str, Any] | None:
    contestant, full = CONTESTANTS[name], bench.full(name)
    rounds = _read(bench, name, full)
    if not rounds:
        return None
    first, ranks = rounds[0], rounds[0]["ranks"]
    if contestant.role == "ours":
        each = [sum(found["seconds"].values()) for found in rounds]
        teacher = [found["seconds"]["cache"] for found in rounds]
        training = [found["training_seconds"] for found in rounds]
        executed = executed_by_ours(*shapes, tokens, config, ranks)
    else:
        # with several ranks the first one is measured, which gets its share of every batch
        total = int(tokens.offsets_N1[-1]) * config.train.epochs
        scale = [total / (found["tally"]["tokens"] * found["ranks"]) for found in rounds]
        # the teacher's separate pass, if there was one, scaled to all examples
        rows = [len(tokens) / max(1, found["teacher_rows"]) for found in rounds]
        teacher = [found["teacher_seconds"] * s for found, s in zip(rounds, rows, strict=True)]
        training = [found["training_seconds"] * s for found, s in zip(rounds, scale, strict=True)]
        each = [a + b for a, b in zip(teacher, training, strict=True)]
        executed = first["teacher_flops"] * rows[0], first["tally"]["flops"] * ranks * scale[0]
    seconds = statistics.median(each)
    return {
        "title": contestant.title, "role": contestant.role,
        "precision": first.get("precision", contestant.precision), "ranks": ranks, "threads": first["threads"],
        "measured": "whole" if full else f"{bench.slow_steps} steps",
        "seconds": seconds, "seconds_each": each, "teacher_seconds": statistics.median(teacher),
        "training_seconds": statistics.median(training),
        "samples_per_second": len(tokens) * config.train.epochs / seconds,
        "command_seconds": _median(rounds, "command_seconds") if full else None,
        "peak_bytes": max(found["peak_bytes"] for found in rounds),
        "executed_flops": sum(executed), "executed_training_flops": executed[1],
        **_accuracy(_by_seed(bench, contestant.scored_by or name, True)), "scored_by": contestant.scored_by,
    }  # fmt: skip


def _by_length(shape: Shape, lengths_N: np.ndarray) -> float:
    lengths, counts = np.unique(lengths_N, return_counts=True)
    return sum(int(n) * shape.forward_flops(1, int(length)) for length, n in zip(lengths, counts, strict=True))


def useful(teacher: Shape, student: Shape, tokens: TokenSet, epochs: int) -> tuple[float, float]:
    """Return the FLOPs of the teacher's pass and of all epochs of the student."""
    return _by_length(teacher, tokens.lengths_N), 3 * epochs * _by_length(student, tokens.lengths_N)


def executed_by_ours(
    teacher: Shape, student: Shape, tokens: TokenSet, config: Config, ranks: int
) -> tuple[float, float]:
    """Return the FLOPs of the same parts as our run executes them, from its batches."""
    settings, training = config.train, 0.0
    for rank in range(ranks):
        batches = TrainingBatches(
            tokens, settings.batch_size, settings.micro_batch_size, config.run.seed, rank, ranks, 0
        )
        for order in map(batches.order, range(settings.epochs)):
            for step in range(batches.steps):
                shapes = (batch.input_ids_BL.shape for batch in batches.step(order, step))
                training += sum(3 * student.forward_flops(*shape) for shape in shapes)
    rounded_N = -(-tokens.lengths_N // MULTIPLE) * MULTIPLE  # the cache sorts its batches by length
    return _by_length(teacher, rounded_N), training


def _accuracy(runs: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Return mean and standard error, over seeds, of the accuracy of the best epoch; the error is None for one seed."""
    best = {seed: max(epoch["accuracy"] for epoch in found["epochs"]) for seed, found in runs.items()}
    if not best:
        return {"accuracy": None, "accuracy_error": None, "accuracies": {}}
    mean, error = _mean_and_error(list(best.values()))
    return {"accuracy": mean, "accuracy_error": error, "accuracies": best}


def _mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error, None for one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def _engine(bench: Bench) -> dict[str, Any]:
    if not (rounds := _read(bench, "engine")):
        return {}
    overhead, steps = (_medians(rounds, key) for key in ("overhead", "step_seconds"))
    made = {key: rounds[0][key] for key in ("precision", "zero_stage", "threads")}
    return {"engine_overhead": overhead["engine"], "engine": {**made, "overhead": overhead, "step_seconds": steps}}


def _teacher(bench: Bench) -> dict[str, Any]:
    if not (rounds := _read(bench, "teacher")):
        return {}
    seconds = statistics.median(second for found in rounds for second in found["seconds"])
    peak = _median(rounds, "peak_flops_per_second")
    made = {key: rounds[0][key] for key in ("precision", "examples", "batches", "flops")}
    return {"teacher_pass": {**made, "seconds": seconds, "gemm_share": made["flops"] / seconds / peak}}


def _job(bench: Bench) -> dict[str, Any]:
    if not (rounds := _read(bench, "job")):
        return {}
    seconds = statistics.median(sum(found["stages"].values()) for found in rounds)
    command_seconds = _median(rounds, "command_seconds")
    return {"job": {"stages": _medians(rounds, "stages"), "seconds": seconds, "command_seconds": command_seconds}}


_ROUNDING = 1e-6
"""Of shares of the examples, which some contestants have in float32."""


def _time_to_quality(bench: Bench, reference: str | None) -> dict[str, Any]:
    """Return who reaches the agreement with the teacher that the fastest peer ends with, and when.

    The agreement is the mean over the rounds. Seconds are those from the command to the end of the first epoch that reaches it,
    their median over the rounds; None: no epoch does.
    """
    if reference is None:
        return {}
    curves = {name: _curve(_read(bench, name, True)) for name in CONTESTANTS}
    curves = {name: curve for name, curve in curves.items() if curve}
    if reference not in curves:
        return {}
    target = curves[reference][-1]["agreement"]
    reached = {
        name: {
            "title": CONTESTANTS[name].title,
            "seconds": next((epoch["seconds"] for epoch in curve if epoch["agreement"] >= target - _ROUNDING), None),
            "epochs": curve,
        }
        for name, curve in curves.items()
    }
    return {"time_to_quality": {"reference": reference, "agreement": target, "reached": reached}}


def _curve(rounds: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the means after each epoch, and the median of the seconds since the command."""
    return [
        {
            **{key: statistics.fmean(epoch[key] for epoch in epochs) for key in ("agreement", "accuracy")},
            "seconds": statistics.median(e["at"] - made["began"] for e, made in zip(epochs, rounds, strict=True)),
        }
        for epochs in zip(*(made["epochs"] for made in rounds), strict=True)
    ]


def _ratios(contestants: dict[str, dict[str, Any]], peaks: dict[str, float]) -> dict[str, Any]:
    """Compare ours, at its best number of ranks, with the fastest peer and the authors' computation."""

    def fastest(role: str) -> str | None:
        found = [name for name, made in contestants.items() if made["role"] == role]
        return min(found, key=lambda name: contestants[name]["seconds"], default=None)

    best = fastest("ours")
    if best is None:
        return {}
    ours = contestants[best]
    out: dict[str, Any] = {"best_ours": best}
    if share := _share(ours["executed_training_flops"], ours["training_seconds"], peaks, ours["precision"]):
        out["gemm_share"] = share
    if peer := fastest("peer"):
        out |= {"ratio_best_peer": contestants[peer]["seconds"] / ours["seconds"], "best_peer": peer}
    if authors := fastest("authors"):
        out["ratio_authors"] = contestants[authors]["seconds"] / ours["seconds"]
    scored = {name: made["accuracy"] for name, made in contestants.items() if made["role"] != "ours"}
    ahead = {name: share - ours["accuracy"] for name, share in scored.items() if None not in (share, ours["accuracy"])}
    if ahead and ours["accuracy_error"] is not None:
        out |= {"accuracy_holds": max(ahead.values()) <= ours["accuracy_error"], "accuracy_ahead": ahead}
    if peer:
        theirs, own = contestants[peer]["accuracies"], ours["accuracies"]
        if len(both := sorted(theirs.keys() & own.keys())) > 1:
            mean, error = _mean_and_error([theirs[seed] - own[seed] for seed in both])
            out["accuracy_difference"] = {"seeds": both, "mean": mean, "error": error}
    return out
