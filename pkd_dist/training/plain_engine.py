"""The engine of one rank: torch's fused AdamW, clipping and autocast, without DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch

from pkd_dist.limits import subnormals_are_zero
from pkd_dist.model.encoder import Encoder
from pkd_dist.model.outputs import Outputs
from pkd_dist.training.optimization import Schedule, autocast, clip_gradients, make_adamw, set_learning_rate
from pkd_dist.training.optimizer_state import ReplicatedState, full_weights


class PlainEngine:
    """One module in training on one rank; see `engine.Engine`.

    Args:
        module: trained in place; moved to the device.
        autocast_dtype: None: float32 throughout.
    """

    loss_scale: float | None = None

    def __init__(self, module: Encoder, schedule: Schedule, device: torch.device, autocast_dtype: torch.dtype | None):
        self.module, self.schedule, self.device = module.to(device), schedule, device
        self.autocast_dtype = autocast_dtype
        self.optimizer = make_adamw(module, schedule.settings)
        self.state = ReplicatedState(module, self.optimizer)
        self._trained = [p for p in module.parameters() if p.requires_grad]
        self._autocast = autocast(device, autocast_dtype)

    def __call__(self, *arguments: Any) -> Outputs:
        with self._autocast:
            return self.module(*arguments)

    def train(self) -> None:
        self.module.train()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def end_micro_batch(self) -> None:
        """Do nothing: torch accumulates gradients until they are cleared."""

    def step(self, step: int) -> float:
        set_learning_rate(self.optimizer, self.schedule.learning_rate(step))
        norm = clip_gradients(self.optimizer, self._trained, self.schedule.settings.max_grad_norm)
        with subnormals_are_zero():
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def full_weights(self) -> dict[str, torch.Tensor]:
        return full_weights(self.module, lambda parameter: parameter)
