"""Scoring: logits of exactly n examples whatever the ranks and batches, task metrics, size and speed, and teacher
against student."""

from __future__ import annotations

import math
import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pkd_dist.data.batches import collate, scoring_batches
from pkd_dist.data.tasks import Task
from pkd_dist.data.text import is_labelled
from pkd_dist.data.tokens import TokenSet
from pkd_dist.dist import World
from pkd_dist.model.encoder import accepted, parameter_count
from pkd_dist.telemetry.progress import Bar

Forward = Callable[[dict[str, torch.Tensor]], torch.Tensor]


@contextmanager
def evaluating(module: nn.Module) -> Any:
    """Evaluation mode without gradients; the mode of before is put back."""
    mode = module.training
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        module.train(mode)


def predict(
    forward: Forward,
    tokens: TokenSet,
    world: World,
    batch_size: int,
    pad_id: int,
    tick: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """Logits of every example, on every rank; collective.

    Args:
        forward: a Hugging Face model's inputs -> logits_BC.
        tick: told of the examples done.

    Returns:
        (N, C) float32 in the order of the token set.

    Raises:
        Preempted: a rank has got a stop signal; nothing is kept.
    """
    mine = scoring_batches(tokens, batch_size, world.rank, world.size)
    logits: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    # Where a forward pass is collective (ZeRO 3), all ranks must do the same number, and stop at the same one.
    for i in range(-(-len(tokens) // (world.size * batch_size)) if len(tokens) else 0):
        world.stop_here("in an evaluation")
        rows_B = mine[i] if i < len(mine) else np.zeros(1, np.int64)
        batch = collate(tokens, rows_B, np.ones(len(rows_B)), pad_id).to(world.device)
        out = forward(batch.inputs).float().cpu().numpy()
        if i < len(mine):
            logits.append(out)
            positions.append(rows_B)
            tick(len(rows_B))
    width = max(world.gather(logits[0].shape[1] if logits else 0))
    rows = np.concatenate(logits) if logits else np.empty((0, width), np.float32)
    return world.gather_rows(rows, np.concatenate(positions) if positions else np.empty(0, np.int64), len(tokens))


def answers(forward: Callable[[Any], Any], tokens: TokenSet, batch_size: int, pad_id: int) -> np.ndarray:
    """`predict` without other ranks, of any function that gives logits on the CPU: (N, C) float32."""
    out: list[np.ndarray] = []
    batches = scoring_batches(tokens, batch_size, 0, 1)
    for rows_B in batches:
        out.append(np.asarray(forward(collate(tokens, rows_B, np.ones(len(rows_B)), pad_id).inputs), np.float32))
    order_N = np.concatenate(batches)
    return np.concatenate(out)[np.argsort(order_N)]


def score(logits_NC: np.ndarray, labels_N: np.ndarray, task: Task) -> dict[str, float]:
    """The metrics of `results_eval.json`: accuracy, MCC, precision, recall, f_1 (of `task.positive`; macro beyond two
    classes), or pearson and spearman and their mean for a regression; `main_metric` is the one that chooses the best epoch.

    A correlation that is not defined (constant predictions) counts as 0.
    """
    if task.regression:
        from scipy.stats import pearsonr, spearmanr  # slow to import, so only where a rank scores

        predicted = logits_NC[:, 0].astype(np.float64)
        constant = len(predicted) < 2 or np.ptp(predicted) == 0 or np.ptp(labels_N) == 0
        pearson = 0.0 if constant else float(pearsonr(predicted, labels_N).statistic)
        spearman = 0.0 if constant else float(spearmanr(predicted, labels_N).statistic)
        out = {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}
    else:
        from sklearn import metrics as sk

        predicted = logits_NC.argmax(axis=1)
        average: Any = "binary" if logits_NC.shape[1] == 2 else "macro"
        precision, recall, f_1, _ = sk.precision_recall_fscore_support(
            labels_N, predicted, average=average, pos_label=task.positive, zero_division=0
        )
        out = {
            "accuracy": float(sk.accuracy_score(labels_N, predicted)),
            "MCC": float(sk.matthews_corrcoef(labels_N, predicted)),
            "precision": float(precision),
            "recall": float(recall),
            "f_1": float(f_1),
        }
    return out | {"main_metric": out[task.main_metric]}


def scores(logits_NC: np.ndarray, tokens: TokenSet, task: Task) -> dict[str, Any]:
    """`score` of a labelled split, with the 95% interval of an accuracy."""
    out: dict[str, Any] = score(logits_NC, np.asarray(tokens.labels_N), task)
    if "accuracy" in out:
        out["accuracy_interval_95"] = list(interval(out["accuracy"], len(tokens)))
    return out


def interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n examples."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def agreement(a_NC: np.ndarray, b_NC: np.ndarray) -> float:
    """Share of examples of which both predict the same class; for a regression the correlation of the two (0 where
    one of them is constant)."""
    if a_NC.shape[1] == 1:
        constant = np.ptp(a_NC) == 0 or np.ptp(b_NC) == 0
        return 0.0 if constant else float(np.corrcoef(a_NC[:, 0], b_NC[:, 0])[0, 1])
    return float((a_NC.argmax(axis=1) == b_NC.argmax(axis=1)).mean())


@dataclass(frozen=True)
class Timing:
    """How fast one model was.

    Attributes:
        latencies_ms_R: (R,) float64, of each request of one sentence, in the order they were made.
        rates: samples per second at the batch size, of each pass.
    """

    latencies_ms_R: np.ndarray
    rates: list[float]

    @property
    def figures(self) -> dict[str, float]:
        """`latency_ms_p50`, `latency_ms_p99` (batch 1), `reasoningTime` (samples per second; the median pass)."""
        return {
            "latency_ms_p50": float(np.percentile(self.latencies_ms_R, 50)),
            "latency_ms_p99": float(np.percentile(self.latencies_ms_R, 99)),
            "reasoningTime": float(np.median(self.rates)),
        }


def speed(
    forwards: Mapping[str, Forward],
    tokens: TokenSet,
    device: torch.device,
    batch_size: int,
    requests: int,
    examples: int,
    pad_id: int,
    repeats: int = 3,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Latency and throughput of several models on the same inputs, interleaved so that drift hits all alike.

    Args:
        forwards: name -> forward.
        requests: of single sentences, timed for each, at the lengths of the real text.
        examples: about so many are timed in batches of `batch_size`.
        repeats: passes over those.
        check: called before each request; what it raises ends the measurement.
    """

    def timed(forward: Forward, inputs: dict[str, torch.Tensor]) -> float:
        check()
        start = time.perf_counter()
        forward(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    rng = np.random.default_rng(0)
    singles = [
        collate(tokens, rng.integers(len(tokens), size=1), np.ones(1), pad_id).to(device).inputs
        for _ in range(requests)
    ]
    every = scoring_batches(tokens, batch_size, 0, 1)
    full = every[: len(tokens) // batch_size] or every
    apart = -(-len(full) * batch_size // examples)
    rows = full[(min(apart, len(full)) - 1) // 2 :: apart]  # from long to short; one alone is the middle one
    batches = [collate(tokens, r, np.ones(len(r)), pad_id).to(device).inputs for r in rows]
    for forward in forwards.values():  # warm-up
        for inputs in [*singles[:5], batches[0]]:
            forward(inputs)
    latency: dict[str, list[float]] = {name: [] for name in forwards}
    for inputs in singles:
        for name, forward in forwards.items():
            latency[name].append(timed(forward, inputs) * 1e3)
    seconds: dict[str, list[float]] = {name: [0.0] * repeats for name in forwards}
    for repeat in range(repeats):
        for inputs in batches:
            for name, forward in forwards.items():
                seconds[name][repeat] += timed(forward, inputs)
    total = sum(len(r) for r in rows)
    return {name: Timing(np.asarray(latency[name]), [total / each for each in seconds[name]]) for name in forwards}


def machine() -> dict[str, Any]:
    """What figures of speed were taken on: `processor`, and `cores` of this process."""
    try:
        names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return {
        "processor": (names or [platform.processor() or platform.machine()])[0],
        "cores": len(os.sched_getaffinity(0)),
    }


def figures_of(model: Any) -> dict[str, Any]:
    """What is said of a model beside its metrics and its speed."""
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
    return {"parameters": parameter_count(model), "modelSize": size}


def compare(
    models: dict[str, Any],
    splits: dict[str, TokenSet],
    task: Task,
    world: World,
    batch_size: int,
    requests: int,
    examples: int,
    pad_id: int,
) -> tuple[dict[str, Any], dict[str, Timing], dict[str, dict[str, np.ndarray]]]:
    """Scores teacher and student in float32 and times them, interleaved, on rank 0 with all of its node's cores.

    Args:
        models: `teacher` and `student`.
        splits: name -> examples; `dev` gives the main figures and the inputs that are timed. Those without labels are
            answered, not scored.
        requests, examples: see `speed`.

    Returns:
        The content of `results_eval.json`; the timings of both; and of each split the logits of both, (N, C) float32.
    """
    forwards: dict[str, Any] = {}
    logits: dict[str, dict[str, np.ndarray]] = {split: {} for split in splits}
    for name, model in models.items():
        model.to(world.device)
        forwards[name] = lambda inputs, model=model: model(**accepted(model, inputs)).logits
        rows = sum(map(len, splits.values()))
        with (
            evaluating(model),
            Bar(f"evaluate, {name}, rows of this rank", rows // world.size, show=world.main) as bar,
        ):
            for split, tokens in splits.items():
                logits[split][name] = predict(forwards[name], tokens, world, batch_size, pad_id, bar.advance)

    def judge() -> dict[str, dict[str, Any]]:
        """split -> `n`, the scores of both, and how far they agree."""
        return {
            split: {
                "n": len(tokens),
                **{name: scores(logits[split][name], tokens, task) for name in models},
                "agreement": agreement(logits[split]["teacher"], logits[split]["student"]),
            }
            for split, tokens in splits.items()
            if split not in unlabelled
        }

    def measure() -> dict[str, Timing]:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
        try:
            with torch.inference_mode():
                interrupt = partial(world.interrupt, "in an evaluation")
                return speed(
                    forwards, splits["dev"], world.device, batch_size, requests, examples, pad_id, check=interrupt
                )
        finally:
            torch.set_num_threads(threads)

    unlabelled = {split for split, tokens in splits.items() if not is_labelled(tokens.labels_N).all()}
    judged = world.on_main(judge)
    timings = world.on_main(measure)
    dev = judged.pop("dev")
    teacher, pupil = (
        {**dev[name], **figures_of(models[name]), **timings[name].figures} for name in ("teacher", "student")
    )
    results = {
        "task": task.name,
        "split": "dev",
        "n": dev["n"],
        **{
            k: v
            for k, v in pupil.items()
            if k not in ("parameters", "latency_ms_p50", "latency_ms_p99", "accuracy_interval_95")
        },
        "teacher": teacher,
        "student": pupil,
        "compression": {
            "parameters": teacher["parameters"] / pupil["parameters"],
            "size": teacher["modelSize"] / pupil["modelSize"],
            "throughput": pupil["reasoningTime"] / teacher["reasoningTime"],
            "retention": pupil["main_metric"] / teacher["main_metric"] if teacher["main_metric"] else 0.0,
            "agreement": dev["agreement"],
        },
        "splits": judged,
    }
    return results, timings, logits
