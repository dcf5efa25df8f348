"""Scoring: logits of exactly n examples whatever the ranks and batches, task metrics, size and speed, and teacher
against student."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pkd_dist.data.batches import collate, scoring_batches
from pkd_dist.data.tokens import TokenSet
from pkd_dist.evaluation.scoring import Forward


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
