"""What an encoder layer does beside matrix products, on a CPU: attention, dropout with residual sum and LayerNorm, GELU.

Twice, with the same interface: `ByTorch` in PyTorch's operations, for any dtype; `Compiled` by the kernels of this
project, one pass over memory each, for products in bfloat16. The same computation but for rounding (`Compiled` keeps
float32 inside an operation) and for which elements dropout drops.

Each forward half returns what its backward half needs: tensors, and a number or two.

Shapes: B rows, L tokens, Q queries, A heads, d head size, H = A * d, T = B * L.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from pkd_dist.kernels.native import Kernels, kernels

_BITS = 15
_FEWEST_KEYS = 16  # softmax over fewer is done number by number
_VECTOR = 16  # that of kernels.c, which wants whole ones


def draw_seed() -> int:
    """From torch's default generator, so `torch.manual_seed` decides it."""
    return int(torch.randint(2**62, ()))


def dropout_mask(shape: tuple[int, ...], p: float, dtype: torch.dtype) -> torch.Tensor:
    """What dropout multiplies by: 0 with probability `p` (in steps of 2**-15), else 1 / (1 - p), on the CPU."""
    count = math.prod(shape)
    bits = torch.from_numpy(np.random.SFC64(draw_seed()).random_raw(-(-count // 4)).view(np.int16))[:count].view(shape)
    bits &= 2**_BITS - 1
    keep = torch.rsub(bits, round(p * 2**_BITS) - 1)  # below 0 where kept
    keep >>= _BITS  # all bits, or none
    if dtype != torch.bfloat16:
        return keep.to(dtype).mul_(-1 / (1 - p))
    keep &= _bits_of(1 / (1 - p))
    return keep.view(dtype)


@functools.cache
def _bits_of(number: float) -> int:
    return int(torch.tensor(number, dtype=torch.bfloat16).view(torch.int16))


class Kept(NamedTuple):
    """What a backward half needs of its forward half."""

    tensors: list[Any]
    numbers: tuple[Any, ...] = ()


class Parts(Protocol):
    """Beside products, a layer in the dtype of products (low) and that of its states (wide)."""

    def attend(
        self, q_BQAd: torch.Tensor, k_BLAd: torch.Tensor, v_BLAd: torch.Tensor, mask_B1L: torch.Tensor | None,
        scale: float, p: float,
    ) -> tuple[torch.Tensor, torch.Tensor, Kept]:  # fmt: skip
        """What each query takes of the values, (B, Q, A, d), low, and the sums (B, A, Q) of its shares, which are 1 but for
        dropout. `mask_B1L`: low, to add to the scores; `scale`: of the scores; `p`: dropout of the shares. The keys may
        be the values."""

    def attend_backward(
        self, kept: Kept, grad_BQAd: torch.Tensor, grad_sums_BAQ: torch.Tensor | None, into: Sequence[torch.Tensor]
    ) -> None:
        """Writes the gradients of queries, keys and values, low; of keys that are the values, into the place of the keys,
        that of both. `grad_sums_BAQ`: float32, or None for zeros."""

    def add_norm(
        self, residual_TH: torch.Tensor, x_TH: torch.Tensor, p: float, gain: torch.Tensor, bias: torch.Tensor,
        epsilon: float, learns: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, Kept]:  # fmt: skip
        """LayerNorm of residual + dropout(x), wide and low. May write into `x_TH`. `learns`: a backward half follows."""

    def add_norm_backward(
        self, kept: Kept, grad_TH: torch.Tensor, more_TH: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of the residual (wide), x (low), gain, bias; of the output they are `grad_TH` + `more_TH` (low)."""

    def gelu(self, x_TF: torch.Tensor, learns: bool) -> tuple[torch.Tensor, Kept]:
        """GELU, low. `learns`: a backward half follows."""

    def gelu_backward(self, kept: Kept, grad_TF: torch.Tensor) -> torch.Tensor:
        """Gradient of x, low; may be written into `grad_TF`."""


def parts_for(low: torch.dtype, wide: torch.dtype, hidden: int, head: int, learns: bool) -> Parts:
    """The compiled ones where they fit: they take gradients in float32 alone. (Were a pure bfloat16 model's forward pass
    repeated to save memory, both passes would have to be told the same `learns`.)"""
    fit = low == torch.bfloat16 and (wide == torch.float32 or (wide == low and not learns))
    compiled = kernels() if fit and head % _VECTOR == 0 and hidden % _VECTOR == 0 else None
    return ByTorch(low) if compiled is None else Compiled(compiled)


def _float32(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


@functools.cache
def _gelu_table() -> torch.Tensor:
    """int32 (2**16,): of the bits of each bfloat16, GELU's in the lower half and its slope's in the upper."""
    x = torch.arange(2**16, dtype=torch.int32, device="cpu").to(torch.int16).view(torch.bfloat16).double()
    slope = torch.ops.aten.gelu_backward(torch.ones_like(x), x)
    both = torch.stack([F.gelu(x), slope], -1).bfloat16()
    return both.view(torch.int32).flatten()  # little-endian


class Compiled:
    """By `kernels.c`."""

    def __init__(self, run: Kernels):
        self._run = run

    def attend(
        self, q_BQAd: torch.Tensor, k_BLAd: torch.Tensor, v_BLAd: torch.Tensor, mask_B1L: torch.Tensor | None,
        scale: float, p: float,
    ) -> tuple[torch.Tensor, torch.Tensor, Kept]:  # fmt: skip
        (B, Q, A, d), L = q_BQAd.shape, k_BLAd.shape[1]
        mask_B1L = None if mask_B1L is None else mask_B1L.expand(B, 1, L).contiguous()
        seed = draw_seed() if p else 0
        context_BQAd, rows_BAQ3 = q_BQAd.new_empty(B, Q, A, d), _float32(B, A, Q, 3)
        self._run.attend(q_BQAd, k_BLAd, v_BLAd, mask_B1L, p, seed, scale, B, Q, L, A, d, context_BQAd, rows_BAQ3)
        return context_BQAd, rows_BAQ3[..., 2], Kept([q_BQAd, k_BLAd, v_BLAd, mask_B1L, rows_BAQ3], (scale, p, seed))

    def attend_backward(
        self, kept: Kept, grad_BQAd: torch.Tensor, grad_sums_BAQ: torch.Tensor | None, into: Sequence[torch.Tensor]
    ) -> None:
        (q_BQAd, k_BLAd, v_BLAd, mask_B1L, rows), (scale, p, seed) = kept
        (B, Q, A, d), L = q_BQAd.shape, k_BLAd.shape[1]
        self._run.attend_backward(
            q_BQAd, k_BLAd, v_BLAd, mask_B1L, p, seed, scale, B, Q, L, A, d, rows, grad_BQAd, grad_sums_BAQ, *into
        )

    def add_norm(
        self, residual_TH: torch.Tensor, x_TH: torch.Tensor, p: float, gain: torch.Tensor, bias: torch.Tensor,
        epsilon: float, learns: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, Kept]:  # fmt: skip
        T, H = x_TH.shape
        narrow = residual_TH.dtype == x_TH.dtype
        seed, gain, bias = draw_seed() if p else 0, gain.float(), bias.float()
        total, mean, rstd = (_float32(T, H), _float32(T), _float32(T)) if learns else (None, None, None)
        low_TH, out_TH = torch.empty_like(x_TH), None if narrow else _float32(T, H)
        self._run.add_norm(
            residual_TH, narrow, x_TH, p, seed, gain, bias, epsilon, T, H, total, mean, rstd, out_TH, low_TH
        )
        return low_TH if out_TH is None else out_TH, low_TH, Kept([total, mean, rstd, gain], (p, seed))

    def add_norm_backward(
        self, kept: Kept, grad_TH: torch.Tensor, more_TH: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        (total, mean, rstd, gain), (p, seed) = kept
        T, H = grad_TH.shape
        residual, x = _float32(T, H), grad_TH.new_empty(T, H, dtype=torch.bfloat16)
        into_gain, into_bias = _float32(H), _float32(H)
        self._run.add_norm_backward(
            grad_TH, more_TH, p, seed, gain, total, mean, rstd, T, H, residual, x, into_gain, into_bias
        )
        return residual, x, into_gain, into_bias

    def gelu(self, x_TF: torch.Tensor, learns: bool) -> tuple[torch.Tensor, Kept]:
        active_TF, slope_TF = torch.empty_like(x_TF), torch.empty_like(x_TF) if learns else None
        self._run.look_up(x_TF, x_TF.numel(), _gelu_table(), active_TF, slope_TF)
        return active_TF, Kept([slope_TF])

    def gelu_backward(self, kept: Kept, grad_TF: torch.Tensor) -> torch.Tensor:
        return grad_TF.mul_(kept.tensors[0])


class ByTorch:
    """By PyTorch's operations.

    Args:
        low: the dtype of products.
    """

    def __init__(self, low: torch.dtype):
        self._low, self._exact = low, torch.promote_types(low, torch.float32)

    def attend(
        self, q_BQAd: torch.Tensor, k_BLAd: torch.Tensor, v_BLAd: torch.Tensor, mask_B1L: torch.Tensor | None,
        scale: float, p: float,
    ) -> tuple[torch.Tensor, torch.Tensor, Kept]:  # fmt: skip
        (B, Q, A, _), L = q_BQAd.shape, k_BLAd.shape[1]
        keys = max(L, _FEWEST_KEYS)
        q, k, v = _by_head(q_BQAd, Q), _by_head(k_BLAd, keys), _by_head(v_BLAd, keys)
        if keys > L:
            mask_B1L = q_BQAd.new_zeros(B, 1, L) if mask_B1L is None else mask_B1L
            mask_B1L = F.pad(mask_B1L, (0, keys - L), value=torch.finfo(self._low).min)
        if mask_B1L is None:
            scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
        else:
            added = mask_B1L[:, None].expand(B, A, 1, keys).reshape(-1, 1, keys).expand(-1, Q, keys)
            scores = torch.baddbmm(added, q, k.transpose(1, 2), alpha=scale)
        share = torch.softmax(scores.to(self._exact), -1).to(self._low)
        mask = dropout_mask(tuple(share.shape), p, self._low) if p else None
        dropped = share if mask is None else share * mask
        context_BQAd = torch.bmm(dropped, v).view(B, A, Q, -1).transpose(1, 2)
        return context_BQAd, dropped.sum(-1, dtype=self._exact).view(B, A, Q), Kept([q, k, v, share, mask], (scale,))

    def attend_backward(
        self, kept: Kept, grad_BQAd: torch.Tensor, grad_sums_BAQ: torch.Tensor | None, into: Sequence[torch.Tensor]
    ) -> None:
        (q, k, v, share, mask), (scale,) = kept
        context = _by_head(grad_BQAd, grad_BQAd.shape[1])
        into_share, dropped = torch.bmm(context, v.transpose(1, 2)), share
        if grad_sums_BAQ is not None:
            into_share += grad_sums_BAQ.reshape(len(share), -1, 1).to(self._low)
        if mask is not None:
            into_share.mul_(mask)
            dropped = share * mask
        scores = torch.ops.aten._softmax_backward_data(
            into_share.to(self._exact), share.to(self._exact), -1, self._exact
        )
        scores = scores.mul_(scale).to(self._low)
        found = torch.bmm(scores, k), torch.bmm(scores.transpose(1, 2), q), torch.bmm(dropped.transpose(1, 2), context)
        of_q, of_k, of_v = (
            grad.view(len(place), place.shape[2], -1, place.shape[3]).transpose(1, 2)[:, : place.shape[1]]
            for grad, place in zip(found, into, strict=True)
        )
        into[0].copy_(of_q)
        if into[1] is into[2]:
            torch.add(of_k, of_v, out=into[1])
        else:
            into[1].copy_(of_k)
            into[2].copy_(of_v)

    def add_norm(
        self, residual_TH: torch.Tensor, x_TH: torch.Tensor, p: float, gain: torch.Tensor, bias: torch.Tensor,
        epsilon: float, learns: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, Kept]:  # fmt: skip
        mask = dropout_mask(tuple(x_TH.shape), p, self._low) if p else None
        total = residual_TH + (x_TH if mask is None else x_TH.mul_(mask))
        out_TH, mean, rstd = torch.native_layer_norm(total, [len(gain)], gain, bias, epsilon)
        return out_TH, out_TH.to(self._low), Kept([total, mean, rstd, gain, bias, mask])

    def add_norm_backward(
        self, kept: Kept, grad_TH: torch.Tensor, more_TH: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        total, mean, rstd, gain, bias, mask = kept.tensors
        residual, into_gain, into_bias = torch.ops.aten.native_layer_norm_backward(
            grad_TH if more_TH is None else grad_TH + more_TH, total, [len(gain)], mean, rstd, gain, bias, [True] * 3
        )
        x = residual.to(self._low)
        return residual, x if mask is None else x * mask, into_gain, into_bias

    def gelu(self, x_TF: torch.Tensor, learns: bool) -> tuple[torch.Tensor, Kept]:
        return F.gelu(x_TF), Kept([x_TF])

    def gelu_backward(self, kept: Kept, grad_TF: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.gelu_backward(grad_TF, kept.tensors[0])


def _by_head(x_BLAd: torch.Tensor, rows: int) -> torch.Tensor:
    """(B * A, rows, d): zeros where there are more rows than tokens."""
    B, L, A, d = x_BLAd.shape
    if rows == L:
        return x_BLAd.transpose(1, 2).reshape(B * A, L, d)
    out = x_BLAd.new_zeros(B, A, rows, d)
    out[:, :, :L] = x_BLAd.transpose(1, 2)
    return out.view(B * A, rows, d)
