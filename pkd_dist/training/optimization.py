"""What both engines share: the schedule, AdamW and its parameter groups, gradient clipping, and autocast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import nn

from pkd_dist.config.schema import Train
from pkd_dist.data.batches import micro_batches, steps_per_epoch
from pkd_dist.errors import DivergedError

_DECAY_RATIO = 0.2
"""Of `warmup_stable_decay`, where `train.decay_ratio` is not given."""
_NORM_PART = 1 << 18
"""Numbers in one dot product of the norm."""


@dataclass(frozen=True)
class Schedule:
    """The optimizer's settings, and what follows from them for a number of examples and ranks.

    The learning rate rises linearly, stays at its peak until `decay_start`, and falls linearly to 0: at once (`linear`), at
    the end (`warmup_stable_decay`: Hu et al. 2024, https://arxiv.org/abs/2404.06395; its linear decay: Hägele et al. 2024,
    https://arxiv.org/abs/2405.18392), or never (`constant`).

    Attributes:
        total_steps: optimizer steps of the whole training.
        micro_batch_size: examples of one forward pass on one rank.
        gradient_accumulation_steps: micro-batches of one optimizer step on one rank.
    """

    settings: Train
    total_steps: int
    micro_batch_size: int
    gradient_accumulation_steps: int

    @classmethod
    def of(cls, settings: Train, examples: int, world_size: int) -> Schedule:
        """Return the schedule for a training set of `examples` examples."""
        total_steps = settings.epochs * steps_per_epoch(examples, settings.batch_size)
        size, count = micro_batches(settings.batch_size, world_size, settings.micro_batch_size)
        return cls(settings, total_steps, size, count)

    @cached_property
    def warmup_steps(self) -> int:
        steps = self.total_steps if self.settings.schedule == "linear" else self.total_steps // self.settings.epochs
        return int(steps * self.settings.warmup_ratio)

    @cached_property
    def decay_start(self) -> int:
        """The first step of the decay, counted from 0."""
        return self._decay_start(self.total_steps)

    def _decay_start(self, total_steps: int) -> int:
        if self.settings.schedule == "linear":
            return self.warmup_steps
        ratio = _DECAY_RATIO if self.settings.decay_ratio is None else self.settings.decay_ratio
        decay = int(total_steps * ratio) if self.settings.schedule == "warmup_stable_decay" else 0
        return max(self.warmup_steps, total_steps - decay)

    @property
    def branch_step(self) -> int | None:
        """How many steps a training with more epochs does in the same way; None: none, the rates depend on the epochs."""
        return None if self.settings.schedule == "linear" else self.decay_start

    def continues(self, step: int, total_steps: int) -> bool:
        """Return whether the first `step` steps of a training of `total_steps` in all are also those of this one."""
        if total_steps == self.total_steps:
            return True
        return self.branch_step is not None and step <= min(self.branch_step, self._decay_start(total_steps))

    def factor(self, step: int) -> float:
        """Return the share of the peak learning rate at step `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if step < self.decay_start:
            return 1.0
        return max(0.0, (self.total_steps - step) / max(1, self.total_steps - self.decay_start))

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0."""
        return self.settings.learning_rate * self.factor(step)

    def decay(self, steps: int) -> float:
        """Return the factor by which `steps` steps of AdamW's weight decay alone scale a weight."""
        rates = self.settings.learning_rate * np.array([self.factor(step) for step in range(steps)])
        return float(np.prod(1.0 - rates * self.settings.weight_decay))


def make_adamw(module: nn.Module, settings: Train, fused: bool = True) -> torch.optim.AdamW:
    """Return AdamW over a module's trained parameters. Only matrices decay: biases and LayerNorm do not."""

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim > 1 and not name.endswith("bias")

    trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for n, p in trained if decays(n, p)], "weight_decay": settings.weight_decay},
            {"params": [p for n, p in trained if not decays(n, p)], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        eps=settings.adam_epsilon,
        fused=fused,
    )


def set_learning_rate(adam: torch.optim.AdamW, rate: float | torch.Tensor) -> None:
    for group in adam.param_groups:
        group["lr"] = rate


def clip_gradients(adam: torch.optim.AdamW, parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Set AdamW's `grad_scale` so that its next update clips gradients to `max_norm` (0: no clipping).

    Fused AdamW divides by `grad_scale` in its own pass over the gradients, which saves one pass.

    Returns:
        The global gradient norm before clipping.

    Raises:
        DivergedError: the norm is not finite.
    """
    total = global_norm([p.grad for p in parameters if p.grad is not None])
    norm = float(total)
    require_finite(norm)
    adam.grad_scale = (total + 1e-6) / max_norm if norm > max_norm > 0 else None  # type: ignore[attr-defined]
    return norm


def global_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the norm of all gradients together, a scalar tensor in their dtype.

    On a CPU it is the root of dot products of parts: three times as fast as `torch.linalg.vector_norm`, whose single sum in float32
    is off by 3e-4 for five million numbers.
    """
    if gradients[0].device.type != "cpu":
        return torch.nn.utils.get_total_norm(gradients)
    parts = (part for gradient in gradients for part in gradient.flatten().split(_NORM_PART))
    return torch.stack([torch.dot(part, part) for part in parts]).sum().sqrt()


def require_finite(norm: float) -> None:
    if not np.isfinite(norm):
        raise DivergedError("the gradient is not finite")


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return autocast to `dtype`, to be entered around a forward pass; None: a context without effect."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
