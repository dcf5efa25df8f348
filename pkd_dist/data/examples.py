"""Examples: text with labels and stable ids.

An example's id is a 64-bit hash of its text columns and of the number of earlier examples with the same text. It does not
depend on the example's position, so the teacher cache stays valid when a file is reordered.

Shapes: N examples.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

import numpy as np

from pkd_dist.data.choices import Choices
from pkd_dist.data.columns import TextColumn
from pkd_dist.errors import UserError

if TYPE_CHECKING:
    import torch

_BLOCK_EXAMPLES = 4096
UNLABELLED = -1
"""Class index of an example without a label. Regression and multi-label use NaN; `is_labelled` handles both."""


@dataclass(frozen=True)
class Split:
    """One split as text, with at least one example.

    Attributes:
        ids_N: int64, unique; see `example_ids`.
        texts: one or two columns of N strings; of multiple choice the context, the question if there is one, and each option.
        labels_N: int64 class indices or places of the right option, float32 values for regression, or (N, C) float32 of 0 and 1
            for multi-label; see `is_labelled`.
        classes: values of the label column in class order; empty for regression.
        source: file or hub split that it was read from.
        notes: what was skipped and why, for people.
        augmented: number of examples, the last ones, that are changed copies of others.
        rows: line or row number of each example in the one file that is split; empty for other data.
        choices: how options become pairs of texts; None: an example is one text or pair.
    """

    ids_N: np.ndarray
    texts: tuple[Sequence[str], ...]
    labels_N: np.ndarray
    classes: tuple[str, ...]
    source: str
    notes: tuple[str, ...] = ()
    augmented: int = 0
    rows: Sequence[int] = ()
    choices: Choices | None = None

    @property
    def options(self) -> int:
        """Options of each example; 1: it is no multiple choice."""
        return self.choices.count(self.texts) if self.choices else 1

    def inputs(self, rows: slice = slice(None)) -> list[Sequence[str]]:
        """Return the texts of some examples as a tokenizer takes them: one column, or two of pairs.

        The pairs of the options of an example follow each other.
        """
        columns = [column[rows] for column in self.texts]
        return [*self.choices.pairs(columns)] if self.choices else columns

    def __len__(self) -> int:
        return len(self.ids_N)


@overload
def is_labelled(labels: np.ndarray) -> np.ndarray: ...


@overload
def is_labelled(labels: torch.Tensor) -> torch.Tensor: ...


def is_labelled(labels: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """Return a boolean mask (N,) of the examples whose label is set: (N,) integer classes or floats, or (N, C) floats."""
    if labels.ndim == 2:
        labels = labels[:, 0]
    if isinstance(labels, np.ndarray):
        return ~np.isnan(labels) if labels.dtype.kind == "f" else labels >= 0
    return ~labels.isnan() if labels.is_floating_point() else labels >= 0


def unlabelled(count: int, regression: bool) -> np.ndarray:
    """Return labels (count,) that mark every example as unlabeled: read-only, one number in memory."""
    return np.broadcast_to(np.float32(np.nan) if regression else np.int64(UNLABELLED), (count,))


def unlabelled_sets(count: int, classes: int) -> np.ndarray:
    """Return multi-label labels (count, classes) that mark every example as unlabeled: read-only, one number in memory."""
    return np.broadcast_to(np.float32(np.nan), (count, max(1, classes)))  # also where no class is known


def unlabelled_like(labels_N: np.ndarray, count: int) -> np.ndarray:
    """Return labels of `count` unlabeled examples, of the kind of other labels."""
    if labels_N.ndim == 2:
        return unlabelled_sets(count, labels_N.shape[1])
    return unlabelled(count, labels_N.dtype.kind == "f")


def present(labels_NC: np.ndarray) -> np.ndarray:
    """Return which classes some example of multi-label labels has, booleans (C,)."""
    return np.asarray((labels_NC > 0).any(axis=0))


def class_counts(labels_N: np.ndarray, classes: int) -> np.ndarray:
    """Return the number of labeled examples of each class, int64 (C,)."""
    known = labels_N[is_labelled(labels_N)]
    if labels_N.ndim == 2:
        return np.asarray(known.sum(axis=0)).astype(np.int64)
    return np.bincount(known, minlength=classes)


def example_ids(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the id of each example, int64 (N,).

    Args:
        texts: one or two columns of N strings.

    Raises:
        UserError: two different texts have the same id.
    """
    ids_N = text_hashes(texts)
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


def select(split: Split, keep_N: np.ndarray) -> Split:
    """Return the examples of a mask (N,), at least one, with the ids that they have on their own."""
    texts = tuple(TextColumn(itertools.compress(column, keep_N)) for column in split.texts)
    rows = array("q", itertools.compress(split.rows, keep_N))
    return replace(split, ids_N=example_ids(texts), texts=texts, labels_N=split.labels_N[keep_N], rows=rows)


class NewTexts:
    """Collects the texts that are in none of some splits, each once.

    Texts are compared by their 64-bit hash. Memory holds a few numbers per collected text, and none per rejected one.

    Args:
        columns: number of text columns.
        others: the splits.

    Attributes:
        texts: the collected texts, by column.
        ids: their ids, which differ from those of `others`.
    """

    def __init__(self, columns: int, others: Sequence[Split]):
        self.texts = tuple(TextColumn() for _ in range(columns))
        self.ids = array("q")
        # The id of a text's first occurrence in a split is its hash.
        self._known = [(f"already in {other.source}", np.sort(other.ids_N)) for other in others]
        self._runs: list[
            np.ndarray
        ] = []  # hashes of the collected texts: sorted arrays, each much longer than the next
        self._rejected: collections.Counter[str] = collections.Counter()

    def add(self, texts: Sequence[Sequence[str]]) -> np.ndarray:
        """Collect the new ones among B texts, and return a mask (B,) of them.

        Args:
            texts: one or two columns of B strings.
        """
        hash_B = text_hashes(texts)
        reasons = ["repeated", *(reason for reason, _ in self._known)]
        reason_B = np.zeros(len(hash_B), np.int16)  # index into `reasons`
        reason_B[np.unique(hash_B, return_index=True)[1]] = -1
        for run in self._runs:
            reason_B[_is_in(hash_B, run)] = 0
        for index, (_, known) in reversed(list(enumerate(self._known, start=1))):
            reason_B[_is_in(hash_B, known)] = index
        new_B = reason_B < 0
        for index in dict.fromkeys(reason_B[~new_B].tolist()):
            self._rejected[reasons[index]] += int((reason_B == index).sum())
        for column, added in zip(self.texts, texts, strict=True):
            column.extend(itertools.compress(added, new_B))
        self.ids.frombytes(hash_B[new_B].tobytes())
        self._remember(np.sort(hash_B[new_B]))
        return new_B

    def _remember(self, run: np.ndarray) -> None:
        """Add a sorted run to the others, merged so that their number grows with the logarithm of the texts."""
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.sort(np.concatenate([self._runs.pop(), run]), kind="stable")
        self._runs.append(run)

    def notes(self, source: str) -> tuple[str, ...]:
        """Return a note on the texts that were rejected, if any were.

        Args:
            source: what the texts are from, for the message.

        Raises:
            UserError: no text is new.
        """
        rejected = self._rejected.total()
        if not rejected:
            return ()
        details = ", ".join(f"{count} {reason}" for reason, count in self._rejected.items())
        note = f"removed {rejected} of {rejected + len(self.ids)} texts: {details}"
        if not self.ids:
            raise UserError(f"{source}: no text is left: {note}; give other texts or none")
        return (note,)


def without(split: Split, *others: Split) -> Split:
    """Return the examples whose text is in none of `others` and not earlier in the split itself; see `NewTexts`.

    Raises:
        UserError: no example is left.
    """
    new = NewTexts(len(split.texts), others)
    blocks = (slice(start, start + _BLOCK_EXAMPLES) for start in range(0, len(split), _BLOCK_EXAMPLES))
    keep_N = np.concatenate([new.add([column[block] for column in split.texts]) for block in blocks])
    notes = new.notes(split.source)
    if keep_N.all():
        return split
    ids_N = np.frombuffer(new.ids, np.int64)
    return replace(split, ids_N=ids_N, texts=new.texts, labels_N=split.labels_N[keep_N], notes=(*split.notes, *notes))


def _is_in(hash_N: np.ndarray, sorted_M: np.ndarray) -> np.ndarray:
    """Return a mask (N,) of the hashes that are among `sorted_M`."""
    if not len(sorted_M):
        return np.zeros(len(hash_N), bool)
    found: np.ndarray = sorted_M[np.minimum(np.searchsorted(sorted_M, hash_N), len(sorted_M) - 1)] == hash_N
    return found


def _repeat_positions(sorted_N: np.ndarray) -> np.ndarray:
    """Return the positions whose value equals the previous one."""
    return np.flatnonzero(sorted_N[1:] == sorted_N[:-1]) + 1


def text_hashes(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Return int64 (N,): a hash of each example's text, which is the id of its first occurrence."""
    hashes = bytearray()
    for fields in zip(*texts, strict=True):
        hashes += _hash(_content(fields), 0)
    return np.frombuffer(hashes, "<i8")


def _content(fields: Iterable[str]) -> bytes:
    return "\x1f".join(fields).encode()


def _hash(content: bytes, repeat: int) -> bytes:
    return hashlib.blake2b(content + repeat.to_bytes(8, "little"), digest_size=8).digest()
