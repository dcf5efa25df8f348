"""A step through the engine, operation by operation, on any device and any number of ranks.

Every rank computes its micro-batches. One small collective then sums the loss terms, and tells every rank of a non-finite
loss and of stop signals, before any weight changes.
"""

from __future__ import annotations

import time

import numpy as np
import torch

from pkd_dist.data.batches import Batch
from pkd_dist.errors import DivergedError
from pkd_dist.metric_names import LOSS_TERMS
from pkd_dist.training.clock import StepClock
from pkd_dist.training.step import StepInputs, StepResult

_TOKENS, _NOT_FINITE, _STOP = range(len(LOSS_TERMS), len(LOSS_TERMS) + 3)
"""Places in the sums over ranks, after the loss terms."""


class EagerStep:
    """A `step.TrainStep` operation by operation. A call returns the result of its own step."""

    def __init__(self, inputs: StepInputs):
        self._inputs, self._job, self._world, self._engine = inputs, inputs.job, inputs.world, inputs.engine
        self._signalled = False

    def __call__(self, step: int) -> StepResult:
        clock = StepClock(self._world.device)
        self._draw_from(self._inputs.seed(step))
        micro_batches = self._inputs.batches.step(*self._inputs.position(step))
        clock.ended("data")
        sums = self._forward_backward(micro_batches, clock)
        local = sums[: len(LOSS_TERMS)].copy()
        sums[_NOT_FINITE] = not np.isfinite(local).all()
        sums[_STOP] = self._world.stop_signal()
        sums = self._world.sum(sums)
        self._signalled = bool(sums[_STOP])
        clock.ended("ranks")
        if sums[_NOT_FINITE]:
            finite = bool(np.isfinite(local).all())
            self._inputs.diverged("the loss", step + 1, local, finite, sums[: len(LOSS_TERMS)])
        try:
            norm = self._engine.step(step)
        except DivergedError:
            finite = bool(np.isfinite(local).all()) and self._gradient_is_finite(micro_batches, step)
            self._inputs.diverged("the gradient", step + 1, local, finite, np.empty(0))
        clock.ended("optimizer")
        return StepResult(
            step=step + 1,
            terms=self._inputs.named(sums),
            grad_norm=norm,
            learning_rate=self._engine.schedule.learning_rate(step),
            examples=self._inputs.examples(step),
            tokens=int(sums[_TOKENS]),
            seconds={"step": time.perf_counter() - clock.start, **clock.seconds},
            loss_scale=self._engine.loss_scale,
        )

    def _forward_backward(self, micro_batches: list[Batch], clock: StepClock) -> np.ndarray:
        """Accumulate the step's gradients; return this rank's loss terms and tokens, with room for what ranks agree on."""
        sums = np.zeros(len(LOSS_TERMS) + 3)
        for i, batch in enumerate(micro_batches):
            batch = self._inputs.with_teacher(batch).to(self._world.device)
            terms = self._inputs.losses(self._engine, batch)
            weighted = {name: (value * batch.weight_B).sum() for name, value in terms.items()}
            clock.ended("forward")
            self._engine.backward(weighted["total"])
            for k, name in enumerate(LOSS_TERMS):
                if name in weighted:
                    sums[k] += float(weighted[name].detach())
            sums[_TOKENS] += batch.tokens
            if i + 1 < len(micro_batches):
                self._engine.end_micro_batch()
            clock.ended("backward")
        return sums

    def flush(self) -> None:
        """Return None: every result was returned by its step."""

    def stop_signal(self) -> int:
        return max(self._world.gather(self._world.stop_signal())) if self._signalled else 0

    def _gradient_is_finite(self, micro_batches: list[Batch], step: int) -> bool:
        """Repeat the backward passes and check this rank's own gradients before they are averaged; collective."""
        good: list[torch.Tensor] = []
        for parameter in self._job.module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: good.append(torch.isfinite(gradient).all()))
        self._draw_from(self._inputs.seed(step))
        for i, batch in enumerate(micro_batches):
            terms = self._job.losses(self._engine, self._inputs.with_teacher(batch).to(self._world.device))
            self._engine.backward((terms["total"] * batch.weight_B.to(terms["total"].device)).sum())
            if i + 1 < len(micro_batches):
                self._engine.end_micro_batch()
        return all(bool(flag) for flag in good)

    def _draw_from(self, seed: int) -> None:
        if self._world.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also look for accelerators
        else:
            torch.manual_seed(seed)
