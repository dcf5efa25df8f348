"""Trains the student from labels, the teacher's soft predictions and its intermediate states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pkd_dist.config import Distill
from pkd_dist.data.batches import Batch
from pkd_dist.student.losses import hard_loss, patience_loss, soft_loss
from pkd_dist.teacher.build import LiveTeacher
from pkd_dist.teacher.cache import CacheReader
from pkd_dist.training.engine import Engine

Answers = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]
"""batch -> the teacher's logits (B, C) and states (B, M, H) or (B, L, M, H)."""


def cached_answers(reader: CacheReader, device: torch.device) -> Answers:
    def answers(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logits, states = reader.rows_of(np.asarray(batch.ids_B), batch.input_ids_BL.shape[1])
        return logits.to(device, non_blocking=True), states.to(device, non_blocking=True)

    return answers


def live_answers(teacher: LiveTeacher) -> Answers:
    def answers(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logits, states = teacher(batch.inputs)
        return logits.clone(), states.clone()  # out of inference mode

    return answers


@dataclass(frozen=True)
class DistillationLoss:
    """L = (1 - alpha) * CE + alpha * DS + beta * PT per example; see `losses.py`.

    Attributes:
        answers: where the teacher's side comes from; None where it has no weight.
        layers: student layers (0: the embeddings) that are paired, in the order of the teacher's states; may be empty.
        class_weights_C: see `hard_loss`.
    """

    distill: Distill
    answers: Answers | None
    layers: tuple[int, ...]
    class_weights_C: torch.Tensor | None = None

    def __call__(self, engine: Engine, batch: Batch) -> dict[str, torch.Tensor]:
        d = self.distill
        by_token = d.states == "tokens"
        logits_BC, states = engine(batch.inputs, self.layers, by_token)
        terms = {"ce": hard_loss(logits_BC, batch.labels_B, self.class_weights_C)}
        total = (1 - d.alpha) * terms["ce"]
        if self.answers is not None:
            teacher_BC, teacher_states = self.answers(batch)
        if d.alpha:
            terms["ds"] = soft_loss(logits_BC, teacher_BC, d.temperature, d.ds_reduction)
            total = total + d.alpha * terms["ds"]
        if self.layers:
            mask_BL = batch.attention_mask_BL if by_token else None
            terms["pt"] = patience_loss(states, teacher_states, d.normalize, d.pt_reduction, mask_BL)
            total = total + d.beta * terms["pt"]
        return {"total": total, **terms}
