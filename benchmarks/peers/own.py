"""Measurements of our own parts: a step with and without DeepSpeed, and the teacher's pass.

For the step the same student takes the same batches on one rank, in blocks of steps that alternate:

    plain     a hand-written loop: autocast, backward, clipping, torch's fused AdamW
    engine    the same loop through the project's engine
    loop      a step of the project's training loop: the engine, metrics, records, agreement on stop signals; on a GPU
              the whole step is one CUDA graph
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.flops import peak
from benchmarks.peers.subject import Clock, adamw, shape_of
from benchmarks.probe import Steps, with_student_job
from pkd_dist.config.load import load
from pkd_dist.data import tasks, text
from pkd_dist.data.batches import Batch
from pkd_dist.data.tokens import tokenize
from pkd_dist.distillation.cache_builder import Batches, LiveTeacher, answer, resolve_teacher_precision
from pkd_dist.distributed.world import World
from pkd_dist.model.encoder import load_model, load_tokenizer
from pkd_dist.model.layers import paired_layers
from pkd_dist.telemetry import Telemetry
from pkd_dist.training.engine import linear_warmup, resolve_precision
from pkd_dist.training.trainer import Job

WARMUP = 3
SORTED_ROWS = {"cpu": 4096, "cuda": 65536}
"""Rows that the teacher's pass sorts by length together: those of one shard, or of many."""


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
            (self.job.losses(self, batch)["total"] * batch.weight_B).sum().backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.job.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self.job.learning_rate * self._factor(self._done)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._done += 1


def engine(config_file: str, overrides: list[str], block: int, blocks: int) -> dict[str, Any]:
    """Return the seconds of each block of `block` steps, `blocks` of each kind."""

    def use(job: Job, world: World, telemetry: Telemetry) -> dict[str, Any]:
        torch.manual_seed(job.seed)
        # copied before an engine changes the module in place; a graph cannot capture a module another engine trained
        modules = [copy.deepcopy(job.module) for _ in range(2)]
        apart = replace(job, module=modules[1], folder=job.folder / "engine", records=job.folder / "engine.jsonl")
        through, loop = Steps(apart, world, telemetry), Steps(job, world, telemetry)
        plain = Plain(replace(job, module=modules[0]), loop.trainer.total_steps, world.device)
        ways: dict[str, Callable[[int], None]] = {
            "plain": lambda step: plain.step(loop.batches(step)),
            "engine": through.through_engine,
            "loop": lambda step: loop.train_step(0, step),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for step in range(WARMUP):
            for way in ways.values():
                way(step % loop.of_epoch)
        for number in range(blocks):
            for name in [*ways][number % 3 :] + [*ways][: number % 3]:
                clock = Clock()
                with clock.running():
                    for step in range(number * block, (number + 1) * block):
                        ways[name](step % loop.of_epoch)
                seconds[name].append(clock.seconds)
        plain_seconds = np.array(seconds["plain"])
        return {
            "steps_of_a_block": block, "seconds": seconds,
            "step_seconds": {name: float(np.median(values)) / block for name, values in seconds.items()},
            "overhead": {name: float(np.median(values / plain_seconds)) for name, values in seconds.items()},
            "precision": loop.trainer.precision,
            "zero_stage": loop.trainer.job.deepspeed["zero_optimization"]["stage"],
        }  # fmt: skip

    return with_student_job(config_file, overrides, use)


class CountedBatches(Batches):
    """Batches that record their shapes."""

    shapes: list[tuple[int, ...]]

    def of(self, rows_B: np.ndarray) -> Batch:
        batch = super().of(rows_B)
        self.shapes.append(tuple(batch.input_ids_BL.shape))
        return batch


def teacher_pass(config_file: str, overrides: list[str], passes: int = 4) -> dict[str, Any]:
    """Time the teacher's pass as the stage `cache` does it, without loading models and writing.

    Returns the seconds of each pass except the first, which loads kernels; its FLOPs; the bfloat16 peak.
    """
    config = load(config_file, overrides)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # like distributed.world.World
    model, tokenizer = load_model(config.teacher.model), load_tokenizer(config.teacher.model)
    shape, precision = shape_of(model.config), resolve_teacher_precision(config.cache.precision, device)
    layers = paired_layers(config.distill.patience, shape.layers, len(config.student.layers or ()))
    task, seconds, together = tasks.resolve(config.task), [], SORTED_ROWS[device.type]
    with tempfile.TemporaryDirectory() as scratch:
        split = text.read(config.task.data, "train", task, task.classes)
        tokens = tokenize(split, tokenizer, config.task.max_length, Path(scratch) / "tokens")
        teacher = LiveTeacher(model, layers, precision, config.cache.dtype, False, device)
        for _ in range(passes):
            batches, clock = CountedBatches(tokens, tokenizer.pad_token_id, device), Clock()
            batches.shapes = []
            with clock.running():
                for start in range(0, len(tokens), together):
                    answer(np.arange(start, min(len(tokens), start + together)), batches, teacher)
            seconds.append(clock.seconds)
    return {
        "seconds": seconds[1:], "precision": precision, "batches": len(batches.shapes), "examples": len(tokens),
        "flops": sum(shape.forward_flops(*shapes) for shapes in batches.shapes),
        "peak_flops_per_second": peak(torch.bfloat16, device),
    }  # fmt: skip
