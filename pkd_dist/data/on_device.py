"""Keep a token set and the teacher outputs in GPU memory, and gather batches there from row numbers.

For a small student, collating a batch on the host takes longer than the whole step on the GPU. If the data does not fit, or
the teacher runs live or gives states of all tokens, batches are collated on the host instead (`collate`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from pkd_dist.data.batches import Batch, padded_length, pinned
from pkd_dist.data.tokens import TokenSet

_MAX_MEMORY_SHARE = 0.25
"""Share of the GPU's free memory that the data may take."""
_CHUNK_BYTES = 1 << 26
"""Bytes copied through host memory at once."""
_EMPTY = np.empty(0, dtype=np.int64)


@runtime_checkable
class TeacherRows(Protocol):
    """Teacher outputs that can be read for any examples, such as those of a cache."""

    def nbytes(self, examples: int) -> int:
        """Return the size of the outputs of `examples` examples, in bytes."""

    def of(self, ids_N: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (N, C) and [CLS] states (N, M, H)."""


@dataclass(frozen=True)
class PendingBatch:
    """The row numbers of a batch that is still to be gathered on the device.

    Attributes:
        source: the data to gather from.
        rows_B: int64 positions in the token set.
        weight_B: as in `Batch`.
        length: tokens per row, including padding.
        tokens: number of tokens without padding.
    """

    source: DeviceTokens
    rows_B: torch.Tensor
    weight_B: torch.Tensor
    length: int
    tokens: int

    @property
    def key(self) -> tuple[int, ...]:
        """As in `Batch`."""
        return len(self.rows_B), self.length

    def to(self, device: torch.device) -> PendingBatch:
        """Return a copy on a device."""
        return replace(self, rows_B=pinned(self.rows_B, device), weight_B=pinned(self.weight_B, device))

    def fill(self, other: PendingBatch) -> None:
        """Copy the rows of another batch with the same key into this batch's memory."""
        for mine, theirs in ((self.rows_B, other.rows_B), (self.weight_B, other.weight_B)):
            mine.copy_(theirs.pin_memory(), non_blocking=True)

    def batch(self) -> Batch:
        """Return the gathered batch, using operations of the device only."""
        return self.source.gather(self)


class DeviceTokens:
    """A token set and the teacher outputs in device memory.

    Args:
        tokens: the token set.
        teacher: its outputs; None if the loss needs none.
        pad_id: token id of padding.
        device: where to keep them.
    """

    def __init__(self, tokens: TokenSet, teacher: TeacherRows | None, pad_id: int, device: torch.device):
        def upload(array: np.ndarray) -> torch.Tensor:
            chunks = _chunks(array, _CHUNK_BYTES * len(array) // max(1, array.nbytes))
            return _upload(((torch.from_numpy(np.array(chunk)),) for chunk in chunks), len(array), device)[0]

        starts_N, self._host_lengths_N = tokens.spans_of(np.arange(len(tokens)))
        self._pad_id = pad_id
        self._input_ids_T, self._starts_N, self._lengths_N, self._labels_N = map(
            upload, (tokens.input_ids_T, starts_N, self._host_lengths_N, tokens.labels_N)
        )
        self._type_ids_T = None if tokens.type_ids_T is None else upload(tokens.type_ids_T)
        self._logits_NC: torch.Tensor | None = None
        self._states_NMH: torch.Tensor | None = None
        if teacher:
            outputs = (teacher.of(ids) for ids in _chunks(tokens.ids_N, _CHUNK_BYTES // teacher.nbytes(1)))
            self._logits_NC, self._states_NMH = _upload(outputs, len(tokens), device)

    def rows(self, rows_B: np.ndarray, weight_B: np.ndarray) -> PendingBatch:
        """Return the batch of these rows, on the host and not yet gathered."""
        lengths_B = self._host_lengths_N[rows_B]
        return PendingBatch(
            self,
            torch.from_numpy(np.ascontiguousarray(rows_B)),
            torch.from_numpy(weight_B.astype(np.float32)),
            padded_length(lengths_B),
            int(lengths_B[weight_B > 0].sum()),
        )

    def gather(self, pending: PendingBatch) -> Batch:
        """Return the batch that `collate` and the teacher cache would give for the same rows."""
        rows_B = pending.rows_B
        starts_B, lengths_B = self._starts_N[rows_B], self._lengths_N[rows_B]
        within_L = torch.arange(pending.length, device=rows_B.device)
        mask_BL = within_L < lengths_B[..., None]
        index_BL = torch.where(mask_BL, starts_B[..., None] + within_L, 0)
        types_BL = None if self._type_ids_T is None else torch.where(mask_BL, self._type_ids_T[index_BL], 0).long()
        return Batch(
            rows_B=_EMPTY,
            ids_B=_EMPTY,
            input_ids_BL=torch.where(mask_BL, self._input_ids_T[index_BL], self._pad_id).long(),
            attention_mask_BL=mask_BL.long(),
            type_ids_BL=types_BL,
            labels_B=self._labels_N[rows_B],
            weight_B=pending.weight_B,
            tokens=pending.tokens,
            teacher_logits_BC=None if self._logits_NC is None else self._logits_NC[rows_B],
            teacher_states=None if self._states_NMH is None else self._states_NMH[rows_B],
        )


def _chunks(array: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """Yield an array in chunks, so that the host never holds all of it."""
    rows = max(1, rows)
    return (np.asarray(array[i : i + rows]) for i in range(0, len(array), rows))


def _upload(chunks: Iterable[Sequence[torch.Tensor]], rows: int, device: torch.device) -> list[torch.Tensor]:
    """Concatenate chunks in device memory.

    Args:
        chunks: each a sequence of tensors, one per result, with equal numbers of rows.
        rows: total number of rows.
        device: of the results.
    """
    out: list[torch.Tensor] = []
    start = 0
    for chunk in chunks:
        if not out:
            out = [torch.empty((rows, *tensor.shape[1:]), dtype=tensor.dtype, device=device) for tensor in chunk]
        for target, tensor in zip(out, chunk, strict=True):
            target[start : start + len(tensor)] = tensor
        start += len(chunk[0])
    return out


def open_device_tokens(
    tokens: TokenSet, teacher: object | None, pad_id: int, device: torch.device
) -> DeviceTokens | None:
    """Move a token set to the GPU if that is possible.

    Args:
        tokens: the token set.
        teacher: the teacher outputs; None if the loss needs none.
        pad_id: token id of padding.
        device: a GPU.

    Returns:
        None if the data takes more than a quarter of the free memory, or `teacher` is not `TeacherRows`.
    """
    if teacher is not None and not isinstance(teacher, TeacherRows):
        return None
    arrays = (tokens.input_ids_T, tokens.type_ids_T, tokens.labels_N)
    needed = sum(array.nbytes for array in arrays if array is not None)
    needed += 2 * tokens.options * len(tokens) * tokens.offsets_N1.itemsize
    needed += teacher.nbytes(len(tokens)) if teacher else 0
    free, _ = torch.cuda.mem_get_info(device)
    return DeviceTokens(tokens, teacher, pad_id, device) if needed <= _MAX_MEMORY_SHARE * free else None
