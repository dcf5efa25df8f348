"""Access to the training of a real run, for programs that measure its steps.

All knowledge of the internals of the pipeline and the trainer is in this module (and, as names of functions, in
`scaling/startup_worker.py`): `student_job` patches the name under which the pipeline finds the trainer, `Steps`
drives the trainer step by step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from pkd_dist.config import load as config_load
from pkd_dist.data.batches import Batch
from pkd_dist.distributed.ranks import discover
from pkd_dist.distributed.world import World
from pkd_dist.pipeline import STAGES, Pipeline
from pkd_dist.telemetry import Telemetry
from pkd_dist.telemetry.log import to_terminal
from pkd_dist.training.trainer import Job, Trainer

Use = Callable[[Job, World, Telemetry], Any]


class _HandedOverError(Exception):
    """Ends the pipeline after the job of the student's training was used."""


def _run_until_training(config: Any, config_file: str | Path, world: World, trainer: Callable[..., Any]) -> None:
    """Run the stages up to distill with `trainer` in place of the class `Trainer`."""
    with patch("pkd_dist.pipeline.Trainer", trainer):
        Pipeline(config, config_file, world).run(STAGES[: STAGES.index("distill") + 1])


def with_student_job(config_file: str | Path, overrides: Sequence[str], use: Use) -> Any:
    """Run the stages before the student's training, then call `use` instead of training. Collective.

    Args:
        use: called on every rank with the arguments of `Trainer`.

    Returns:
        The result of `use`.
    """
    ranks = discover()
    to_terminal(ranks.main)
    config = config_load.load(config_file, overrides)
    world = World(ranks, config.run.timeout_seconds)
    results: list[Any] = []

    def trainer(job: Job, world: World, telemetry: Telemetry) -> Any:
        results.append(use(job, world, telemetry))
        raise _HandedOverError

    with contextlib.suppress(_HandedOverError):
        _run_until_training(config, config_file, world, trainer)
    world.barrier()
    world.close()
    if not results:
        raise RuntimeError(f"{config.run.dir}: the student is already trained; choose another folder")
    return results[0]


class Steps:
    """A trainer, one step at a time."""

    def __init__(self, job: Job, world: World, telemetry: Telemetry):
        self.trainer = Trainer(job, world, telemetry)
        self.trainer.engine.train()
        self._orders: dict[int, np.ndarray] = {}

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.trainer.progress.tokens

    @property
    def of_epoch(self) -> int:
        return self.trainer.batches.steps

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders[epoch] = self.trainer.batches.order(epoch)
        return self._orders[epoch]

    def train(self, count: int = 1) -> None:
        """Do the next `count` steps of the training loop."""
        for _ in range(count):
            self.train_step(*divmod(self.trainer.progress.step, self.of_epoch))

    def train_step(self, epoch: int, step: int) -> None:
        self.trainer._step(self._order(epoch), step)

    def batches(self, step: int) -> list[Batch]:
        """Return the micro-batches of a step of the first epoch, with the teacher's outputs."""
        return [self.trainer.answered(batch) for batch in self.trainer.batches.step(self._order(0), step)]

    def through_engine(self, step: int) -> None:
        """Do one step through the engine alone, without the rest of the training loop."""
        engine, micro = self.trainer.engine, self.batches(step)
        for i, batch in enumerate(micro):
            batch = batch.to(self.trainer.world.device)
            terms = self.trainer.job.losses(engine, batch)
            engine.backward((terms["total"] * batch.weight_B).sum())
            if i + 1 < len(micro):
                engine.micro_step()
        engine.step(self.trainer.progress.step)
        self.trainer.progress.step += 1
