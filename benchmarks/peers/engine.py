"""A training step in a hand-written loop, through the project's engine, and in its training loop.

The same student and the same batches, alternating in blocks of steps, on one rank.

    plain     a hand-written loop: autocast, backward, clipping, torch's fused AdamW
    engine    the same loop through the project's engine
    loop      a step of the project's training loop: that, and metrics, records, agreement on stop signals; on a GPU
              the step in one launch, in place of the engine's
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.subject import Clock
from benchmarks.probe import with_student_job
from pkd_dist.data.batches import Batch
from pkd_dist.distributed.world import World
from pkd_dist.telemetry import Telemetry
from pkd_dist.training.engine import resolve_precision
from pkd_dist.training.job import Job
from pkd_dist.training.optimization import Schedule
from pkd_dist.training.step import StepInputs
from pkd_dist.training.trainer import Trainer, open_trainer

WARMUP = 3


class Plain:
    """A student without an engine, with the interface of one: inputs, layers, tokens -> logits and states."""

    def __init__(self, job: Job, schedule: Schedule, device: torch.device):
        self.job, self.module, self.device = job, job.module.to(device), device
        config, _ = resolve_precision(job.deepspeed, device)
        autocast = config.get("torch_autocast", {})
        self._autocast = torch.autocast(
            device.type, dtype=getattr(torch, autocast.get("dtype", "bfloat16")), enabled=bool(autocast.get("enabled"))
        )
        matrices = [p for n, p in self.module.named_parameters() if p.requires_grad and p.ndim > 1]
        others = [p for n, p in self.module.named_parameters() if p.requires_grad and p.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": job.settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=job.settings.learning_rate, eps=job.settings.adam_epsilon, fused=True,
        )  # fmt: skip
        self._schedule, self._done = schedule, 0
        self.module.train()

    def __call__(self, *arguments: Any) -> Any:
        with self._autocast:
            return self.module(*arguments)

    def step(self, micro: list[Batch]) -> None:
        for batch in micro:
            batch = batch.to(self.device)
            terms = self.job.losses(self, batch)
            (terms["total"] * batch.weight_B).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.job.settings.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.learning_rate(self._done)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._done += 1


def _batches(inputs: StepInputs, step: int) -> list[Batch]:
    return [inputs.with_teacher(batch) for batch in inputs.batches.step(*inputs.position(step))]


def _through_the_engine(trainer: Trainer, micro: list[Batch], step: int) -> None:
    engine = trainer.engine
    for i, batch in enumerate(micro):
        batch = batch.to(trainer.world.device)
        terms = trainer.job.losses(engine, batch)
        engine.backward((terms["total"] * batch.weight_B).sum())
        if i + 1 < len(micro):
            engine.end_micro_batch()
    engine.step(step)


def measure(config_file: str | Path, overrides: list[str], block: int, blocks: int) -> dict[str, Any]:
    """Seconds of each block of `block` steps, `blocks` of each kind, one after the other in turn."""

    def use(job: Job, world: World, telemetry: Telemetry) -> dict[str, Any]:
        torch.manual_seed(job.seed)
        # before an engine changes the module in place; a graph would not capture what another engine has trained
        modules = [copy.deepcopy(job.module) for _ in range(2)]
        apart = replace(job, module=modules[1], folder=job.folder / "engine", records=job.folder / "engine.jsonl")
        through, trainer = open_trainer(apart, world, telemetry), open_trainer(job, world, telemetry)
        inputs = StepInputs(job, world, trainer.engine)
        plain = Plain(replace(job, module=modules[0]), trainer.engine.schedule, world.device)
        through.engine.train()
        trainer.engine.train()

        def engine_step(step: int) -> None:
            _through_the_engine(through, _batches(inputs, step), through.progress.step)
            through.progress.step += 1

        def loop_step(step: int) -> None:
            trainer.train_step()  # its own position: the epoch's batches in the same order

        ways: dict[str, Callable[[int], None]] = {
            "plain": lambda step: plain.step(_batches(inputs, step)),
            "engine": engine_step,
            "loop": loop_step,
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for step in range(WARMUP):
            for way in ways.values():
                way(step % trainer.steps_per_epoch)
        for number in range(blocks):
            steps = [(number * block + i) % trainer.steps_per_epoch for i in range(block)]
            for name in [*ways][number % 3 :] + [*ways][: number % 3]:
                clock = Clock()
                with clock.running():
                    for step in steps:
                        ways[name](step)
                seconds[name].append(clock.seconds)
        return {
            "steps_of_a_block": block,
            "seconds": seconds,
            "step_seconds": {name: float(np.median(values)) / block for name, values in seconds.items()},
            "overhead": {
                name: float(np.median(np.array(seconds[name]) / np.array(seconds["plain"]))) for name in seconds
            },
            "precision": resolve_precision(job.deepspeed, world.device)[1],
            "zero_stage": trainer.job.deepspeed["zero_optimization"]["stage"],
        }

    return with_student_job(config_file, overrides, use)
