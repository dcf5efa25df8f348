"""A last encoder layer that computes its output for the first token alone, the only one that the classifier reads.

That output depends on the other tokens only through an attention-weighted mean of their states, so no keys, values or
feed-forward passes are needed for them: a third less arithmetic in a 3-layer encoder. Results are the same.

Shapes: B examples, L tokens, H hidden size, A heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from pkd_dist.model.families import is_bert_like
from pkd_dist.model.specialize import specialize

Attend = Callable[[Sequence[nn.Linear], int, torch.Tensor, "torch.Tensor | None", float], torch.Tensor]
"""(projections to query, key and value; head size; hidden_BLH; mask; dropout) -> context of the first token, (B, 1, H)."""


def only_first_token(model: PreTrainedModel, layers: nn.ModuleList | None, attend: Attend | None = None) -> bool:
    """Make the last encoder layer compute the first token alone: (B, L, H) in, (B, 1, H) out. Changes the model in place.

    Args:
        model: A classifier.
        layers: From `encoder_layers`.
        attend: Replaces `attend_first`.

    Returns:
        False, with the model unchanged, unless its family reads the first token alone (`is_bert_like`).
    """
    if layers is None or not is_bert_like(model.config):
        return False
    mixin = FirstTokenDistilBertLayer if model.config.model_type == "distilbert" else FirstTokenBertLayer
    specialize(layers[-1], mixin).attend = attend or attend_first
    return True


class FirstTokenLayer(nn.Module):
    """Mixin, placed before a transformers layer class; see `only_first_token`."""

    attention: Any
    attend: Attend


class FirstTokenBertLayer(FirstTokenLayer):
    """For layers of the families that copy BERT's."""

    feed_forward_chunk: Callable[[torch.Tensor], torch.Tensor]

    def forward(
        self, hidden_BLH: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: object, **__: object
    ) -> torch.Tensor:
        attention, first_B1H = self.attention.self, hidden_BLH[:, :1]
        projections, dropout = (attention.query, attention.key, attention.value), attention.dropout.p
        context_B1H = self.attend(
            projections, attention.attention_head_size, hidden_BLH, attention_mask, dropout if self.training else 0.0
        )
        return self.feed_forward_chunk(self.attention.output(context_B1H, first_B1H))


class FirstTokenDistilBertLayer(FirstTokenLayer):
    """For DistilBERT's layers."""

    ffn: nn.Module
    sa_layer_norm: nn.LayerNorm
    output_layer_norm: nn.LayerNorm

    def forward(
        self, hidden_BLH: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: object, **__: object
    ) -> torch.Tensor:
        attention, first_B1H = self.attention, hidden_BLH[:, :1]
        projections, dropout = (attention.q_lin, attention.k_lin, attention.v_lin), attention.dropout.p
        context_B1H = self.attend(
            projections, attention.attention_head_size, hidden_BLH, attention_mask, dropout if self.training else 0.0
        )
        attended_B1H = self.sa_layer_norm(attention.out_lin(context_B1H) + first_B1H)
        return self.output_layer_norm(self.ffn(attended_B1H) + attended_B1H)


def attend_first(
    projections: Sequence[nn.Linear],
    head_size: int,
    hidden_BLH: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Return the attention context of the first token, (B, 1, H).

    With a single query, no token's key or value is needed: query · (K x + b) = (Kᵀ query) · x + query · b, and the mean
    of (V x + c) over the tokens is V (mean of x) + c.

    Args:
        projections: Query, key and value.
        mask: (B, 1, L, L) or (B, 1, 1, L), booleans or numbers to add to the scores.
        dropout: Probability, of the attention weights.
    """
    query, key, value = projections
    query_ABd = query(hidden_BLH[:, 0]).unflatten(-1, (-1, head_size)).transpose(0, 1)
    key_AdH, value_AdH = (linear.weight.unflatten(0, (-1, head_size)) for linear in (key, value))
    key_bias_A1d, value_bias_A1d = (linear.bias.unflatten(0, (-1, 1, head_size)) for linear in (key, value))
    if torch.is_autocast_enabled(hidden_BLH.device.type):  # they may have its dtype; sums stay in float32
        key_bias_A1d, value_bias_A1d = key_bias_A1d.float(), value_bias_A1d.float()
    query_BAH = (query_ABd @ key_AdH).transpose(0, 1)
    constant_BA1 = (query_ABd * key_bias_A1d).sum(-1, keepdim=True).transpose(0, 1)  # gives the bias its zero gradient
    scores_BAL = (query_BAH @ hidden_BLH.transpose(1, 2) + constant_BA1) * head_size**-0.5
    if mask is not None:
        first_B1L = mask[:, 0, :1]
        if first_B1L.dtype == torch.bool:
            first_B1L = torch.zeros_like(first_B1L, dtype=scores_BAL.dtype).masked_fill(
                ~first_B1L, torch.finfo(scores_BAL.dtype).min
            )
        scores_BAL = scores_BAL + first_B1L
    weights_BAL = F.dropout(scores_BAL.softmax(-1), dropout)
    mean_ABH = (weights_BAL @ hidden_BLH).transpose(0, 1)
    sum_AB1 = weights_BAL.sum(-1, keepdim=True).transpose(0, 1)  # 1 without dropout
    context_ABd = mean_ABH @ value_AdH.transpose(1, 2) + sum_AB1 * value_bias_A1d
    return context_ABd.transpose(0, 1).flatten(1)[:, None]
