"""Dropout on a CPU: 15 random bits for each element and integer arithmetic, instead of one `bernoulli_` after the other."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import nn

_BITS = 15


class CpuDropout(nn.Dropout):
    """nn.Dropout with a faster random number generator on a CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.device.type != "cpu" or not self.training:
            return super().forward(input)
        return drop(input, self.p)


def drop(x: torch.Tensor, p: float) -> torch.Tensor:
    """Return a CPU tensor with each element dropped with probability p and the others scaled; `x` itself if p is 0."""
    return x * dropout_mask(tuple(x.shape), p, x.dtype) if p else x


def dropout_mask(
    shape: tuple[int, ...], p: float, dtype: torch.dtype, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return the tensor that dropout multiplies by: 0 with probability p (on a CPU in steps of 2**-15), else 1 / (1 - p).

    Args:
        generator: On its device; None: torch's default one of the CPU, so that `torch.manual_seed` determines the mask.
    """
    if generator is not None and generator.device.type != "cpu":
        return (torch.rand(shape, generator=generator, device=generator.device) >= p).to(dtype).mul_(1 / (1 - p))
    count, seed = math.prod(shape), int(torch.randint(2**62, (), generator=generator))
    bits = torch.from_numpy(np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.int16))[:count].view(shape)
    bits &= 2**_BITS - 1
    keep = torch.rsub(bits, round(p * 2**_BITS) - 1)  # negative: kept
    keep >>= _BITS  # all bits set, or none
    if dtype != torch.bfloat16:
        return keep.to(dtype).mul_(-1 / (1 - p))
    keep &= _bfloat16_bits(1 / (1 - p))
    return keep.view(dtype)


@functools.cache
def _bfloat16_bits(number: float) -> int:
    return int(torch.tensor(number, dtype=torch.bfloat16).view(torch.int16))
