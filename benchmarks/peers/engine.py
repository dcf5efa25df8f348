"""Compare a step of ours without DeepSpeed, through the engine, and in the training loop.

The same student takes the same batches on one rank, in blocks of steps that alternate:

    plain     a hand-written loop: autocast, backward, clipping, torch's fused AdamW
    engine    the same loop through the project's engine
    loop      a step of the project's training loop: the engine, metrics, records, agreement on stop signals; on a GPU
              the whole step is one CUDA graph
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.subject import Clock, adamw
from benchmarks.probe import Steps, with_student_job
from pkd_dist.data.batches import Batch
from pkd_dist.distributed.world import World
from pkd_dist.telemetry import Telemetry
from pkd_dist.training.engine import linear_warmup, resolve_precision
from pkd_dist.training.trainer import Job

WARMUP = 3


class Plain:
    """A student without DeepSpeed. Called like the engine."""

    def __init__(self, job: Job, total_steps: int, device: torch.device):
        self.job, self.module, self.device = job, job.module.to(device).train(), device
        settings = resolve_precision(job.deepspeed, device)[0].get("torch_autocast", {})
        dtype = getattr(torch, settings.get("dtype", "bfloat16"))
        self._autocast = torch.autocast(device.type, dtype=dtype, enabled=bool(settings.get("enabled")))
        self._optimizer = adamw(self.module, job.weight_decay, job.learning_rate, job.adam_epsilon)
        self._factor, self._done = linear_warmup(total_steps, job.warmup_ratio), 0

    def __call__(self, *arguments: Any) -> Any:
        with self._autocast:
            return self.module(*arguments)

    def step(self, micro: list[Batch]) -> None:
        for batch in micro:
            batch = batch.to(self.device)
            terms = self.job.losses(self, batch)
            (terms["total"] * batch.weight_B).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.job.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self.job.learning_rate * self._factor(self._done)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._done += 1


def measure(config_file: str | Path, overrides: list[str], block: int, blocks: int) -> dict[str, Any]:
    """Return the seconds of each block of `block` steps, `blocks` of each kind."""

    def use(job: Job, world: World, telemetry: Telemetry) -> dict[str, Any]:
        torch.manual_seed(job.seed)
        # copied before an engine changes the module in place; a graph cannot capture a module another engine trained
        modules = [copy.deepcopy(job.module) for _ in range(2)]
        apart = replace(job, module=modules[1], folder=job.folder / "engine", records=job.folder / "engine.jsonl")
        engine, loop = Steps(apart, world, telemetry), Steps(job, world, telemetry)
        plain = Plain(replace(job, module=modules[0]), loop.trainer.total_steps, world.device)
        ways: dict[str, Callable[[int], None]] = {
            "plain": lambda step: plain.step(loop.batches(step)),
            "engine": engine.through_engine,
            "loop": lambda step: loop.train_step(0, step),
        }
        for step in range(WARMUP):
            for way in ways.values():
                way(step % loop.of_epoch)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(blocks):
            steps = [(number * block + i) % loop.of_epoch for i in range(block)]
            for name in [*ways][number % 3 :] + [*ways][: number % 3]:
                clock = Clock()
                with clock.running():
                    for step in steps:
                        ways[name](step)
                seconds[name].append(clock.seconds)
        plain_seconds = np.array(seconds["plain"])
        return {
            "steps_of_a_block": block, "seconds": seconds,
            "step_seconds": {name: float(np.median(values)) / block for name, values in seconds.items()},
            "overhead": {name: float(np.median(values / plain_seconds)) for name, values in seconds.items()},
            "precision": loop.trainer.precision, "zero_stage": loop.trainer.job.deepspeed["zero_optimization"]["stage"],
        }  # fmt: skip

    return with_student_job(config_file, overrides, use)
