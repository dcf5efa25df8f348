"""A data set on the GPU, with the teacher's answers to it: a batch is gathered there, from the numbers of its rows alone.

Batches made on the host would take it longer than a small student's whole step takes the GPU. Where the data set is too
large for that, or the teacher answers live or for every token, the host makes them (`collate`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from pkd_dist.data.batches import Batch, padded_length, pinned
from pkd_dist.data.tokens import TokenSet

_SHARE = 0.25
"""Of the GPU's free memory that a data set may take."""
_BYTES = 1 << 26
"""That pass through the host's memory at once."""
_NOBODY = np.empty(0, dtype=np.int64)


@runtime_checkable
class TeacherRows(Protocol):
    """The teacher's answers to a whole data set."""

    def nbytes(self, examples: int) -> int:
        """Of the answers to so many examples."""

    def of(self, ids_N: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, C) and states (N, M, H) of [CLS]."""


@dataclass(frozen=True)
class Rows:
    """A batch that is still to be gathered.

    Attributes:
        rows_B: int64 positions in the token set.
        weight_B: as in `Batch`.
        length: tokens of a row, padding included.
        tokens: real tokens in it.
    """

    source: DeviceTokens
    rows_B: torch.Tensor
    weight_B: torch.Tensor
    length: int
    tokens: int

    @property
    def key(self) -> tuple[int, ...]:
        return len(self.rows_B), self.length

    def to(self, device: torch.device) -> Rows:
        return replace(self, rows_B=pinned(self.rows_B, device), weight_B=pinned(self.weight_B, device))

    def fill(self, other: Rows) -> None:
        """Takes over the rows of another batch of the same key, into the memory of its own."""
        for mine, theirs in ((self.rows_B, other.rows_B), (self.weight_B, other.weight_B)):
            mine.copy_(theirs.pin_memory(), non_blocking=True)

    def batch(self) -> Batch:
        """By operations of the device alone."""
        return self.source.gather(self)


class DeviceTokens:
    """A token set and the teacher's answers in a device's memory.

    Args:
        answers: None: the losses need none.
    """

    def __init__(self, tokens: TokenSet, answers: TeacherRows | None, pad_id: int, device: torch.device):
        def moved(array: np.ndarray) -> torch.Tensor:
            parts = ((torch.from_numpy(np.array(part)),) for part in _parts(array, _BYTES // array.itemsize))
            return _put_together(parts, len(array), device)[0]

        self._pad_id, self._lengths_N = pad_id, tokens.lengths_N
        self._input_ids_T, self._offsets_N1, self._labels_N = map(
            moved, (tokens.input_ids_T, tokens.offsets_N1, tokens.labels_N)
        )
        self._type_ids_T = None if tokens.type_ids_T is None else moved(tokens.type_ids_T)
        self._logits_NC: torch.Tensor | None = None
        self._states_NMH: torch.Tensor | None = None
        if answers:
            parts = (answers.of(ids) for ids in _parts(tokens.ids_N, _BYTES // answers.nbytes(1)))
            self._logits_NC, self._states_NMH = _put_together(parts, len(tokens), device)

    def rows(self, rows_B: np.ndarray, weight_B: np.ndarray) -> Rows:
        lengths_B = self._lengths_N[rows_B]
        return Rows(
            self,
            torch.from_numpy(np.ascontiguousarray(rows_B)),
            torch.from_numpy(weight_B.astype(np.float32)),
            padded_length(lengths_B),
            int(lengths_B[weight_B > 0].sum()),
        )

    def gather(self, rows: Rows) -> Batch:
        """What `collate` and the cache make of the same rows."""
        rows_B = rows.rows_B
        starts_B, stops_B = self._offsets_N1[rows_B], self._offsets_N1[rows_B + 1]
        within_L = torch.arange(rows.length, device=rows_B.device)
        mask_BL = within_L < (stops_B - starts_B)[:, None]
        index_BL = torch.where(mask_BL, starts_B[:, None] + within_L, 0)
        types_BL = None if self._type_ids_T is None else torch.where(mask_BL, self._type_ids_T[index_BL], 0).long()
        return Batch(
            rows_B=_NOBODY,
            ids_B=_NOBODY,
            input_ids_BL=torch.where(mask_BL, self._input_ids_T[index_BL], self._pad_id).long(),
            attention_mask_BL=mask_BL.long(),
            type_ids_BL=types_BL,
            labels_B=self._labels_N[rows_B],
            weight_B=rows.weight_B,
            tokens=rows.tokens,
            teacher_logits_BC=None if self._logits_NC is None else self._logits_NC[rows_B],
            teacher_states=None if self._states_NMH is None else self._states_NMH[rows_B],
        )


def _parts(array: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """An array in parts of `count`, so that the host does not hold all of it."""
    count = max(1, count)
    return (np.asarray(array[i : i + count]) for i in range(0, len(array), count))


def _put_together(parts: Iterable[Sequence[torch.Tensor]], length: int, device: torch.device) -> list[torch.Tensor]:
    """Parts of tensors that belong together, `length` rows in all, one after the other in the device's memory."""
    out: list[torch.Tensor] = []
    start = 0
    for part in parts:
        if not out:
            out = [torch.empty((length, *one.shape[1:]), dtype=one.dtype, device=device) for one in part]
        for whole, one in zip(out, part, strict=True):
            whole[start : start + len(one)] = one
        start += len(part[0])
    return out


def open_device_tokens(
    tokens: TokenSet, answers: object | None, pad_id: int, device: torch.device
) -> DeviceTokens | None:
    """None where it is more than a part of the GPU's free memory, or the teacher cannot say all at once.

    Args:
        answers: `TeacherRows`, or others that are of no use here; None: the losses need none.
    """
    if answers is not None and not isinstance(answers, TeacherRows):
        return None
    arrays = (tokens.input_ids_T, tokens.type_ids_T, tokens.offsets_N1, tokens.labels_N)
    needed = sum(array.nbytes for array in arrays if array is not None)
    needed += answers.nbytes(len(tokens)) if answers else 0
    free, _ = torch.cuda.mem_get_info(device)
    return DeviceTokens(tokens, answers, pad_id, device) if needed <= _SHARE * free else None
