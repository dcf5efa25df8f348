"""Narrow a model to its most important dimensions, as the start of a student.

A hidden dimension is one of the residual stream, through the whole model; attention heads and feed-forward neurons belong to a
layer. What is removed is chosen by the size of its weights: each weight matrix or vector distributes one point over its dimensions
in proportion to their sums of squares, and those with the most points stay, in their order.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from pkd_dist.model.attention import projections
from pkd_dist.model.families import encoder_layers, is_bert_like
from pkd_dist.model.head import new_model

_OUTPUTS = {"distilbert": ("attention.out_lin", "ffn.lin1", "ffn.lin2")}
_BERT_OUTPUTS = ("attention.output.dense", "intermediate.dense", "output.dense")
"""A layer's projections from the heads, to the feed-forward neurons, and from them, by name."""

HIDDEN, HEADS, NEURONS = "hidden", "heads", "neurons"


@dataclass(frozen=True)
class _Axis:
    """An axis of a parameter that becomes shorter.

    Attributes:
        group: what its entries are: (HIDDEN, "") or (HEADS or NEURONS, a layer).
    """

    name: str
    dim: int
    group: tuple[str, str]


def can_narrow(config: PretrainedConfig) -> bool:
    """Return whether `narrow` knows the layers of a family."""
    return is_bert_like(config)


def narrow(source: PreTrainedModel, config: PretrainedConfig) -> PreTrainedModel:
    """Return a classifier of a narrower configuration with the most important dimensions of another.

    Args:
        source: Of a family that `can_narrow` allows.
        config: The same but for hidden size, heads and feed-forward size; the size of a head is the same.
    """
    target = new_model(config)
    weights = source.state_dict()
    axes = list(_axes(source, target))
    head = config.hidden_size // config.num_attention_heads
    points: dict[tuple[str, str], torch.Tensor | float] = defaultdict(float)
    for axis in axes:
        first = weights[axis.name].double().movedim(axis.dim, 0)
        squares = first.square().reshape(len(first), -1).sum(1)
        points[axis.group] = points[axis.group] + squares / squares.sum().clamp_min(1e-30)
    for axis in axes:
        size = head if axis.group[0] == HEADS else 1
        kept = target.get_parameter(axis.name).shape[axis.dim] // size
        per_unit = torch.as_tensor(points[axis.group]).unflatten(0, (-1, size)).sum(1)
        chosen = per_unit.argsort(descending=True, stable=True)[:kept].sort().values
        index = (chosen[:, None] * size + torch.arange(size)).flatten()
        weights[axis.name] = weights[axis.name].index_select(axis.dim, index)
    target.load_state_dict(weights)
    return target


def _axes(source: PreTrainedModel, target: PreTrainedModel) -> Iterator[_Axis]:
    """Yield the axes of parameters that have another length in the target."""
    layers = re.compile(re.escape(encoder_layers(source)[0]) + r"\.(\d+)\.(.*)\.(?:weight|bias)")
    to_heads = projections(source.config)
    from_heads, to_neurons, from_neurons = _OUTPUTS.get(source.config.model_type, _BERT_OUTPUTS)
    special = {(name, 0): HEADS for name in to_heads} | {(from_heads, 1): HEADS}
    special |= {(to_neurons, 0): NEURONS, (from_neurons, 1): NEURONS}
    for (name, before), (_, after) in zip(source.named_parameters(), target.named_parameters(), strict=True):
        inside = layers.fullmatch(name)
        for dim in (dim for dim in range(before.ndim) if before.shape[dim] != after.shape[dim]):
            kind = special.get((inside[2], dim), HIDDEN) if inside else HIDDEN
            yield _Axis(name, dim, (kind, inside[1] if inside and kind != HIDDEN else ""))
