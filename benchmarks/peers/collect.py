"""The measurements of a comparison -> one table in JSON."""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks import watch
from benchmarks.peers.bench import CONFIG, CONTESTANTS, Bench
from benchmarks.peers.flops import executed_by_ours, useful
from benchmarks.peers.subject import shape_of
from benchmarks.scaling.model import Shape
from pkd_dist.config.load import load
from pkd_dist.config.schema import Config
from pkd_dist.data import tasks, text
from pkd_dist.data.tokens import TokenSet, tokenize
from pkd_dist.model.encoder import load_config, load_tokenizer

VERSIONS = ("torch", "transformers", "deepspeed", "accelerate", "textbrewer", "numpy")


def collect(bench: Bench) -> dict[str, Any]:
    """What is measured so far. Ratios and shares are absent where what they compare is not measured."""
    config = load(CONFIG, bench.overrides(bench.seeds[0]))
    tokens, shapes = _tokens(bench, config), _shapes(bench, config)
    peaks = _peaks(bench)
    work = {"tokens": len_tokens(tokens), "examples": len(tokens), "epochs": config.train.epochs}
    needed = sum(useful(*shapes, tokens, config.train.epochs))
    out: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": {
            "processor": watch.processor(), "cores": watch.cores(), "device": _device(bench),
            "versions": {"python": platform.python_version()} | _versions(),
        },
        "settings": {
            **work, "seeds": list(bench.seeds), "batch_size": config.train.batch_size,
            "learning_rate": config.train.learning_rate, "student_layers": config.student.layers,
            "teacher_layers": shapes[0].layers, "hidden_size": shapes[0].hidden, "slow_steps": bench.slow_steps,
            "max_length": config.task.max_length, "data": config.task.data,
        },
        "peak_flops_per_second": peaks,
        "useful_flops": needed,
        "contestants": {},
    }  # fmt: skip
    for name in CONTESTANTS:
        if found := _contestant(bench, name, config, tokens, shapes):
            found["useful_share"] = _share(needed, found["seconds"], peaks, found["precision"])
            found["executed_share"] = _share(found["executed_flops"], found["seconds"], peaks, found["precision"])
            out["contestants"][name] = found
    return out | _engine(bench) | _teacher(bench) | _job(bench) | _ratios(out["contestants"], peaks)


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _device(bench: Bench) -> str:
    return torch.cuda.get_device_name() if bench.device == "cuda" else "cpu"


def len_tokens(tokens: TokenSet) -> int:
    return int(tokens.offsets_N1[-1])


def _tokens(bench: Bench, config: Config) -> TokenSet:
    task = tasks.resolve(config.task)
    split = text.read(config.task.data, "train", task, task.classes)
    return tokenize(split, load_tokenizer(str(bench.teacher)), config.task.max_length, bench.output / "tokens")


def _shapes(bench: Bench, config: Config) -> tuple[Shape, Shape]:
    """Of teacher and student."""
    teacher, student = load_config(str(bench.teacher)), load_config(str(bench.teacher))
    student.num_hidden_layers = len(config.student.layers or ())
    return shape_of(teacher), shape_of(student)


def _read(bench: Bench, name: str, whole: bool) -> list[dict[str, Any]]:
    files = (bench.file(name, seed, whole) for seed in bench.seeds)
    return [json.loads(path.read_text()) for path in files if path.exists()]


def _peaks(bench: Bench) -> dict[str, float]:
    rounds = _read(bench, "peaks", False)
    return {
        dtype: statistics.median(found[dtype] for found in rounds) for dtype in ("float32", "bfloat16") if rounds
    }  # fmt: skip


def _share(flops: float, seconds: float, peaks: dict[str, float], precision: str) -> float | None:
    return flops / seconds / peaks[precision] if precision in peaks else None


def _contestant(
    bench: Bench, name: str, config: Config, tokens: TokenSet, shapes: tuple[Shape, Shape]
) -> dict[str, Any] | None:
    contestant = CONTESTANTS[name]
    rounds = _read(bench, name, bench.whole(name))
    if not rounds:
        return None
    total = len_tokens(tokens) * config.train.epochs
    if contestant.role == "ours":
        each = [sum(found["seconds"].values()) for found in rounds]
        teacher = [found["seconds"]["cache"] for found in rounds]
        training = [found["training_seconds"] for found in rounds]
        executed = executed_by_ours(*shapes, tokens, config, rounds[0]["ranks"])
    else:
        # of several ranks the first one counts, which has its share of every batch
        scale = [total / (found["tally"]["tokens"] * found["ranks"]) for found in rounds]
        teacher = [
            found["teacher_seconds"] * len(tokens) / found["teacher_rows"] if found["teacher_rows"] else 0.0
            for found in rounds
        ]
        training = [found["training_seconds"] * s for found, s in zip(rounds, scale, strict=True)]
        each = [a + b for a, b in zip(teacher, training, strict=True)]
        first, ranks = rounds[0], rounds[0]["ranks"]
        pass_flops = first["teacher_flops"] * len(tokens) / first["teacher_rows"] if first["teacher_rows"] else 0.0
        executed = (pass_flops, first["tally"]["flops"] * ranks * scale[0])
    seconds = statistics.median(each)
    return {
        "title": contestant.title, "role": contestant.role,
        "precision": rounds[0].get("precision", contestant.precision),
        "ranks": rounds[0]["ranks"],
        "threads": rounds[0]["threads"], "measured": "whole" if bench.whole(name) else f"{bench.slow_steps} steps",
        "seconds": seconds, "seconds_each": each, "teacher_seconds": statistics.median(teacher),
        "training_seconds": statistics.median(training),
        "samples_per_second": len(tokens) * config.train.epochs / seconds,
        "command_seconds": statistics.median(found["command_seconds"] for found in rounds) if bench.whole(name) else None,
        "peak_bytes": max(found["peak_bytes"] for found in rounds),
        "largest_process_bytes": max(found["largest_process_bytes"] for found in rounds),
        "executed_flops": sum(executed), "executed_training_flops": executed[1],
        "waiting_share": [found["waiting_share"] for found in rounds],
        **_accuracy(_read(bench, contestant.scored_by or name, True)), "scored_by": contestant.scored_by,
    }  # fmt: skip


def _accuracy(wholes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each seed's best epoch: mean and its standard error over seeds (None for one seed)."""
    best = [max(found["accuracies"]) for found in wholes]
    if not best:
        return {"accuracy": None, "accuracy_error": None, "accuracies": []}
    error = statistics.stdev(best) / math.sqrt(len(best)) if len(best) > 1 else None
    return {"accuracy": statistics.fmean(best), "accuracy_error": error, "accuracies": best}


def _engine(bench: Bench) -> dict[str, Any]:
    rounds = _read(bench, "engine", False)
    if not rounds:
        return {}
    overhead = {way: statistics.median(found["overhead"][way] for found in rounds) for way in rounds[0]["overhead"]}
    return {
        "engine_overhead": overhead["engine"],
        "engine": {
            "overhead": overhead, "overhead_each": [found["overhead"] for found in rounds],
            "step_seconds": {
                way: statistics.median(found["step_seconds"][way] for found in rounds) for way in overhead
            },
            "precision": rounds[0]["precision"], "zero_stage": rounds[0]["zero_stage"],
            "threads": rounds[0]["threads"], "waiting_share": [found["waiting_share"] for found in rounds],
        },
    }  # fmt: skip


def _teacher(bench: Bench) -> dict[str, Any]:
    rounds = _read(bench, "teacher", False)
    if not rounds:
        return {}
    seconds = statistics.median(second for found in rounds for second in found["seconds"])
    peak = statistics.median(found["peak_flops_per_second"] for found in rounds)
    made = {key: rounds[0][key] for key in ("precision", "examples", "batches", "flops")}
    return {"teacher_pass": {**made, "seconds": seconds, "gemm_share": made["flops"] / seconds / peak}}


def _job(bench: Bench) -> dict[str, Any]:
    rounds = _read(bench, "job", False)
    if not rounds:
        return {}
    stages = {name: statistics.median(found["stages"][name] for found in rounds) for name in rounds[0]["stages"]}
    each = [sum(found["stages"].values()) for found in rounds]
    command = statistics.median(found["command_seconds"] for found in rounds)
    return {
        "job": {"stages": stages, "seconds": statistics.median(each), "seconds_each": each, "command_seconds": command}
    }


def _ratios(contestants: dict[str, dict[str, Any]], peaks: dict[str, float]) -> dict[str, Any]:
    """Ours, at its best number of ranks, against the fastest peer and the authors' computation."""
    by_role = {
        role: {name: made for name, made in contestants.items() if made["role"] == role}
        for role in ("ours", "peer", "authors")
    }
    if not by_role["ours"]:
        return {}

    def fastest(role: str) -> str | None:
        return min(by_role[role], key=lambda name: by_role[role][name]["seconds"], default=None)

    best = fastest("ours")
    assert best is not None
    ours = by_role["ours"][best]
    out: dict[str, Any] = {"best_ours": best}
    share = _share(ours["executed_training_flops"], ours["training_seconds"], peaks, ours["precision"])
    if share is not None:
        out["gemm_share"] = share
    for role, key in (("peer", "ratio_best_peer"), ("authors", "ratio_authors")):
        if other := fastest(role):
            out[key] = by_role[role][other]["seconds"] / ours["seconds"]
            if role == "peer":
                out["best_peer"] = other
    behind = {
        name: made["accuracy"] - ours["accuracy"]
        for name, made in contestants.items()
        if made["role"] != "ours" and made["accuracy"] is not None and ours["accuracy"] is not None
    }
    if behind and ours["accuracy_error"] is not None:
        out["accuracy_holds"] = max(behind.values()) <= ours["accuracy_error"]
        out["accuracy_ahead"] = behind
    return out
