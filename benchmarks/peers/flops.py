"""What the machine can multiply, and what ours does.

Products are counted, 2 per multiply-add, from shapes (`benchmarks.scaling.model.Shape.forward_flops`); a backward pass
is worth two forward passes. *Executed* is what a contestant computes, padding included. *Useful* is what the task needs
whoever does it: each sentence once through the teacher and in every epoch through the student, without padding, the last
layer of both for [CLS] alone, since nothing else of it is used.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np
import torch

from benchmarks.scaling.model import Shape
from pkd_dist.config.schema import Config
from pkd_dist.data.batches import MULTIPLE, TrainingBatches
from pkd_dist.data.tokens import TokenSet

_SIZES = ((1024, 384, 1536), (2048, 2048, 2048), (4096, 4096, 4096), (1024, 768, 3072))
_SECONDS = 0.4


def peak(dtype: torch.dtype, device: torch.device | None = None, seconds: float = _SECONDS) -> float:
    """FLOP/s of matrix products on all threads (or a GPU): the best over some sizes, each tried for `seconds`."""
    device = device or torch.device("cpu")
    best = 0.0
    for m, k, n in _SIZES:
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        out = a @ b
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            start = time.perf_counter()
            for _ in range(4):
                torch.mm(a, b, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, 4 * 2 * m * k * n / (time.perf_counter() - start))
    return best


def _by_length(shape: Shape, lengths: Iterable[int], lean: bool = True) -> float:
    values, counts = np.unique(np.asarray(lengths), return_counts=True)
    return sum(int(n) * shape.forward_flops(1, int(length), lean) for length, n in zip(values, counts, strict=True))


def useful(teacher: Shape, student: Shape, tokens: TokenSet, epochs: int) -> tuple[float, float]:
    """FLOPs of the teacher's pass and of `epochs` epochs of the student."""
    lengths = tokens.lengths_N
    return _by_length(teacher, lengths), 3 * epochs * _by_length(student, lengths)


def executed_by_ours(
    teacher: Shape, student: Shape, tokens: TokenSet, config: Config, ranks: int
) -> tuple[float, float]:
    """FLOPs of the same parts as a run of ours executes them, from the batches that it makes."""
    rounded = -(-tokens.lengths_N // MULTIPLE) * MULTIPLE  # its batches are sorted
    training = 0.0
    for rank in range(ranks):
        batches = TrainingBatches(
            tokens, config.train.batch_size, config.train.micro_batch_size, config.run.seed, rank, ranks, 0
        )
        for epoch in range(config.train.epochs):
            order = batches.order(epoch)
            for step in range(batches.steps):
                for batch in batches.step(order, step):
                    training += 3 * student.forward_flops(*batch.input_ids_BL.shape)
    return _by_length(teacher, rounded), training
