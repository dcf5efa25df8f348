"""The operations of an encoder layer besides its linear layers, on a CPU: attention, dropout + residual + LayerNorm, GELU.

There are two implementations of `LayerOperations`: `TorchOperations`, in PyTorch, for any dtype, and `CompiledOperations`,
in `kernels.c`, one pass over memory each, for a compute dtype of bfloat16. They differ in rounding (the compiled ones keep
float32 inside an operation) and in the elements that dropout drops.

Each forward method returns a `SavedForBackward`, which its backward method takes.

Two dtypes occur: the compute dtype of the linear layers (autocast's), and the state dtype of the residual stream (float32
under autocast). p is a dropout probability.

Shapes: B examples, L tokens, Q queries, A heads, d head size, H = A * d, F inner size, T = B * L.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from pkd_dist.kernels.native import Kernels, load_kernels

_BITS = 15
_MIN_KEYS = 16  # PyTorch does not vectorize a softmax over fewer
_VECTOR = 16  # of kernels.c, which reads whole vectors


def draw_seed() -> int:
    """Return a seed from torch's default generator, so that `torch.manual_seed` determines it."""
    return int(torch.randint(2**62, ()))


def dropout_mask(shape: tuple[int, ...], p: float, dtype: torch.dtype) -> torch.Tensor:
    """Return the CPU tensor that dropout multiplies by: 0 with probability p (in steps of 2**-15), else 1 / (1 - p)."""
    count = math.prod(shape)
    bits = torch.from_numpy(np.random.SFC64(draw_seed()).random_raw(-(-count // 4)).view(np.int16))[:count].view(shape)
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


class SavedForBackward(NamedTuple):
    """What a forward method hands to its backward method."""

    tensors: list[Any]
    """Tensors, or None."""
    numbers: tuple[Any, ...] = ()
    """Seeds, probabilities and scales."""


class LayerOperations(Protocol):
    """The operations of an encoder layer besides its linear layers, forward and backward."""

    def attend(
        self, q_BQAd: torch.Tensor, k_BLAd: torch.Tensor, v_BLAd: torch.Tensor, mask_B1L: torch.Tensor | None,
        scale: float, p: float,
    ) -> tuple[torch.Tensor, torch.Tensor, SavedForBackward]:  # fmt: skip
        """Return the attention context and the sums of its weights.

        Args:
            q_BQAd, k_BLAd, v_BLAd: Queries, keys, values, compute dtype; keys and values may be the same tensor.
            mask_B1L: Added to the scores, compute dtype.
            scale: Factor of the scores.
            p: Dropout of the attention weights.

        Returns:
            Context (B, Q, A, d), compute dtype, and the sums (B, A, Q) of the weights after dropout, 1 without it.
        """

    def attend_backward(
        self,
        saved: SavedForBackward,
        grad_BQAd: torch.Tensor,
        grad_sums_BAQ: torch.Tensor | None,
        out: Sequence[torch.Tensor],
    ) -> None:
        """Write the gradients of queries, keys and values, compute dtype, to the three tensors `out`.

        If keys and values are the same tensor, so are `out[1]` and `out[2]`, which receive the sum of both gradients.
        `grad_sums_BAQ` is float32; None means zeros.
        """

    def add_norm(
        self, residual_TH: torch.Tensor, x_TH: torch.Tensor, p: float, gain: torch.Tensor, bias: torch.Tensor,
        epsilon: float, needs_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, SavedForBackward]:  # fmt: skip
        """Return LayerNorm(residual + dropout(x)) twice: state dtype and compute dtype. May overwrite `x_TH`."""

    def add_norm_backward(
        self, saved: SavedForBackward, grad_TH: torch.Tensor, more_TH: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of the residual (state dtype), x (compute dtype), gain and bias.

        The gradient of the output is `grad_TH` plus, if given, `more_TH` (compute dtype).
        """

    def gelu(self, x_TF: torch.Tensor, needs_grad: bool) -> tuple[torch.Tensor, SavedForBackward]:
        """Return GELU(x), compute dtype."""

    def gelu_backward(self, saved: SavedForBackward, grad_TF: torch.Tensor) -> torch.Tensor:
        """Return the gradient of x, compute dtype. May overwrite `grad_TF`."""


def select_operations(
    compute_dtype: torch.dtype, state_dtype: torch.dtype, hidden_size: int, head_size: int, needs_grad: bool
) -> LayerOperations:
    """Return the compiled operations if they support this layer, else PyTorch's.

    The compiled backward pass needs float32 states. With pure bfloat16 states the choice depends on `needs_grad`, so
    activation checkpointing, which runs the forward pass twice, would need the same value in both.
    """
    supported = compute_dtype == torch.bfloat16 and (
        state_dtype == torch.float32 or (state_dtype == compute_dtype and not needs_grad)
    )
    aligned = head_size % _VECTOR == 0 and hidden_size % _VECTOR == 0
    kernels = load_kernels() if supported and aligned else None
    return TorchOperations(compute_dtype) if kernels is None else CompiledOperations(kernels)


def _empty_float32(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")


@functools.cache
def _gelu_table() -> torch.Tensor:
    """Return int32 (2**16,): for the bits of each bfloat16, GELU in the lower half and its slope in the upper half."""
    x = torch.arange(2**16, dtype=torch.int32, device="cpu").to(torch.int16).view(torch.bfloat16).double()
    slope = torch.ops.aten.gelu_backward(torch.ones_like(x), x)
    both = torch.stack([F.gelu(x), slope], -1).bfloat16()
    return both.view(torch.int32).flatten()  # little-endian


class CompiledOperations:
    """`LayerOperations` in `kernels.c`; the compute dtype is bfloat16."""

    def __init__(self, kernels: Kernels):
        self._kernels = kernels

    def attend(
        self, q_BQAd: torch.Tensor, k_BLAd: torch.Tensor, v_BLAd: torch.Tensor, mask_B1L: torch.Tensor | None,
        scale: float, p: float,
    ) -> tuple[torch.Tensor, torch.Tensor, SavedForBackward]:  # fmt: skip
        (B, Q, A, d), L = q_BQAd.shape, k_BLAd.shape[1]
        mask_B1L = None if mask_B1L is None else mask_B1L.expand(B, 1, L).contiguous()
        seed = draw_seed() if p else 0
        context_BQAd, rows_BAQ3 = q_BQAd.new_empty(B, Q, A, d), _empty_float32(B, A, Q, 3)
        self._kernels.attend(q_BQAd, k_BLAd, v_BLAd, mask_B1L, p, seed, scale, B, Q, L, A, d, context_BQAd, rows_BAQ3)
        saved = SavedForBackward([q_BQAd, k_BLAd, v_BLAd, mask_B1L, rows_BAQ3], (scale, p, seed))
        return context_BQAd, rows_BAQ3[..., 2], saved

    def attend_backward(
        self,
        saved: SavedForBackward,
        grad_BQAd: torch.Tensor,
        grad_sums_BAQ: torch.Tensor | None,
        out: Sequence[torch.Tensor],
    ) -> None:
        (q_BQAd, k_BLAd, v_BLAd, mask_B1L, rows), (scale, p, seed) = saved
        (B, Q, A, d), L = q_BQAd.shape, k_BLAd.shape[1]
        self._kernels.attend_backward(
            q_BQAd, k_BLAd, v_BLAd, mask_B1L, p, seed, scale, B, Q, L, A, d, rows, grad_BQAd, grad_sums_BAQ, *out
        )

    def add_norm(
        self, residual_TH: torch.Tensor, x_TH: torch.Tensor, p: float, gain: torch.Tensor, bias: torch.Tensor,
        epsilon: float, needs_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, SavedForBackward]:  # fmt: skip
        T, H = x_TH.shape
        low_residual = residual_TH.dtype == x_TH.dtype
        seed, gain, bias = draw_seed() if p else 0, gain.float(), bias.float()
        total, mean, rstd = (
            (_empty_float32(T, H), _empty_float32(T), _empty_float32(T)) if needs_grad else (None, None, None)
        )
        low_TH, out_TH = torch.empty_like(x_TH), None if low_residual else _empty_float32(T, H)
        self._kernels.add_norm(
            residual_TH, low_residual, x_TH, p, seed, gain, bias, epsilon, T, H, total, mean, rstd, out_TH, low_TH
        )
        saved = SavedForBackward([total, mean, rstd, gain], (p, seed))
        return low_TH if out_TH is None else out_TH, low_TH, saved

    def add_norm_backward(
        self, saved: SavedForBackward, grad_TH: torch.Tensor, more_TH: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        (total, mean, rstd, gain), (p, seed) = saved
        T, H = grad_TH.shape
        grad_residual, grad_x = _empty_float32(T, H), grad_TH.new_empty(T, H, dtype=torch.bfloat16)
        grad_gain, grad_bias = _empty_float32(H), _empty_float32(H)
        self._kernels.add_norm_backward(
            grad_TH, more_TH, p, seed, gain, total, mean, rstd, T, H, grad_residual, grad_x, grad_gain, grad_bias
        )
        return grad_residual, grad_x, grad_gain, grad_bias

    def gelu(self, x_TF: torch.Tensor, needs_grad: bool) -> tuple[torch.Tensor, SavedForBackward]:
        active_TF, slope_TF = torch.empty_like(x_TF), torch.empty_like(x_TF) if needs_grad else None
        self._kernels.look_up(x_TF, x_TF.numel(), _gelu_table(), active_TF, slope_TF)
        return active_TF, SavedForBackward([slope_TF])

    def gelu_backward(self, saved: SavedForBackward, grad_TF: torch.Tensor) -> torch.Tensor:
        return grad_TF.mul_(saved.tensors[0])


class TorchOperations:
    """`LayerOperations` in PyTorch, for any compute dtype."""

    def __init__(self, compute_dtype: torch.dtype):
        self._low, self._softmax_dtype = compute_dtype, torch.promote_types(compute_dtype, torch.float32)

    def attend(
        self, q_BQAd: torch.Tensor, k_BLAd: torch.Tensor, v_BLAd: torch.Tensor, mask_B1L: torch.Tensor | None,
        scale: float, p: float,
    ) -> tuple[torch.Tensor, torch.Tensor, SavedForBackward]:  # fmt: skip
        (B, Q, A, _), L = q_BQAd.shape, k_BLAd.shape[1]
        keys = max(L, _MIN_KEYS)
        q, k, v = _by_head(q_BQAd, Q), _by_head(k_BLAd, keys), _by_head(v_BLAd, keys)
        if keys > L:
            mask_B1L = q_BQAd.new_zeros(B, 1, L) if mask_B1L is None else mask_B1L
            mask_B1L = F.pad(mask_B1L, (0, keys - L), value=torch.finfo(self._low).min)
        if mask_B1L is None:
            scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
        else:
            added = mask_B1L[:, None].expand(B, A, 1, keys).reshape(-1, 1, keys).expand(-1, Q, keys)
            scores = torch.baddbmm(added, q, k.transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores.to(self._softmax_dtype), -1).to(self._low)
        mask = dropout_mask(tuple(weights.shape), p, self._low) if p else None
        dropped = weights if mask is None else weights * mask
        context_BQAd = torch.bmm(dropped, v).view(B, A, Q, -1).transpose(1, 2)
        sums_BAQ = dropped.sum(-1, dtype=self._softmax_dtype).view(B, A, Q)
        return context_BQAd, sums_BAQ, SavedForBackward([q, k, v, weights, mask], (scale,))

    def attend_backward(
        self,
        saved: SavedForBackward,
        grad_BQAd: torch.Tensor,
        grad_sums_BAQ: torch.Tensor | None,
        out: Sequence[torch.Tensor],
    ) -> None:
        (q, k, v, weights, mask), (scale,) = saved
        grad_context = _by_head(grad_BQAd, grad_BQAd.shape[1])
        grad_weights, dropped = torch.bmm(grad_context, v.transpose(1, 2)), weights
        if grad_sums_BAQ is not None:
            grad_weights += grad_sums_BAQ.reshape(len(weights), -1, 1).to(self._low)
        if mask is not None:
            grad_weights.mul_(mask)
            dropped = weights * mask
        grad_scores = torch.ops.aten._softmax_backward_data(
            grad_weights.to(self._softmax_dtype), weights.to(self._softmax_dtype), -1, self._softmax_dtype
        )
        grad_scores = grad_scores.mul_(scale).to(self._low)
        grads = (
            torch.bmm(grad_scores, k),
            torch.bmm(grad_scores.transpose(1, 2), q),
            torch.bmm(dropped.transpose(1, 2), grad_context),
        )
        grad_q, grad_k, grad_v = (
            grad.view(len(into), into.shape[2], -1, into.shape[3]).transpose(1, 2)[:, : into.shape[1]]
            for grad, into in zip(grads, out, strict=True)
        )
        out[0].copy_(grad_q)
        if out[1] is out[2]:
            torch.add(grad_k, grad_v, out=out[1])
        else:
            out[1].copy_(grad_k)
            out[2].copy_(grad_v)

    def add_norm(
        self, residual_TH: torch.Tensor, x_TH: torch.Tensor, p: float, gain: torch.Tensor, bias: torch.Tensor,
        epsilon: float, needs_grad: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, SavedForBackward]:  # fmt: skip
        mask = dropout_mask(tuple(x_TH.shape), p, self._low) if p else None
        total = residual_TH + (x_TH if mask is None else x_TH.mul_(mask))
        out_TH, mean, rstd = torch.native_layer_norm(total, [len(gain)], gain, bias, epsilon)
        return out_TH, out_TH.to(self._low), SavedForBackward([total, mean, rstd, gain, bias, mask])

    def add_norm_backward(
        self, saved: SavedForBackward, grad_TH: torch.Tensor, more_TH: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        total, mean, rstd, gain, bias, mask = saved.tensors
        grad_residual, grad_gain, grad_bias = torch.ops.aten.native_layer_norm_backward(
            grad_TH if more_TH is None else grad_TH + more_TH, total, [len(gain)], mean, rstd, gain, bias, [True] * 3
        )
        grad_x = grad_residual.to(self._low)
        return grad_residual, grad_x if mask is None else grad_x * mask, grad_gain, grad_bias

    def gelu(self, x_TF: torch.Tensor, needs_grad: bool) -> tuple[torch.Tensor, SavedForBackward]:
        return F.gelu(x_TF), SavedForBackward([x_TF])

    def gelu_backward(self, saved: SavedForBackward, grad_TF: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.gelu_backward(grad_TF, saved.tensors[0])


def _by_head(x_BLAd: torch.Tensor, rows: int) -> torch.Tensor:
    """Return (B * A, rows, d), padded with zeros to `rows`."""
    B, L, A, d = x_BLAd.shape
    if rows == L:
        return x_BLAd.transpose(1, 2).reshape(B * A, L, d)
    out = x_BLAd.new_zeros(B, A, rows, d)
    out[:, :, :L] = x_BLAd.transpose(1, 2)
    return out.view(B * A, rows, d)
