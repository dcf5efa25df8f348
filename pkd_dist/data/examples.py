"""Examples: text with labels and stable ids.

An example's id is a 64-bit hash of its text columns and of the number of earlier examples with the same text. It does not
depend on the example's position, so the teacher cache stays valid when a file is reordered.

Shapes: N examples.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

import numpy as np

from pkd_dist.data.columns import TextColumn
from pkd_dist.errors import UserError

if TYPE_CHECKING:
    import torch

UNLABELLED = -1
"""Class index of an example without a label. Regression uses NaN; `is_labelled` handles both."""


@dataclass(frozen=True)
class Split:
    """One split as text, with at least one example.

    Attributes:
        ids_N: int64, unique; see `example_ids`.
        texts: one or two columns of N strings.
        labels_N: int64 class indices, or float32 values for regression; see `is_labelled`.
        classes: values of the label column in class order; empty for regression.
        source: file or hub split that it was read from.
        notes: what was skipped and why, for people.
        augmented: number of examples, the last ones, that are changed copies of others.
    """

    ids_N: np.ndarray
    texts: tuple[Sequence[str], ...]
    labels_N: np.ndarray
    classes: tuple[str, ...]
    source: str
    notes: tuple[str, ...] = ()
    augmented: int = 0

    def __len__(self) -> int:
        return len(self.ids_N)


@overload
def is_labelled(labels: np.ndarray) -> np.ndarray: ...


@overload
def is_labelled(labels: torch.Tensor) -> torch.Tensor: ...


def is_labelled(labels: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """Return a boolean mask of the labels that are set, in the shape of `labels` (integer classes or floats)."""
    if isinstance(labels, np.ndarray):
        return ~np.isnan(labels) if labels.dtype.kind == "f" else labels >= 0
    return ~labels.isnan() if labels.is_floating_point() else labels >= 0


def unlabelled(count: int, regression: bool) -> np.ndarray:
    """Return labels (count,) that mark every example as unlabeled."""
    return np.full(count, np.nan, np.float32) if regression else np.full(count, UNLABELLED, np.int64)


def example_ids(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the id of each example, int64 (N,).

    Args:
        texts: one or two columns of N strings.

    Raises:
        UserError: two different texts have the same id.
    """
    ids_N = _text_hashes(texts)
    collision = UserError("two different texts have the same 64-bit id; add a space to one of them")
    order_N = np.argsort(ids_N, kind="stable")
    repeats = _repeat_positions(ids_N[order_N])
    repeat, previous, first_content = 0, 0, b""
    for position in repeats.tolist():
        repeat = repeat + 1 if position == previous + 1 else 1
        if repeat == 1:
            first_content = _content(column[order_N[position - 1]] for column in texts)
        previous = position
        content = _content(column[order_N[position]] for column in texts)
        if content != first_content:
            raise collision
        ids_N[order_N[position]] = int.from_bytes(_hash(content, repeat), "little", signed=True)
    del order_N
    if len(repeats) and len(_repeat_positions(np.sort(ids_N))):
        raise collision
    return ids_N


def without(split: Split, *others: Split) -> Split:
    """Return the examples whose text is in none of `others` and not earlier in the split itself.

    Texts are compared by their 64-bit hash. The ids of the result differ from all ids of `others`.

    Raises:
        UserError: no example is left.
    """
    hash_N = _text_hashes(split.texts)
    reasons = ["repeated", *(f"already in {other.source}" for other in others)]
    reason_N = np.zeros(len(split), np.int16)  # index into `reasons`
    reason_N[np.unique(hash_N, return_index=True)[1]] = -1
    for index, other in reversed(list(enumerate(others, start=1))):
        reason_N[_is_in(hash_N, other.ids_N)] = index  # the id of a text's first occurrence is its hash
    keep_N = reason_N < 0
    if keep_N.all():
        return split
    indices, first, counts = np.unique(reason_N[~keep_N], return_index=True, return_counts=True)
    removed: collections.Counter[str] = collections.Counter()
    for i in np.argsort(first):
        removed[reasons[indices[i]]] += int(counts[i])
    details = ", ".join(f"{count} {reason}" for reason, count in removed.items())
    note = f"removed {removed.total()} of {len(split)} texts: {details}"
    if not keep_N.any():
        raise UserError(f"{split.source}: no text is left: {note}; give other texts or none")
    return replace(
        split,
        ids_N=hash_N[keep_N],
        texts=tuple(TextColumn(itertools.compress(column, keep_N)) for column in split.texts),
        labels_N=split.labels_N[keep_N],
        notes=(*split.notes, note),
    )


def _is_in(hash_N: np.ndarray, ids_M: np.ndarray) -> np.ndarray:
    """Return a mask (N,) of the hashes that are among `ids_M`."""
    ids_M = np.sort(ids_M)
    return ids_M[np.minimum(np.searchsorted(ids_M, hash_N), len(ids_M) - 1)] == hash_N


def _repeat_positions(sorted_N: np.ndarray) -> np.ndarray:
    """Return the positions whose value equals the previous one."""
    return np.flatnonzero(sorted_N[1:] == sorted_N[:-1]) + 1


def _text_hashes(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Return int64 (N,): a hash of each example's text, which is the id of its first occurrence."""
    hashes = bytearray()
    for fields in zip(*texts, strict=True):
        hashes += _hash(_content(fields), 0)
    return np.frombuffer(hashes, "<i8")


def _content(fields: Iterable[str]) -> bytes:
    return "\x1f".join(fields).encode()


def _hash(content: bytes, repeat: int) -> bytes:
    return hashlib.blake2b(content + repeat.to_bytes(8, "little"), digest_size=8).digest()
