"""Latency and throughput of models, timed in turn on the same inputs."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch

from pkd_dist.config.schema import Evaluate
from pkd_dist.data.batches import collate, scoring_batches
from pkd_dist.data.tokens import TokenSet
from pkd_dist.evaluation.results import Speed
from pkd_dist.evaluation.scoring import Inputs

Timed = Callable[[Inputs], object]
"""A forward pass whose output does not matter."""
_BLOCK = 20
"""Requests that a model answers before it is the next one's turn: as in a server, its weights are in the caches for most of them."""


@contextmanager
def timing_threads(default: int) -> Iterator[int]:
    """Let PyTorch use the threads that the user allows (OMP_NUM_THREADS), else `default`, and yield their number."""
    before, allowed = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    threads = int(allowed) if allowed.isdecimal() and int(allowed) > 0 else default
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Timing:
    """How fast one model was.

    Attributes:
        latencies_ms_R: (R,) float64, of each request of one sentence, in order.
        rates: Samples per second of each pass over the batches.
        threads: Of the CPU; 0 on a GPU.
    """

    latencies_ms_R: np.ndarray
    rates: list[float]
    threads: int

    @property
    def figures(self) -> Speed:
        """Summarize the timing."""
        rate = float(np.median(self.rates))
        return {
            "latency_ms_p50": float(np.percentile(self.latencies_ms_R, 50)),
            "latency_ms_p99": float(np.percentile(self.latencies_ms_R, 99)),
            "samples_per_second": rate,
            "reasoningTime": rate,
            "spread": float((max(self.rates) - min(self.rates)) / rate),
            "threads": self.threads,
        }


@dataclass(frozen=True)
class TimedInputs:
    """Inputs that every model is timed on, on `device`.

    Attributes:
        requests: Single sentences, with the lengths of real text.
        batches: From long to short, full where there are enough examples.
        samples: Examples in all batches.
    """

    requests: list[Inputs]
    batches: list[Inputs]
    samples: int
    device: torch.device

    @classmethod
    def choose(
        cls,
        tokens: TokenSet,
        pad_id: int,
        device: torch.device,
        settings: Evaluate,
        ordered_as: TokenSet | None = None,
    ) -> TimedInputs:
        """Choose inputs among examples: the same ones for the same token set and settings.

        Args:
            ordered_as: The same examples in the tokens of another model, whose batches to form; None: `tokens`.
        """
        rng = np.random.default_rng(0)
        requests = [
            collate(tokens, rng.integers(len(tokens), size=1), np.ones(1), pad_id).to(device).inputs
            for _ in range(settings.latency_samples)
        ]
        batch_size = settings.batch_size
        every = scoring_batches(ordered_as or tokens, batch_size, 0, 1)
        full = every[: len(tokens) // batch_size] or every
        stride = -(-len(full) * batch_size // settings.throughput_samples)
        rows = full[(min(stride, len(full)) - 1) // 2 :: stride]  # a single one is the batch of median length
        batches = [collate(tokens, rows_B, np.ones(len(rows_B)), pad_id).to(device).inputs for rows_B in rows]
        return cls(requests, batches, sum(map(len, rows)), device)


def measure_speed(
    forwards: Mapping[str, Timed],
    inputs: TimedInputs,
    repeats: int = 3,
    check: Callable[[], None] = lambda: None,
    own_inputs: Mapping[str, TimedInputs] | None = None,
) -> dict[str, Timing]:
    """Time several models in turn, so that drift of the machine affects all alike.

    Args:
        own_inputs: The same examples for models that read other tokens, by name.
        repeats: Passes over the batches.
        check: Called before each forward pass; an exception it raises ends the measurement.
    """

    def seconds_of(forward: Timed, one: Inputs) -> float:
        check()
        start = time.perf_counter()
        forward(one)
        if inputs.device.type == "cuda":
            torch.cuda.synchronize(inputs.device)
        return time.perf_counter() - start

    given = {name: (own_inputs or {}).get(name, inputs) for name in forwards}
    for name, forward in forwards.items():  # warm-up
        for one in [*given[name].requests[:5], given[name].batches[0]]:
            forward(one)
    latencies_ms: dict[str, list[float]] = {name: [] for name in forwards}
    for start in range(0, len(inputs.requests), _BLOCK):
        for name, forward in forwards.items():
            requests = given[name].requests[start : start + _BLOCK]
            latencies_ms[name] += [seconds_of(forward, request) * 1e3 for request in requests]
    seconds: dict[str, list[float]] = {name: [0.0] * repeats for name in forwards}
    for repeat in range(repeats):
        for i in range(len(inputs.batches)):
            for name, forward in forwards.items():
                seconds[name][repeat] += seconds_of(forward, given[name].batches[i])
    threads = 0 if inputs.device.type == "cuda" else torch.get_num_threads()
    return {
        name: Timing(np.asarray(latencies_ms[name]), [inputs.samples / each for each in seconds[name]], threads)
        for name in forwards
    }


class Machine(TypedDict):
    """Where speed was measured; `cores` are those this process may use."""

    processor: str
    cores: int


def machine() -> Machine:
    """Describe this machine."""
    try:
        names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return {
        "processor": (names or [platform.processor() or platform.machine()])[0],
        "cores": len(os.sched_getaffinity(0)),
    }
