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

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from pkd_dist.model.families import positions_follow_padding


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
