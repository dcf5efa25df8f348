"""The same computation with less of it: what distillation never uses is not computed, what never changes is not trained.

Two exact savings, applied to a live model in place; its parameters keep their names.

`only_first_token`: classifiers read the last layer at [CLS] alone, so that layer computes the first token alone, which
takes nothing but a weighted mean of the others' states. (A third of a 3-layer encoder's arithmetic.)

`CompactVocabulary`: a data set uses a part of the vocabulary. Rows of the embedding that never occur get no gradient, so
AdamW only decays them; they are taken out of the trained table and put back, decayed by the product of all
(1 - learning rate * weight decay), when weights are exported. Optimizer, gradients and messages shrink with the table.

Where a model's family does not allow a saving it is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pkd_dist.model.families import is_bert_like

Attend = Callable[[Sequence[nn.Module], int, torch.Tensor, "torch.Tensor | None", float], torch.Tensor]
"""(projections to query, key and value; head size; hidden_BLH; mask; dropout) -> context of the first token, (B, 1, H)."""


def only_first_token(model: Any, layers: nn.ModuleList | None, attend: Attend | None = None) -> bool:
    """Makes the last encoder layer compute its output for the first token alone; (B, L, H) in, (B, 1, H) out.

    Args:
        attend: in place of `attend_first`.

    Returns:
        False where the model's family is not known to read the first token alone; the model is then unchanged.
    """
    if layers is None or not is_bert_like(model.config):
        return False
    forward = _first_token_block if model.config.model_type == "distilbert" else _first_token_layer
    layers[-1].forward = partial(forward, layers[-1], attend or attend_first)
    return True


def _first_token_layer(
    layer: Any, attend: Attend, hidden_BLH: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: Any, **__: Any
) -> torch.Tensor:
    attention, first_B1H = layer.attention.self, hidden_BLH[:, :1]
    parts, dropout = (attention.query, attention.key, attention.value), attention.dropout.p if layer.training else 0.0
    context_B1H = attend(parts, attention.attention_head_size, hidden_BLH, attention_mask, dropout)
    return layer.feed_forward_chunk(layer.attention.output(context_B1H, first_B1H))


def _first_token_block(
    layer: Any, attend: Attend, hidden_BLH: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: Any, **__: Any
) -> torch.Tensor:
    attention, first_B1H = layer.attention, hidden_BLH[:, :1]
    parts, dropout = (attention.q_lin, attention.k_lin, attention.v_lin), attention.dropout.p if layer.training else 0.0
    context_B1H = attend(parts, attention.attention_head_size, hidden_BLH, attention_mask, dropout)
    attended_B1H = layer.sa_layer_norm(attention.out_lin(context_B1H) + first_B1H)
    return layer.output_layer_norm(layer.ffn(attended_B1H) + attended_B1H)


def attend_first(
    parts: Sequence[Any], head_size: int, hidden_BLH: torch.Tensor, mask: torch.Tensor | None, dropout: float
) -> torch.Tensor:
    """What the first token takes from all, (B, 1, H), through the projections to query, key and value.

    With one query, no token's key and value is needed: query · (K x + b) is (Kᵀ query) · x + query · b, and the mean of
    (V x + c) over the tokens is V of the mean of x, plus c. A: heads; d: head size.
    """
    query, key, value = parts
    query_ABd = query(hidden_BLH[:, 0]).unflatten(-1, (-1, head_size)).transpose(0, 1)
    into_AdH, out_AdH = (part.weight.unflatten(0, (-1, head_size)) for part in (key, value))
    bias_A1d, shift_A1d = (part.bias.unflatten(0, (-1, 1, head_size)) for part in (key, value))
    if torch.is_autocast_enabled(hidden_BLH.device.type):  # they may be of its dtype; what is added stays wide
        bias_A1d, shift_A1d = bias_A1d.float(), shift_A1d.float()
    sought_BAH = (query_ABd @ into_AdH).transpose(0, 1)
    constant_BA1 = (query_ABd * bias_A1d).sum(-1, keepdim=True).transpose(0, 1)  # gives the bias its gradient, zero
    scores_BAL = (sought_BAH @ hidden_BLH.transpose(1, 2) + constant_BA1) * head_size**-0.5
    if mask is not None:
        first_B1L = mask[:, 0, :1]
        if first_B1L.dtype == torch.bool:
            first_B1L = torch.zeros_like(first_B1L, dtype=scores_BAL.dtype).masked_fill(
                ~first_B1L, torch.finfo(scores_BAL.dtype).min
            )
        scores_BAL = scores_BAL + first_B1L
    share_BAL = F.dropout(scores_BAL.softmax(-1), dropout)
    mean_ABH = (share_BAL @ hidden_BLH).transpose(0, 1)
    weight_AB1 = share_BAL.sum(-1, keepdim=True).transpose(0, 1)  # 1 but for dropout
    context_ABd = mean_ABH @ out_AdH.transpose(1, 2) + weight_AB1 * shift_A1d
    return context_ABd.transpose(0, 1).flatten(1)[:, None]
