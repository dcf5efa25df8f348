"""Time the teacher's pass over the training text as the stage `cache` does it, without loading models and writing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers.flops import peak
from benchmarks.peers.subject import Clock, shape_of
from pkd_dist.config.schema import Config
from pkd_dist.data import tasks, text
from pkd_dist.data.batches import Batch
from pkd_dist.data.tokens import tokenize
from pkd_dist.distillation.cache_builder import Batches, LiveTeacher, answer, resolve_teacher_precision
from pkd_dist.model.encoder import load_model, load_tokenizer
from pkd_dist.model.layers import paired_layers

SORTED_ROWS = {"cpu": 4096, "cuda": 65536}
"""Rows that are sorted by length together: those of one shard, or of many."""


class CountedBatches(Batches):
    """Batches that record their shapes."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.shapes: list[tuple[int, ...]] = []

    def of(self, rows_B: np.ndarray) -> Batch:
        batch = super().of(rows_B)
        self.shapes.append(tuple(batch.input_ids_BL.shape))
        return batch


def measure(config: Config, passes: int = 4) -> dict[str, Any]:
    """Return the seconds of each pass except the first, which loads kernels; the FLOPs of a pass; the bfloat16 peak."""
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
            with clock.running():
                for start in range(0, len(tokens), together):
                    answer(np.arange(start, min(len(tokens), start + together)), batches, teacher)
            seconds.append(clock.seconds)
    return {
        "seconds": seconds[1:], "precision": precision, "batches": len(batches.shapes), "examples": len(tokens),
        "flops": sum(shape.forward_flops(*shapes) for shapes in batches.shapes),
        "peak_flops_per_second": peak(torch.bfloat16, device),
    }  # fmt: skip
