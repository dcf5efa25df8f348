"""A word embedding of the tokens that occur in a data set: for a training, restored to all tokens after it, or for good.

Embedding rows that never occur get no gradient, so AdamW only decays them. They are left out of the trained table and put
back on export, decayed by the product of (1 - learning rate * weight decay) over all steps. The result is the same;
optimizer states, gradients and messages between ranks shrink with the table.

`trim_embedding` cuts it for good, for a tokenizer of fewer tokens (`student.vocabulary: used`).

Shapes: V token ids, K kept ones, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pkd_dist.model.families import positions_follow_padding


def used_vocabulary(token_arrays: Iterable[np.ndarray], size: int, pad_id: int) -> np.ndarray:
    """Return the token ids that occur, and the padding id, ascending.

    Args:
        size: Of the vocabulary.
    """
    used = np.zeros(size, dtype=bool)
    used[pad_id] = True
    for array in token_arrays:
        for start in range(0, len(array), 1 << 20):
            used[array[start : start + (1 << 20)]] = True
    return np.flatnonzero(used)


class CompactVocabulary(nn.Module):
    """Replaces a model's word embedding by its rows `used_V`; the forward pass maps token ids to rows.

    Args:
        model: Changed in place; its embedding must be plain (`has_plain_vocabulary`).
        used_V: Ascending token ids; other ids in the input raise an IndexError.
    """

    def __init__(self, model: PreTrainedModel, used_V: np.ndarray):
        super().__init__()
        full = model.get_input_embeddings()
        assert isinstance(full, nn.Embedding)
        pad = full.padding_idx
        if pad is not None and positions_follow_padding(model.config):
            used_V = np.union1d(used_V, np.arange(pad + 1))  # keeps the padding id, from which positions are counted
        used = torch.from_numpy(used_V)
        self.name = next(name for name, p in model.named_parameters() if p is full.weight)
        self._start_VH = full.weight.detach().clone()
        row_of_id = torch.full((full.num_embeddings,), len(used), dtype=torch.int64)  # out of range unless used
        row_of_id[used] = torch.arange(len(used))
        padding = int(row_of_id[pad]) if pad is not None and pad in used_V else None
        compact = nn.Embedding(len(used), full.embedding_dim, padding_idx=padding, dtype=full.weight.dtype)
        with torch.no_grad():
            compact.weight.copy_(full.weight[used])
        model.set_input_embeddings(compact)
        self.row_of_id: torch.Tensor
        self.used: torch.Tensor
        self.register_buffer("row_of_id", row_of_id, persistent=False)
        self.register_buffer("used", used)  # saved with the weights, which cannot be read without it

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Map token ids to rows of the compact table, same shape."""
        return self.row_of_id[input_ids]

    def full_table(self, compact_VH: torch.Tensor, decay: float) -> torch.Tensor:
        """Return the full table: the trained rows, and the others as AdamW's decay leaves them. See `full_embedding`."""
        return full_embedding(self._start_VH, self.used.cpu(), compact_VH, decay)


def full_embedding(start_VH: torch.Tensor, used: torch.Tensor, compact_VH: torch.Tensor, decay: float) -> torch.Tensor:
    """Return the full embedding table.

    Args:
        start_VH: The full table before training.
        used: Ids of the trained rows.
        compact_VH: The trained rows; their dtype is that of the result.
        decay: Factor of the other rows: the product of (1 - learning rate * weight decay) over the steps.
    """
    full_VH = (start_VH.double() * decay).to(compact_VH.dtype)
    full_VH[used] = compact_VH
    return full_VH


def has_plain_vocabulary(model: PreTrainedModel) -> bool:
    """Return whether the word embedding is a plain table that nothing else in the model shares."""
    table = model.get_input_embeddings()
    if type(table) is not nn.Embedding:
        return False
    return sum(p is table.weight for _, p in model.named_parameters(remove_duplicate=False)) == 1


def token_ids(config: PretrainedConfig) -> dict[str, int]:
    """Return the fields of a model's configuration that name a token, with its id."""
    names = [name for name in vars(config) if name.endswith("_token_id")]
    return {name: value for name in names if isinstance(value := getattr(config, name), int) and value >= 0}


def required_ids(config: PretrainedConfig) -> list[int]:
    """Return the ids that a model with fewer tokens must keep: those its configuration names, and all that positions follow."""
    named = token_ids(config)
    below = range(named["pad_token_id"] + 1) if positions_follow_padding(config) else ()
    return [*named.values(), *below]


def trim_embedding(model: PreTrainedModel, kept_K: np.ndarray) -> None:
    """Keep some rows of a model's word embedding, in place: the id of a token becomes its place in `kept_K`.

    Args:
        model: Its embedding must be plain (`has_plain_vocabulary`).
        kept_K: Ascending token ids, among them `required_ids`.
    """
    full = model.get_input_embeddings()
    assert isinstance(full, nn.Embedding)
    new_id = {id_: new for new, id_ in enumerate(kept_K.tolist())}
    trimmed = nn.Embedding(
        len(kept_K), full.embedding_dim, padding_idx=new_id.get(full.padding_idx), dtype=full.weight.dtype
    )
    with torch.no_grad():
        trimmed.weight.copy_(full.weight[torch.from_numpy(kept_K)])
    model.set_input_embeddings(trimmed)
    for name, id_ in token_ids(model.config).items():
        setattr(model.config, name, new_id.get(id_))
    model.config.vocab_size = len(kept_K)
