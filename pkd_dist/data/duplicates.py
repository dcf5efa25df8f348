"""Texts that are in several splits: count them, and do with them what `task.duplicates` says.

Texts are compared by their 64-bit hash, both texts of a pair together. Shapes: N and M examples of two splits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pkd_dist.data.examples import Split, class_counts, is_labelled, select, text_hashes
from pkd_dist.data.tasks import Task
from pkd_dist.errors import UserError

_MAX_SHOWN = 60


@dataclass(frozen=True)
class Overlap:
    """The examples of a split whose text is elsewhere too.

    Attributes:
        found_N: mask of them.
        relabelled_N: mask of those whose label the text never has there.
    """

    found_N: np.ndarray
    relabelled_N: np.ndarray

    @property
    def found(self) -> int:
        return int(self.found_N.sum())

    @property
    def relabelled(self) -> int:
        return int(self.relabelled_N.sum())


class Hashed:
    """A split with the hash of each text, int64 (N,)."""

    def __init__(self, split: Split):
        self.split = split
        self.hash_N = text_hashes(split.texts)

    def overlap(self, other: Hashed | None) -> Overlap:
        """Look up each text in another split, or among the earlier texts of this one (None)."""
        there = other or self
        known = set((np.intersect1d(self.hash_N, there.hash_N) if other else _repeated(self.hash_N)).tolist())
        labels_of = _labels_of(there, known) if other else {}
        found_N, relabelled_N = np.zeros((2, len(self.hash_N)), bool)
        labelled_N = is_labelled(self.split.labels_N)
        for row in np.flatnonzero(np.isin(self.hash_N, list(known))).tolist():
            text, label = int(self.hash_N[row]), _label(self.split, row)
            if text in labels_of:
                found_N[row] = True
                relabelled_N[row] = labelled_N[row] and bool(labels_of[text]) and label not in labels_of[text]
            if other is None:
                labels_of.setdefault(text, set()).update({label} if labelled_N[row] else ())
        return Overlap(found_N, relabelled_N)

    def example(self, mask_N: np.ndarray) -> str:
        """Return the first text of a mask, shortened, for messages."""
        row = int(np.argmax(mask_N))
        texts = [column[row] for column in self.split.texts]
        return " and ".join(repr(t if len(t) <= _MAX_SHOWN else f"{t[:_MAX_SHOWN]}...") for t in texts)


def _label(split: Split, row: int) -> object:
    """Return a label that can be compared: a class, a number, or the 0 and 1 of all classes."""
    label = split.labels_N[row].tolist()
    return tuple(label) if isinstance(label, list) else label


def _repeated(hash_N: np.ndarray) -> np.ndarray:
    values, counts = np.unique(hash_N, return_counts=True)
    repeated: np.ndarray = values[counts > 1]
    return repeated


def _labels_of(hashed: Hashed, known: set[int]) -> dict[int, set[object]]:
    """Return the labels that each known text has, if any."""
    labels: dict[int, set[object]] = {}
    labelled_N = is_labelled(hashed.split.labels_N)
    for row in np.flatnonzero(np.isin(hashed.hash_N, list(known))).tolist():
        of_text = labels.setdefault(int(hashed.hash_N[row]), set())
        of_text.update({_label(hashed.split, row)} if labelled_N[row] else ())
    return labels


def settled(splits: Mapping[str, Split], task: Task) -> dict[str, Split]:
    """Return the splits with notes about duplicates, and without them for `task.duplicates: drop`.

    Raises:
        UserError: there are some, for `refuse`; or dropping them leaves no example of a class to train on, or an empty split.
    """
    hashed = {name: Hashed(split) for name, split in splits.items()}
    if task.duplicates == "refuse":
        _refuse(hashed)
    if task.duplicates == "drop":
        hashed = {name: _dropped(name, hashed, task) for name in splits}
    return {
        name: replace(each.split, notes=(*each.split.notes, *_notes(name, hashed))) for name, each in hashed.items()
    }


def _pairs(name: str, hashed: Mapping[str, Hashed]) -> Iterator[tuple[str, Overlap]]:
    """Yield each earlier split that has texts of this one."""
    for earlier in list(hashed)[: list(hashed).index(name)]:
        overlap = hashed[name].overlap(hashed[earlier])
        if overlap.found:
            yield earlier, overlap


def _notes(name: str, hashed: Mapping[str, Hashed]) -> Iterator[str]:
    own = hashed[name]
    for earlier, overlap in _pairs(name, hashed):
        other = f", {overlap.relabelled:,} of them with another label" if overlap.relabelled else ""
        remedy = f"; task.duplicates: drop removes them from {earlier}" if name in _kept_over(earlier, hashed) else ""
        yield (
            f"{overlap.found:,} of {len(own.hash_N):,} texts are also in {earlier}{other}, such as "
            f"{own.example(overlap.found_N)}{remedy}"
        )
    repeats = own.overlap(None)
    if repeats.relabelled:
        example = own.example(repeats.relabelled_N)
        yield f"repeated texts with another label than before: {repeats.relabelled:,}, such as {example}"


def _refuse(hashed: Mapping[str, Hashed]) -> None:
    for name in hashed:
        for earlier, overlap in _pairs(name, hashed):
            drop = f"drop, which removes them from {earlier}, or " if name in _kept_over(earlier, hashed) else ""
            raise UserError(
                f"{overlap.found:,} of the {len(hashed[name].hash_N):,} texts of {name} are also in {earlier}, such as "
                f"{hashed[name].example(overlap.found_N)}; remove them from one of the two, or set {drop}keep",
                "task.duplicates",
            )


def _kept_over(name: str, hashed: Mapping[str, Hashed]) -> list[str]:
    """Return the splits whose texts are dropped from this one: all others from train, the test splits from dev splits."""
    if name == "train":
        return [other for other in hashed if other != name]
    return [other for other in hashed if other.startswith("test") and not name.startswith("test")]


def _dropped(name: str, hashed: Mapping[str, Hashed], task: Task) -> Hashed:
    """Return a split without the texts of those that are kept over it; train also without repeats of the same label."""
    own, kept = hashed[name], _kept_over(name, hashed)
    elsewhere_N = np.isin(own.hash_N, np.concatenate([hashed[other].hash_N for other in kept] or [own.hash_N[:0]]))
    repeated_N = np.zeros_like(elsewhere_N)
    if name == "train":
        repeats = own.overlap(None)
        repeated_N = repeats.found_N & ~repeats.relabelled_N & ~elsewhere_N
    drop_N = elsewhere_N | repeated_N
    if not drop_N.any():
        return own
    details = [(elsewhere_N, f"also in {' or '.join(kept)}"), (repeated_N, "repeated with the same label")]
    reasons = ", ".join(
        f"{mask_N.sum():,} {reason}, such as {own.example(mask_N)}" for mask_N, reason in details if mask_N.any()
    )
    note = f"dropped {drop_N.sum():,} of {len(drop_N):,} examples: {reasons}"
    _require_left(name, own.split, ~drop_N, task, note)
    left = select(own.split, ~drop_N)
    return Hashed(replace(left, notes=(*left.notes, note)))


def _require_left(name: str, split: Split, keep_N: np.ndarray, task: Task, note: str) -> None:
    lost: set[int] = set()
    if name == "train" and task.has_named_classes and split.classes:
        before_C, left_C = (class_counts(of_N, len(split.classes)) for of_N in (split.labels_N, split.labels_N[keep_N]))
        lost = set(np.flatnonzero((before_C > 0) & (left_C == 0)).tolist())
    if lost or not keep_N.any():
        what = f"of {task.names_of([split.classes[min(lost)]])[0]} " if lost and keep_N.any() else ""
        raise UserError(
            f"{split.source}: {note}; no example {what}is left; set keep, or give more data", "task.duplicates"
        )
