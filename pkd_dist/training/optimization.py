"""What both engines share: the schedule, AdamW and its parameter groups, gradient clipping, and autocast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pkd_dist.config.schema import Train
from pkd_dist.data.batches import micro_batches, steps_per_epoch
from pkd_dist.errors import DivergedError


@dataclass(frozen=True)
class Schedule:
    """The optimizer's settings, and what follows from them for a number of examples and ranks.

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

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0."""
        return self.settings.learning_rate * linear_warmup(self.total_steps, self.settings.warmup_ratio)(step)

    def decay(self, steps: int) -> float:
        """Return the factor by which `steps` steps of AdamW's weight decay alone scale a weight."""
        factor = linear_warmup(self.total_steps, self.settings.warmup_ratio)
        rates = self.settings.learning_rate * np.array([factor(step) for step in range(steps)])
        return float(np.prod(1.0 - rates * self.settings.weight_decay))


def linear_warmup(total_steps: int, ratio: float) -> Callable[[int], float]:
    """Return step -> learning-rate factor: a linear rise to 1 over the first `ratio` of the steps, then a linear fall to 0."""
    warmup = int(total_steps * ratio)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / max(1, warmup)
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup))

    return factor


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
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = float(total)
    require_finite(norm)
    adam.grad_scale = (total + 1e-6) / max_norm if norm > max_norm > 0 else None  # type: ignore[attr-defined]
    return norm


def require_finite(norm: float) -> None:
    if not np.isfinite(norm):
        raise DivergedError("the gradient is not finite")


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return autocast to `dtype`, to be entered around a forward pass; None: a context without effect."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)
