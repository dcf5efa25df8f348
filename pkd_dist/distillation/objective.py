"""Trains the student from labels, the teacher's soft predictions and its intermediate states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from pkd_dist.config.schema import Distill
from pkd_dist.data.batches import Batch
from pkd_dist.distillation.cache import CacheReader
from pkd_dist.distillation.cache_builder import LiveTeacher
from pkd_dist.distillation.losses import hard_loss, patience_loss, soft_loss

TeacherOutputs = Callable[[Batch], Batch]
"""Adds the teacher's answers to a batch."""
Student = Callable[..., tuple[torch.Tensor, "torch.Tensor | None"]]
"""(inputs, layers, tokens) -> logits and states, as `Encoder`: itself, or the engine around it."""


class CachedOutputs:
    """The teacher's answers from its cache."""

    def __init__(self, reader: CacheReader):
        self._reader = reader

    def __call__(self, batch: Batch) -> Batch:
        logits, states = self._reader.rows_of(np.asarray(batch.ids_B), batch.input_ids_BL.shape[1])
        return replace(batch, teacher_logits_BC=logits, teacher_states=states)


class CachedClsOutputs(CachedOutputs):
    """Those of [CLS] alone: `TeacherRows` too."""

    def nbytes(self, examples: int) -> int:
        return examples * sum(part.nbytes for part in self.of(self._reader.some_id))

    def of(self, ids_N: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return self._reader.rows_of(ids_N, 0)


def cached_outputs(reader: CacheReader) -> CachedOutputs:
    return CachedOutputs(reader) if reader.by_token else CachedClsOutputs(reader)


def live_outputs(teacher: LiveTeacher) -> TeacherOutputs:
    def answers(batch: Batch) -> Batch:
        batch = batch.to(teacher.device)
        logits, states = teacher(batch.inputs)
        return replace(batch, teacher_logits_BC=logits.clone(), teacher_states=states.clone())  # out of inference mode

    return answers


@dataclass(frozen=True)
class DistillationLoss:
    """L = (1 - alpha) * CE + alpha * DS + beta * PT per example; see `losses.py`.

    Attributes:
        layers: student layers (0: the embeddings) that are paired, in the order of the teacher's states; may be empty.
        class_weights_C: see `hard_loss`.
    """

    distill: Distill
    layers: tuple[int, ...]
    class_weights_C: torch.Tensor | None = None

    def __call__(self, student: Student, batch: Batch) -> dict[str, torch.Tensor]:
        d = self.distill
        by_token = d.states == "tokens"
        logits_BC, states = student(batch.inputs, self.layers, by_token)
        terms = {"ce": hard_loss(logits_BC, batch.labels_B, self.class_weights_C)}
        total = (1 - d.alpha) * terms["ce"]
        if d.alpha:
            assert batch.teacher_logits_BC is not None
            terms["ds"] = soft_loss(logits_BC, batch.teacher_logits_BC, d.temperature, d.ds_reduction)
            total = total + d.alpha * terms["ds"]
        if self.layers:
            assert states is not None and batch.teacher_states is not None
            mask_BL = batch.attention_mask_BL if by_token else None
            terms["pt"] = patience_loss(states, batch.teacher_states, d.normalize, d.pt_reduction, mask_BL)
            total = total + d.beta * terms["pt"]
        return {"total": total, **terms}
