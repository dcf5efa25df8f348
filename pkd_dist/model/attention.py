"""Queries, keys and values of an encoder layer, computed from the hidden states that enter the layer.

The layers themselves are left alone: fused ones (`fused_layer.py`) and those for the first token alone (`first_token.py`) never
compute these tensors, and hidden states are what the teacher cache stores.

Shapes: B examples, L tokens, P layers, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pkd_dist.config.distill import Distill
from pkd_dist.errors import UserError
from pkd_dist.model.families import encoder_layers, num_layers, shares_layers

_BERT = ("attention.self.query", "attention.self.key", "attention.self.value")
_PROJECTIONS: dict[str, tuple[str, ...]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "albert": ("attention.query", "attention.key", "attention.value"),
    "mpnet": ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    "deberta-v2": ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
    "modernbert": ("attn.Wqkv",),
}
"""`model_type` -> a layer's projections to queries, keys and values, by name; one module returns all three in a row."""
_NORMS = {"modernbert": "attn_norm"}
"""`model_type` -> the norm between a layer's input and its projections, where there is one."""
_SCORES_ADD_POSITIONS = ("mpnet", "deberta-v2", "modernbert")
"""`model_type`s whose attention scores are more than products of these queries and keys."""


def projections(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the names of a layer's projections to queries, keys and values; none if they are not known."""
    return _PROJECTIONS.get(config.model_type, ())


def layer_module(model: PreTrainedModel, layer: int) -> nn.Module:
    """Return an encoder layer, counted from 1.

    Raises:
        UserError: The model has no list of encoder layers.
    """
    if shares_layers(model.config):
        group = (layer - 1) * model.config.num_hidden_groups // num_layers(model.config)
        return model.base_model.get_submodule(f"encoder.albert_layer_groups.{group}.albert_layers.0")
    found = encoder_layers(model)[1]
    if found is None:
        raise UserError(f"{type(model).__name__} has no list of encoder layers to read queries, keys and values from")
    return found[layer - 1]


def queries_keys_values(layer: nn.Module, family: str, hidden_BLH: torch.Tensor) -> torch.Tensor:
    """Return queries, keys and values, (B, L, 3, H), the heads of each concatenated.

    Args:
        layer: From `layer_module`.
        family: `model_type` of its model, one of those that `require_comparable` allows.
        hidden_BLH: The hidden states that enter the layer, those of the layer before.
    """
    if family in _NORMS:
        hidden_BLH = layer.get_submodule(_NORMS[family])(hidden_BLH)
    projected = [layer.get_submodule(name)(hidden_BLH) for name in _PROJECTIONS[family]]
    return torch.cat(projected, dim=-1).unflatten(-1, (3, -1))


@dataclass(frozen=True)
class TeacherAttention:
    """Computes the queries, keys and values of some layers of a teacher, without gradients.

    Attributes:
        heads: attention heads of the teacher.
    """

    heads: int
    _family: str
    _layers: tuple[nn.Module, ...]
    _dtype: torch.dtype

    @torch.no_grad()
    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return (B, L, P, 3, H), from the hidden states (B, L, H) that enter each of the P layers."""
        layers = zip(self._layers, inputs, strict=True)
        return torch.stack([queries_keys_values(layer, self._family, x.to(self._dtype)) for layer, x in layers], dim=2)


def teacher_attention(
    model: PreTrainedModel, layers: Sequence[int], dtype: torch.dtype, device: torch.device
) -> TeacherAttention:
    """Copy what `TeacherAttention` needs of a teacher.

    Args:
        layers: Counted from 1.
        dtype, device: Of the computation.
    """
    copies = tuple(copy.deepcopy(layer_module(model, layer)).to(device, dtype).eval() for layer in layers)
    return TeacherAttention(model.config.num_attention_heads, model.config.model_type, copies, dtype)


def require_comparable(distill: Distill, teacher: PretrainedConfig, student: PretrainedConfig) -> None:
    """Check that the losses on queries, keys and values can be computed for two models.

    Raises:
        UserError: A family's projections are not known or do not make its scores, or numbers of heads do not match.
    """
    for term, refused in (("relations", ()), ("attention", _SCORES_ADD_POSITIONS)):
        known = [family for family in _PROJECTIONS if family not in refused]
        for side, config in (("teacher", teacher), ("student", student)):
            if getattr(distill, term) and config.model_type not in known:
                raise UserError(
                    f"distill.{term}: the {side} is a {config.model_type}, "
                    + ("whose attention scores depend on positions as well" if config.model_type in refused else
                       "whose queries, keys and values are not known")
                    + f"; it works for {', '.join(known)}"
                )  # fmt: skip
    heads = distill.relation_heads or teacher.num_attention_heads
    for side, config in (("teacher", teacher), ("student", student)):
        if distill.relations and config.hidden_size % heads:
            raise UserError(
                f"distill.relation_heads: {heads} does not divide the {side}'s width, {config.hidden_size}; give a number "
                "that divides the widths of both models"
            )
    if distill.attention and teacher.num_attention_heads != student.num_attention_heads:
        raise UserError(
            f"distill.attention: the teacher has {teacher.num_attention_heads} attention heads, the student "
            f"{student.num_attention_heads}; use distill.relations, which needs no equal number"
        )
