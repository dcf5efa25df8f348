"""What an encoder layer does beside matrix products, on a CPU: attention, and dropout with the residual sum and LayerNorm.

Twice, with the same interface: `ByTorch` in PyTorch's operations, for any dtype; `Compiled` by the kernels of this
project, one pass over memory each, for products in bfloat16. The same computation but for rounding (`Compiled` keeps
float32 inside an operation) and for which elements dropout drops.

Each forward half returns what its backward half needs: tensors, and a number or two.

Shapes: B rows, L tokens, A heads, d head size, H = A * d, T = B * L.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from pkd_dist.model.native import Kernels, kernels

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

    tensors: list[torch.Tensor | None]
    numbers: tuple[Any, ...] = ()


class Parts(Protocol):
    """Beside products, a layer in the dtype of products (low) and that of its states (wide)."""

    def attend(self, qkv_BL3Ad: torch.Tensor, mask_B1L: torch.Tensor | None, p: float) -> tuple[torch.Tensor, Kept]:
        """Context (T, H) of each token, low; `mask_B1L`: low, to add to the scores; `p`: dropout of the probabilities."""

    def attend_backward(self, kept: Kept, grad_TH: torch.Tensor) -> torch.Tensor:
        """Gradient of `qkv`, (T, 3H), low."""

    def add_norm(
        self, residual_TH: torch.Tensor, x_TH: torch.Tensor, p: float, gain: torch.Tensor, bias: torch.Tensor,
        epsilon: float, learns: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, Kept]:  # fmt: skip
        """LayerNorm of residual + dropout(x), wide and low. May write into `x_TH`. `learns`: a backward half follows."""

    def add_norm_backward(
        self, kept: Kept, grad_TH: torch.Tensor, more_TH: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of the residual (wide), x (low), gain, bias; of the output they are `grad_TH` + `more_TH` (low)."""


def parts_for(low: torch.dtype, wide: torch.dtype, hidden: int, head: int, learns: bool) -> Parts:
    """The compiled ones where they fit: they take gradients in float32 alone. (Were a pure bfloat16 model's forward pass
    repeated to save memory, both passes would have to be told the same `learns`.)"""
    fit = low == torch.bfloat16 and (wide == torch.float32 or (wide == low and not learns))
    compiled = kernels() if fit and head % _VECTOR == 0 and hidden % _VECTOR == 0 else None
    return ByTorch(low) if compiled is None else Compiled(compiled)


def _float32(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


class Compiled:
    """By `kernels.c`."""

    def __init__(self, run: Kernels):
        self._run = run

    def attend(self, qkv_BL3Ad: torch.Tensor, mask_B1L: torch.Tensor | None, p: float) -> tuple[torch.Tensor, Kept]:
        B, L, _, A, d = qkv_BL3Ad.shape
        mask_B1L = None if mask_B1L is None else mask_B1L.expand(B, 1, L).contiguous()
        seed = draw_seed() if p else 0
        context_TH, rows = qkv_BL3Ad.new_empty(B * L, A * d), _float32(B, A, L, 2)
        self._run.attend(qkv_BL3Ad, mask_B1L, p, seed, B, L, A, d, context_TH, rows)
        return context_TH, Kept([qkv_BL3Ad, mask_B1L, rows], (p, seed))

    def attend_backward(self, kept: Kept, grad_TH: torch.Tensor) -> torch.Tensor:
        (qkv_BL3Ad, mask_B1L, rows), (p, seed) = kept
        assert qkv_BL3Ad is not None
        B, L, _, A, d = qkv_BL3Ad.shape
        grad_qkv = torch.empty_like(qkv_BL3Ad)
        self._run.attend_backward(qkv_BL3Ad, mask_B1L, p, seed, B, L, A, d, rows, grad_TH, grad_qkv)
        return grad_qkv.view(B * L, 3 * A * d)

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


class ByTorch:
    """By PyTorch's operations.

    Args:
        low: the dtype of products.
    """

    def __init__(self, low: torch.dtype):
        self._low, self._exact = low, torch.promote_types(low, torch.float32)

    def attend(self, qkv_BL3Ad: torch.Tensor, mask_B1L: torch.Tensor | None, p: float) -> tuple[torch.Tensor, Kept]:
        B, L, _, heads, size = qkv_BL3Ad.shape
        keys = max(L, _FEWEST_KEYS)
        q, k, v = _by_head(qkv_BL3Ad, keys)
        if keys > L:
            mask_B1L = qkv_BL3Ad.new_zeros(B, 1, L) if mask_B1L is None else mask_B1L
            mask_B1L = F.pad(mask_B1L, (0, keys - L), value=torch.finfo(self._low).min)
        if mask_B1L is None:
            scores = torch.bmm(q, k.transpose(1, 2)).mul_(size**-0.5)
        else:
            added = mask_B1L[:, None].expand(B, heads, 1, keys).reshape(-1, 1, keys).expand(-1, L, keys)
            scores = torch.baddbmm(added, q, k.transpose(1, 2), alpha=size**-0.5)
        share = torch.softmax(scores.to(self._exact), -1).to(self._low)
        mask = dropout_mask(tuple(share.shape), p, self._low) if p else None
        context = torch.bmm(share if mask is None else share * mask, v)
        context_TH = context.view(B, heads, L, size).transpose(1, 2).reshape(B * L, -1)
        return context_TH, Kept([q, k, v, share, mask], (B,))

    def attend_backward(self, kept: Kept, grad_TH: torch.Tensor) -> torch.Tensor:
        (q, k, v, share, mask), (B,) = kept
        assert q is not None and k is not None and v is not None and share is not None
        (_, L, size), heads = q.shape, len(q) // B
        context = grad_TH.view(B, L, heads, size).transpose(1, 2).reshape(-1, L, size)
        grad_qkv = context.new_empty(B, L, 3, heads, size)
        into_heads = grad_qkv.permute(2, 0, 3, 1, 4)
        into_share, dropped = torch.bmm(context, v.transpose(1, 2)), share
        if mask is not None:
            into_share.mul_(mask)
            dropped = share * mask
        scores = torch.ops.aten._softmax_backward_data(
            into_share.to(self._exact), share.to(self._exact), -1, self._exact
        )
        scores = scores.mul_(size**-0.5).to(self._low)
        for i, grad in enumerate(
            (torch.bmm(scores, k), torch.bmm(scores.transpose(1, 2), q), torch.bmm(dropped.transpose(1, 2), context))
        ):
            into_heads[i] = grad.view(B, heads, -1, size)[:, :, :L]
        return grad_qkv.view(B * L, -1)

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
        assert gain is not None
        residual, into_gain, into_bias = torch.ops.aten.native_layer_norm_backward(
            grad_TH if more_TH is None else grad_TH + more_TH, total, [len(gain)], mean, rstd, gain, bias, [True] * 3
        )
        x = residual.to(self._low)
        return residual, x if mask is None else x * mask, into_gain, into_bias


def _by_head(qkv_BL3Ad: torch.Tensor, keys: int) -> Sequence[torch.Tensor]:
    """Query (B * A, L, d), key and value (B * A, keys, d), zeros where there are more keys than tokens."""
    B, L, _, A, d = qkv_BL3Ad.shape
    qkv_3BALd = qkv_BL3Ad.permute(2, 0, 3, 1, 4)
    if keys == L:
        return qkv_3BALd.reshape(3, B * A, L, d).unbind()
    kv = qkv_BL3Ad.new_zeros(2, B, A, keys, d)
    kv[..., :L, :] = qkv_3BALd[1:]
    return qkv_3BALd[0].reshape(B * A, L, d), *kv.view(2, B * A, keys, d).unbind()
