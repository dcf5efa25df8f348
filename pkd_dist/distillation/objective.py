"""The loss of a training step, and the source of its teacher outputs.

An `AddTeacherOutputs` function adds the teacher's logits and hidden states to a batch, from the cache or from a forward pass.
`DistillationLoss` then runs the student on the batch and returns the loss terms per example.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from pkd_dist.config.schema import Distill
from pkd_dist.data.batches import Batch
from pkd_dist.distillation.cache import CacheReader
from pkd_dist.distillation.losses import gram_loss, hard_loss, patience_loss, soft_loss
from pkd_dist.distillation.teacher import LiveTeacher
from pkd_dist.model.encoder import Forward, Outputs

AddTeacherOutputs = Callable[[Batch], Batch]
"""Returns the batch with the teacher outputs added."""


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
    """Computes L, the weighted sum of the terms in `Distill.weights`, per example; see `losses.py`.

    Attributes:
        distill: weights and settings of the terms.
        layers: paired student layers (0: the embeddings), in the order of the teacher's states; may be empty.
        class_weights_C: see `hard_loss`.
    """

    distill: Distill
    layers: tuple[int, ...]
    class_weights_C: torch.Tensor | None = None

    def __call__(self, student: Forward, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the terms in use and their weighted sum `total`, each (B,)."""
        outputs = student(batch.inputs, self.layers, self.distill.all_tokens)
        weights = self.distill.weights
        terms = {name: _TERMS[name](self, outputs, batch) for name in weights if self._uses(name)}
        return {"total": functools.reduce(torch.add, (weights[name] * terms[name] for name in terms)), **terms}

    def _uses(self, term: str) -> bool:
        """Whether a term is computed: it has a weight, or is CE, which the metrics of every run show."""
        return term == "ce" or (self.distill.weights[term] > 0 and (term != "pt" or bool(self.layers)))

    def hard(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        return hard_loss(outputs.logits_BC, batch.labels_B, self.class_weights_C)

    def soft(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        assert batch.teacher_logits_BC is not None
        d = self.distill
        return soft_loss(outputs.logits_BC, batch.teacher_logits_BC, d.temperature, d.ds_reduction)

    def patience(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        d = self.distill
        mine, theirs = outputs.states, batch.teacher_states
        assert mine is not None and theirs is not None
        if d.states == "tokens":
            return patience_loss(mine, theirs, d.normalize, d.pt_reduction, batch.attention_mask_BL)
        if d.all_tokens:  # for another term
            mine, theirs = mine[:, 0], theirs[:, 0]
        return patience_loss(mine, theirs, d.normalize, d.pt_reduction)

    def gram(self, outputs: Outputs, batch: Batch) -> torch.Tensor:
        assert outputs.own_states is not None and batch.teacher_states is not None
        return gram_loss(outputs.own_states, batch.teacher_states, batch.attention_mask_BL)


_TERMS: dict[str, Callable[[DistillationLoss, Outputs, Batch], torch.Tensor]] = {
    "ce": DistillationLoss.hard,
    "ds": DistillationLoss.soft,
    "pt": DistillationLoss.patience,
    "gram": DistillationLoss.gram,
}
"""Term of `Distill.weights` -> its values, (B,)."""
