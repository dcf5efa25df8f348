"""Dropout of several students in one batched forward pass: the masks of each follow from its own seed, whoever it is with.

On a CPU they are those that its training alone would draw, if its layers are fused (`model/fused_layer.py`: those with GELU). On a GPU
they are others, since a GPU draws its own there.

Shapes: K students, B examples of a batch, L tokens, H hidden or embedding size, A heads.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from pkd_dist.model.dropout import dropout_mask
from pkd_dist.model.fused_layer import padded_keys


class StackedDropout(TorchFunctionMode):
    """Within it, every dropout of a `torch.func.vmap` over students multiplies by masks of each student's own.

    Args:
        seeds: Of this step, for each student.
        lengths: L of each student's own batch; all are padded to the longest.
        widths: Hidden and embedding size, which tell states from attention weights.
    """

    def __init__(self, seeds: Sequence[int], lengths: Sequence[int], widths: Collection[int], device: torch.device):
        super().__init__()
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._lengths, self._longest, self._widths = lengths, max(lengths), widths

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.dropout:
            return func(*args, **(kwargs or {}))
        return self._dropout(*args, **(kwargs or {}))

    def _dropout(
        self, input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        if not training or not p:
            return input
        dropped: torch.Tensor = _Multiply.apply(input, lambda x_K: self._masks(x_K, p))
        return dropped

    def _masks(self, x_K: torch.Tensor, p: float) -> torch.Tensor:
        """Return the masks of all students, in the shape of `x_K`: of each its own, and zeros where it is padded."""
        masks_K, axes = torch.zeros_like(x_K), self._token_axes(x_K.shape[1:])
        for mask, generator, length in zip(masks_K, self._generators, self._lengths, strict=True):
            own = mask[tuple(slice(length) if axis in axes else slice(None) for axis in range(mask.ndim))]
            keys = padded_keys(length) if mask.ndim - 1 in axes else own.shape[-1]
            own.copy_(dropout_mask((*own.shape[:-1], keys), p, mask.dtype, generator)[..., : own.shape[-1]])
        return masks_K

    def _token_axes(self, shape: torch.Size) -> tuple[int, ...]:
        """Return which axes count tokens: of states (B, L, H), of attention weights (B, A, L, L) or (B, A, L), of the rest none."""
        if len(shape) == 4:
            return 2, 3
        if len(shape) != 3:
            return ()
        middle, last = shape[1:]
        if last in self._widths and middle in (1, self._longest):
            return (1,) if middle == self._longest else ()  # of a layer that computes the first token alone, none
        return (2,) if last == self._longest else ()


class _Multiply(torch.autograd.Function):
    """Multiply by masks of the whole stack, from within a vmap over students."""

    @staticmethod
    def forward(x: torch.Tensor, masks: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError("only within torch.func.vmap")

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    @staticmethod
    def vmap(
        info: object, in_dims: tuple[int, None], x: torch.Tensor, masks: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, int]:
        x_K = x.movedim(in_dims[0], 0)
        return x_K * masks(x_K), 0
