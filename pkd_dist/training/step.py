"""The interface of a training step. `eager_step.py` and `graph_step.py` implement it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn, Protocol

import numpy as np
import torch

from pkd_dist.data.batches import Batch, TrainingBatches
from pkd_dist.distributed.world import World
from pkd_dist.errors import DivergedError
from pkd_dist.metric_names import LOSS_TERMS
from pkd_dist.model.outputs import Forward
from pkd_dist.training.engine import Engine
from pkd_dist.training.job import Job


@dataclass(frozen=True)
class StepResult:
    """One optimizer step that was applied.

    Attributes:
        step: its number, counted from 1.
        terms: the terms of `LOSS_TERMS` that the losses have, summed over the global batch with its weights.
        grad_norm: global norm before clipping.
        examples, tokens: of the global batch, without padding.
        seconds: on this rank: `step`, and its parts (see `clock.PARTS`).
        loss_scale: fp16's; None in other precisions.
    """

    step: int
    terms: dict[str, float]
    grad_norm: float
    learning_rate: float
    examples: int
    tokens: int
    seconds: dict[str, float]
    loss_scale: float | None = None

    @property
    def samples_per_second(self) -> float:
        return self.examples / self.seconds["step"]


class NonFiniteError(DivergedError):
    """A step whose loss or gradient is not finite.

    Attributes:
        terms: the step's loss terms, if the loss itself is not finite or is known only with the gradient; else empty.
    """

    def __init__(self, message: str, terms: dict[str, float]):
        super().__init__(message)
        self.terms = terms


class TrainStep(Protocol):
    """Does optimizer steps, one per call."""

    def __call__(self, step: int) -> StepResult | None:
        """Do optimizer step `step`, counted from 0.

        Returns:
            The result of this step (`EagerStep`), or of the step before it, as the device still works on this one
            (`GraphStep`; None the first time).

        Raises:
            NonFiniteError: the step whose result was awaited diverged.
        """

    def flush(self) -> StepResult | None:
        """Wait for the last step and return its result, unless it was returned before."""

    def stop_signal(self) -> int:
        """Return a stop signal that any rank had received when the last step ended, 0 for none; collective."""


class StepInputs:
    """What a step needs beside the engine: its batch, its random seed, and the teacher's outputs."""

    def __init__(self, job: Job, world: World, engine: Engine):
        self.job, self.world, self.engine = job, world, engine
        settings = job.settings
        self.batches = TrainingBatches(
            job.train, settings.batch_size, settings.micro_batch_size, job.seed, world.rank, world.size, job.pad_id
        )
        self._order = lru_cache(maxsize=1)(self.batches.order)
        self._terms: tuple[str, ...] = tuple(LOSS_TERMS)  # until the losses have been computed

    def position(self, step: int) -> tuple[np.ndarray, int]:
        """Return the order of the examples in the step's epoch, and the step's index in that epoch."""
        epoch, index = divmod(step, self.batches.steps)
        return self._order(epoch), index

    def examples(self, step: int) -> int:
        """Return the number of examples in the step's global batch: fewer in the last batch of an epoch."""
        size = self.job.settings.batch_size
        return min(size, len(self.job.train) - step % self.batches.steps * size)

    def seed(self, step: int) -> int:
        """Return the random seed of a step on this rank. It depends on nothing else, so a resume needs no random state."""
        return int(np.random.SeedSequence([self.job.seed, step, self.world.rank]).generate_state(1)[0])

    def losses(self, forward: Forward, batch: Batch) -> dict[str, torch.Tensor]:
        """Return `Job.losses`, and remember which terms there are."""
        terms = self.job.losses(forward, batch)
        self._terms = tuple(terms)
        return terms

    def named(self, values: np.ndarray) -> dict[str, float]:
        """Return values in the order of `LOSS_TERMS` by name, without the terms that the losses lack; `values` may be empty."""
        named = zip(LOSS_TERMS, values.tolist(), strict=False)
        return {name: value for name, value in named if name in self._terms}

    def with_teacher(self, batch: Batch) -> Batch:
        """Return a batch with the teacher's outputs, if the losses need them."""
        return self.job.teacher_outputs(batch) if self.job.teacher_outputs else batch

    def diverged(self, what: str, step: int, local: np.ndarray, finite: bool, shown: np.ndarray) -> NoReturn:
        """Raise NonFiniteError on every rank, naming a rank at fault; collective.

        Args:
            what: the loss or the gradient.
            step: the step's number, counted from 1.
            local: this rank's loss terms.
            finite: whether this rank's own loss and gradient are finite.
            shown: the loss terms for the metrics; may be empty.
        """
        every = self.world.gather((finite, self.named(local)))
        rank = next((rank for rank, (good, _) in enumerate(every) if not good), 0)
        terms = ", ".join(f"{name} {value:.4g}" for name, value in every[rank][1].items())
        raise NonFiniteError(
            f"{self.job.name}: {what} is not finite at step {step} (rank {rank}: {terms}); nothing of this step is saved; "
            "lower the learning rate, or check the data of this step",
            self.named(shown),
        )
