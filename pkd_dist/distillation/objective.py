"""The loss of a training step, and the source of its teacher outputs.

An `AddTeacherOutputs` function adds the teacher's logits and hidden states to a batch, from the cache or from a forward pass.
`DistillationLoss` then runs the student on the batch and returns the loss terms per example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from pkd_dist.config.schema import Distill
from pkd_dist.data.batches import Batch
from pkd_dist.distillation.cache import CacheReader
from pkd_dist.distillation.losses import hard_loss, patience_loss, soft_loss
from pkd_dist.distillation.teacher import LiveTeacher

AddTeacherOutputs = Callable[[Batch], Batch]
"""Returns the batch with the teacher outputs added."""
Student = Callable[..., tuple[torch.Tensor, "torch.Tensor | None"]]
"""Maps (inputs, layers, all_tokens) to logits and states, as `Encoder` and the engine around it do."""


class CachedOutputs:
    """Reads the teacher outputs from the cache."""

    def __init__(self, reader: CacheReader):
        self._reader = reader

    def __call__(self, batch: Batch) -> Batch:
        logits, states = self._reader.rows_of(np.asarray(batch.ids_B), batch.input_ids_BL.shape[1])
        return replace(batch, teacher_logits_BC=logits, teacher_states=states)


class CachedClsOutputs(CachedOutputs):
    """Reads [CLS] outputs from the cache, also for a whole data set: implements `data.on_device.TeacherRows`."""

    def nbytes(self, examples: int) -> int:
        return examples * self._reader.row_bytes

    def of(self, ids_N: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return self._reader.rows_of(ids_N, 0)


def cached_outputs(reader: CacheReader) -> CachedOutputs:
    return CachedOutputs(reader) if reader.all_tokens else CachedClsOutputs(reader)


def live_outputs(teacher: LiveTeacher) -> AddTeacherOutputs:
    """Return a source that runs the teacher on each batch."""

    def add_outputs(batch: Batch) -> Batch:
        batch = batch.to(teacher.device)
        logits, states = teacher(batch.inputs)
        # Autograd rejects inference-mode tensors; clones made outside of that mode are ordinary tensors.
        return replace(batch, teacher_logits_BC=logits.clone(), teacher_states=states.clone())

    return add_outputs


@dataclass(frozen=True)
class DistillationLoss:
    """Computes L = (1 - alpha) * CE + alpha * DS + beta * PT per example; see `losses.py`.

    Attributes:
        distill: weights and settings of the terms.
        layers: paired student layers (0: the embeddings), in the order of the teacher's states; may be empty.
        class_weights_C: see `hard_loss`.
    """

    distill: Distill
    layers: tuple[int, ...]
    class_weights_C: torch.Tensor | None = None

    def __call__(self, student: Student, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the terms in use and their weighted sum `total`, each (B,)."""
        d = self.distill
        all_tokens = d.states == "tokens"
        logits_BC, states = student(batch.inputs, self.layers, all_tokens)
        terms = {"ce": hard_loss(logits_BC, batch.labels_B, self.class_weights_C)}
        total = (1 - d.alpha) * terms["ce"]
        if d.alpha:
            assert batch.teacher_logits_BC is not None
            terms["ds"] = soft_loss(logits_BC, batch.teacher_logits_BC, d.temperature, d.ds_reduction)
            total = total + d.alpha * terms["ds"]
        if self.layers:
            assert states is not None and batch.teacher_states is not None
            mask_BL = batch.attention_mask_BL if all_tokens else None
            terms["pt"] = patience_loss(states, batch.teacher_states, d.normalize, d.pt_reduction, mask_BL)
            total = total + d.beta * terms["pt"]
        return {"total": total, **terms}
