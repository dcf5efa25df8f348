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

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

Attend = Callable[[Sequence[nn.Module], int, torch.Tensor, "torch.Tensor | None", float], torch.Tensor]
"""(projections to query, key and value; head size; hidden_BLH; mask; dropout) -> context of the first token, (B, 1, H)."""
_BERT_LIKE = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
"""Families of one layer structure, whose classification heads read the first token of the last layer; DistilBERT's
layer is the same by other names."""
_POSITIONS_FOLLOW_PADDING = (
    "roberta", "xlm-roberta", "camembert", "xlm-roberta-xl", "roberta-prelayernorm", "data2vec-text", "ibert", "mpnet",
    "longformer", "luke", "xmod",
)  # fmt: skip


def positions_follow_padding(config: Any) -> bool:
    """Whether a model counts positions from its padding token's id, over the tokens that are not it."""
    return getattr(config, "model_type", None) in _POSITIONS_FOLLOW_PADDING


def is_bert_like(config: Any) -> bool:
    """Whether a model's layers are those of BERT or DistilBERT."""
    if getattr(config, "model_type", None) not in (*_BERT_LIKE, "distilbert") or getattr(config, "is_decoder", False):
        return False
    return getattr(config, "position_embedding_type", "absolute") == "absolute"


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


def used_vocabulary(token_arrays: Iterable[np.ndarray], size: int, pad_id: int) -> np.ndarray:
    """Ids that occur and the padding's, ascending."""
    used = np.zeros(size, dtype=bool)
    used[pad_id] = True
    for array in token_arrays:
        for start in range(0, len(array), 1 << 20):
            used[array[start : start + (1 << 20)]] = True
    return np.flatnonzero(used)


class CompactVocabulary(nn.Module):
    """Replaces a model's word embedding by the rows in `used_V`, and puts the others back.

    Args:
        model: changed in place.
        used_V: ascending token ids; inputs may hold no others.
    """

    def __init__(self, model: nn.Module, used_V: np.ndarray):
        super().__init__()
        full: nn.Embedding = model.get_input_embeddings()  # type: ignore[operator]
        pad = full.padding_idx
        if pad is not None and positions_follow_padding(model.config):
            used_V = np.union1d(used_V, np.arange(pad + 1))  # so that padding keeps its number
        used = torch.from_numpy(used_V)
        self.name = next(name for name, p in model.named_parameters() if p is full.weight)
        self._start = full.weight.detach().clone()
        place = torch.full((full.num_embeddings,), len(used), dtype=torch.int64)  # an id not in the table is refused
        place[used] = torch.arange(len(used))
        padding = int(place[pad]) if pad is not None and pad in used_V else None
        compact = nn.Embedding(len(used), full.embedding_dim, padding_idx=padding, dtype=full.weight.dtype)
        with torch.no_grad():
            compact.weight.copy_(full.weight[used])
        model.set_input_embeddings(compact)  # type: ignore[operator]
        self.place: torch.Tensor
        self.used: torch.Tensor
        self.register_buffer("place", place, persistent=False)
        self.register_buffer("used", used)  # kept with the weights, which are of no use without it

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids -> rows of the compact table."""
        return self.place[input_ids]

    def whole(self, compact_VH: torch.Tensor, decay: float) -> torch.Tensor:
        """The full table: trained rows, and the others as AdamW's decay alone leaves them."""
        return put_back(self._start, self.used.cpu(), compact_VH, decay)


def put_back(start_VH: torch.Tensor, used: torch.Tensor, compact_VH: torch.Tensor, decay: float) -> torch.Tensor:
    """A full embedding table of the rows that were trained (at ids `used`) and of the others, decayed from their start."""
    full = (start_VH.double() * decay).to(compact_VH.dtype)
    full[used] = compact_VH
    return full


def has_plain_vocabulary(model: nn.Module) -> bool:
    """Whether the word embedding is a plain table that nothing else in the model uses."""
    table: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    if type(table) is not nn.Embedding:
        return False
    return sum(p is table.weight for _, p in model.named_parameters(remove_duplicate=False)) == 1
