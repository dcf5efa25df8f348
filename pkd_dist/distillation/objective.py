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

from pkd_dist.config.distill import Distill
from pkd_dist.data.batches import Batch, pinned
from pkd_dist.distillation.cache import CacheReader
from pkd_dist.distillation.losses import (
    attention_loss,
    gram_loss,
    hard_loss,
    multilabel_soft_loss,
    patience_loss,
    relation_loss,
    soft_loss,
)
from pkd_dist.distillation.teacher import LiveTeacher
from pkd_dist.model.attention import TeacherAttention
from pkd_dist.model.layers import LayerMap
from pkd_dist.model.outputs import Forward, Outputs

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


class RecomputedStates:
    """Reads the teacher's logits from the cache, and computes its hidden states in a forward pass."""

    def __init__(self, reader: CacheReader, teacher: LiveTeacher):
        self._reader, self._outputs, self._device = reader, live_outputs(teacher), teacher.device

    def __call__(self, batch: Batch) -> Batch:
        logits, _ = self._reader.rows_of(np.asarray(batch.ids_B), 0)
        return replace(self._outputs(batch), teacher_logits_BC=pinned(logits, self._device))


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
        layers: what is compared; the teacher's states in a batch are those of `layers.teacher_states`.
        class_weights_C: see `hard_loss`.
        attention: the teacher's queries, keys and values; None if none are compared.
    """

    distill: Distill
    layers: LayerMap
    class_weights_C: torch.Tensor | None = None
    attention: TeacherAttention | None = None

    def __call__(self, student: Forward, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the terms in use and their weighted sum `total`, each (B,)."""
        distill, layers = self.distill, self.layers
        paired, attended = ([layer for layer, _ in pairs] for pairs in (layers.pairs, layers.attention))
        mine = student(batch.inputs, paired, distill.compares_tokens, attended)
        terms = {"ce": hard_loss(mine.logits_BC, batch.labels_B, self.class_weights_C)}
        used = [name for name in _TERMS if distill.weights[name] and (name != "pt" or paired)]
        if used:
            its = self._teacher(batch)
            terms |= {name: _TERMS[name](self, batch, mine, its) for name in used}
        weighted = (distill.weights[name] * values_B for name, values_B in terms.items())
        return {"total": functools.reduce(torch.add, weighted), **terms}

    def _teacher(self, batch: Batch) -> Outputs:
        """Return the teacher's outputs of the layers that are compared."""
        logits_BC, states = batch.teacher_logits_BC, batch.teacher_states
        assert logits_BC is not None and states is not None
        paired = states[..., : len(self.layers.pairs), :]
        attention = (
            self.attention([states[..., i, :] for i in self.layers.attention_inputs]) if self.attention else None
        )
        return Outputs(logits_BC, paired, paired, attention)


def _soft(loss: DistillationLoss, batch: Batch, mine: Outputs, its: Outputs) -> torch.Tensor:
    distance = multilabel_soft_loss if batch.labels_B.ndim == 2 else soft_loss
    return distance(mine.logits_BC, its.logits_BC, loss.distill.temperature, loss.distill.ds_reduction)


def _patience(loss: DistillationLoss, batch: Batch, mine: Outputs, its: Outputs) -> torch.Tensor:
    d = loss.distill
    assert mine.states is not None and its.states is not None
    if d.states == "tokens":
        return patience_loss(mine.states, its.states, d.normalize, d.pt_reduction, batch.attention_mask_BL)
    first, second = _first(mine.states, d.compares_tokens), _first(its.states, d.all_tokens)
    return patience_loss(first, second, d.normalize, d.pt_reduction)


def _gram(loss: DistillationLoss, batch: Batch, mine: Outputs, its: Outputs) -> torch.Tensor:
    assert mine.own_states is not None and its.own_states is not None
    return gram_loss(mine.own_states, its.own_states, batch.attention_mask_BL)


def _relations(loss: DistillationLoss, batch: Batch, mine: Outputs, its: Outputs) -> torch.Tensor:
    assert mine.attention is not None and its.attention is not None and loss.attention is not None
    heads = loss.distill.relation_heads or loss.attention.heads
    return relation_loss(mine.attention[:, :, -1], its.attention[:, :, -1], heads, batch.attention_mask_BL)


def _attention(loss: DistillationLoss, batch: Batch, mine: Outputs, its: Outputs) -> torch.Tensor:
    assert mine.attention is not None and its.attention is not None and loss.attention is not None
    return attention_loss(mine.attention, its.attention, loss.attention.heads, batch.attention_mask_BL)


def _first(states: torch.Tensor, of_tokens: bool) -> torch.Tensor:
    """Return the states of [CLS], (B, M, H) or (B, O, M, H), also from states of all tokens."""
    return states[:, 0] if of_tokens else states


_TERMS: dict[str, Callable[[DistillationLoss, Batch, Outputs, Outputs], torch.Tensor]] = {
    "ds": _soft,
    "pt": _patience,
    "gram": _gram,
    "rel": _relations,
    "att": _attention,
}
"""Term of `Distill.weights` -> its values (B,), from the outputs of student and teacher. CE needs no teacher."""
