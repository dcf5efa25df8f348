"""FLOPs: the peak of the machine, the work that the task needs, and the work that our run does.

FLOPs of matrix products are counted from shapes (`benchmarks.scaling.model.Shape.forward_flops`); a backward pass counts
as two forward passes. *Executed* is what a contestant computes, padding included. *Useful* is what the task needs in any
implementation: each sentence once through the teacher and once per epoch through the student, without padding, with the
last layers for [CLS] only.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from benchmarks.scaling.model import Shape
from pkd_dist.config.schema import Config
from pkd_dist.data.batches import MULTIPLE, TrainingBatches
from pkd_dist.data.tokens import TokenSet

_SIZES = ((1024, 384, 1536), (2048, 2048, 2048), (4096, 4096, 4096), (1024, 768, 3072))
LONGEST_SECONDS = 5.0
"""Sizes for which one product would take longer are skipped."""


def peak(dtype: torch.dtype, device: torch.device | None = None, seconds: float = 0.4) -> float:
    """Return the FLOP/s of matrix products on all threads or a GPU: the best of some sizes, each tried for `seconds`."""
    device, best = device or torch.device("cpu"), 0.0
    for m, k, n in _SIZES:
        if best and 2 * m * k * n / best > LONGEST_SECONDS:
            continue  # a CPU without bfloat16 instructions would take minutes
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        out, until = a @ b, time.perf_counter() + seconds
        while time.perf_counter() < until:
            start = time.perf_counter()
            for _ in range(4):
                torch.mm(a, b, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, 4 * 2 * m * k * n / (time.perf_counter() - start))
    return best


def peaks(device: torch.device) -> dict[str, float]:
    return {name: peak(getattr(torch, name), device) for name in ("float32", "bfloat16")}


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
