"""Measurements of our own parts: a step with and without an engine, and the teacher's pass.

For the step the same student takes the same batches on one rank, in blocks of steps that alternate:

    plain     a hand-written loop: autocast, backward, clipping, torch's fused AdamW
    engine    the same loop through the project's engine
    loop      a step of the project's training loop: the engine, metrics, records, agreement on stop signals; on a GPU
              the whole step is one CUDA graph
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.subject import Clock, peak, shape_of
from benchmarks.probe import with_student_job
from pkd_dist.config.load import load
from pkd_dist.data import tasks, text
from pkd_dist.data.batches import Batch
from pkd_dist.data.tokens import tokenize
from pkd_dist.distillation.teacher import LiveTeacher, TeacherBatches, resolve_teacher_precision, run_teacher
from pkd_dist.distributed.world import World
from pkd_dist.model.encoder import load_model, load_tokenizer
from pkd_dist.model.layers import paired_layers
from pkd_dist.telemetry import Telemetry
from pkd_dist.training.engine import resolve_precision
from pkd_dist.training.job import Forward, Job
from pkd_dist.training.optimization import Schedule, autocast, make_adamw, set_learning_rate
from pkd_dist.training.step import StepInputs
from pkd_dist.training.trainer import Trainer, open_trainer

WARMUP = 3
SORTED_ROWS = {"cpu": 4096, "cuda": 65536}
"""Rows that the teacher's pass sorts by length together: those of one shard, or of many."""


class Plain:
    """A student in a hand-written loop. Its forward pass is called like an engine."""

    def __init__(self, job: Job, schedule: Schedule, device: torch.device):
        self.job, self.module, self.device, self.schedule = job, job.module.to(device).train(), device, schedule
        config = resolve_precision(job.deepspeed, device)[0].get("torch_autocast", {})
        self._autocast = autocast(device, getattr(torch, config["dtype"]) if config.get("enabled") else None)
        self._adam = make_adamw(self.module, job.settings)

    def __call__(self, *arguments: Any) -> Any:
        with self._autocast:
            return self.module(*arguments)

    def step(self, micro: list[Batch], step: int) -> None:
        for batch in micro:
            _loss(self.job, self, batch.to(self.device)).backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.job.settings.max_grad_norm)
        set_learning_rate(self._adam, self.schedule.learning_rate(step))
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)


def _loss(job: Job, forward: Forward, batch: Batch) -> torch.Tensor:
    return (job.losses(forward, batch)["total"] * batch.weight_B).sum()


def _step_through_engine(trainer: Trainer, micro: list[Batch], step: int) -> None:
    engine = trainer.engine
    for i, batch in enumerate(micro):
        engine.backward(_loss(trainer.job, engine, batch.to(trainer.world.device)))
        if i + 1 < len(micro):
            engine.end_micro_batch()
    engine.step(step)


def engine(config_file: str, overrides: list[str], block: int, blocks: int) -> dict[str, Any]:
    """Return the seconds of each block of `block` steps, `blocks` of each kind."""

    def use(job: Job, world: World, telemetry: Telemetry) -> dict[str, Any]:
        torch.manual_seed(job.seed)
        # copied before an engine changes the module in place; a graph cannot capture a module another engine trained
        modules = [copy.deepcopy(job.module) for _ in range(2)]
        apart = replace(job, module=modules[1], folder=job.folder / "engine", records=job.folder / "engine.jsonl")
        through, loop = open_trainer(apart, world, telemetry), open_trainer(job, world, telemetry)
        plain = Plain(replace(job, module=modules[0]), loop.engine.schedule, world.device)
        inputs = StepInputs(job, world, loop.engine)

        def batches(step: int) -> list[Batch]:
            return [inputs.with_teacher(batch) for batch in inputs.batches.step(*inputs.position(step))]

        ways: dict[str, Callable[[int], None]] = {
            "plain": lambda step: plain.step(batches(step), step),
            "engine": lambda step: _step_through_engine(through, batches(step), step),
            "loop": lambda step: loop.train_step(),  # keeps its own count
        }
        for trainer in (through, loop):
            trainer.engine.train()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for step in range(WARMUP):
            for way in ways.values():
                way(step)
        for number in range(blocks):
            for name in [*ways][number % 3 :] + [*ways][: number % 3]:
                clock = Clock()
                with clock.running():
                    for step in range(number * block, (number + 1) * block):
                        ways[name](WARMUP + step)
                seconds[name].append(clock.seconds)
        plain_seconds = np.array(seconds["plain"])
        return {
            "steps_of_a_block": block, "seconds": seconds,
            "step_seconds": {name: float(np.median(values)) / block for name, values in seconds.items()},
            "overhead": {name: float(np.median(values / plain_seconds)) for name, values in seconds.items()},
            "precision": resolve_precision(job.deepspeed, world.device)[1],
            "zero_stage": job.deepspeed["zero_optimization"]["stage"],
        }  # fmt: skip

    return with_student_job(config_file, overrides, use)


class CountedBatches(TeacherBatches):
    """Batches that record their shapes."""

    shapes: list[tuple[int, ...]]

    def of(self, rows_B: np.ndarray) -> Batch:
        batch = super().of(rows_B)
        self.shapes.append(tuple(batch.input_ids_BL.shape))
        return batch


def teacher_pass(config_file: str, overrides: list[str], passes: int = 4) -> dict[str, Any]:
    """Time the teacher's pass as the stage `cache` does it; the first of the passes, which loads kernels, does not count."""
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
                    run_teacher(np.arange(start, min(len(tokens), start + together)), batches, teacher)
            seconds.append(clock.seconds)
    return {
        "seconds": seconds[1:], "precision": precision, "batches": len(batches.shapes), "examples": len(tokens),
        "flops": sum(shape.forward_flops(*shapes) for shapes in batches.shapes),
        "peak_flops_per_second": peak(torch.float32 if precision == "float32" else torch.bfloat16, device),
    }  # fmt: skip
