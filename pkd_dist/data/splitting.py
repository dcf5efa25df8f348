"""Split the examples of one file into train, dev and test.

    examples -> units, in the order of their hash -> part of each example

A unit stays in one part: a group of `task.split.group`, else a text with its repeats. Its hash is that of its content and the
seed, so the same examples give the same parts on every machine and in any order. Units are taken in the order of their hash.
Each goes to the first of test and dev that it brings closer to its share (the sum of squares over the classes), else to train.
For texts without repeats this cuts each class, in that order, at the shares; for groups it comes as close as their sizes
allow. The last examples of a class never leave train.

Shapes: N examples, U units, C classes, S strata (the classes, or one for all), P parts, M pairs of a text and a unit.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pkd_dist.config.task import FileSplit
from pkd_dist.data.examples import text_hashes
from pkd_dist.errors import UserError

TRAIN, DEV, TEST = range(3)
_NAMES = ("train", "dev", "test")
_MAX_CLASSES = 5


def parts(settings: FileSplit | None) -> tuple[str, ...]:
    """Return the names of the parts that a file is split into."""
    return _NAMES if (settings or FileSplit()).test else _NAMES[:TEST]


@dataclass(frozen=True)
class Table:
    """The examples of a file.

    Attributes:
        name: of the file, for messages.
        texts: one or two columns of N strings.
        class_N: class indices; all 0 for a regression.
        class_names: empty for a regression.
        groups: N values of `task.split.group`; None: it is not set.
    """

    name: str
    texts: Sequence[Sequence[str]]
    class_N: np.ndarray
    class_names: Sequence[str]
    groups: Sequence[str] | None


def split(table: Table, given: FileSplit | None) -> tuple[np.ndarray, dict[str, list[str]]]:
    """Assign each example of a file to a part.

    Args:
        given: `task.split`; None: the defaults.

    Returns:
        The part of each example, an index into `parts(given)`, int8 (N,); and notes about each part.

    Raises:
        UserError: a part would be empty.
    """
    settings = given or FileSplit()
    stratify = bool(table.class_names) and settings.stratify is not False
    key_N = _unit_keys(table.texts, table.groups, settings.seed)
    part_N = assign(key_N, table.class_N, settings, stratify)
    names = parts(given)
    counts = np.bincount(part_N, minlength=len(names)).tolist()
    for name, count in zip(names, counts, strict=True):
        if not count:
            sizes = np.unique(key_N, return_counts=True)[1]
            units = f"groups of {settings.group}" if settings.group else "different texts"
            raise UserError(
                f"{table.name}: no example is left for {name}: there are {len(part_N)} examples in {len(sizes)} {units}, the "
                f"smallest of {sizes.min()}, and {name} should have {getattr(settings, name) * len(part_N):.3g}; change "
                f"task.split.{name}{' or task.split.group' if settings.group else ''}, or give more examples"
            )
    how = [f"dev {settings.dev:g}", f"test {settings.test:g}", f"seed {settings.seed}"]
    how += [*(["stratified"] if stratify else []), *([f"groups of {settings.group}"] if settings.group else [])]
    shown = ", ".join(f"{count:,} {name}" for name, count in zip(names, counts, strict=True))
    notes: dict[str, list[str]] = {name: [] for name in names}
    notes["train"].append(
        f"split into {shown} by {'task.split' if given else 'the defaults of task.split'} ({', '.join(how)})"
    )
    if table.groups is not None:
        notes["train"] += _on_groups(table, key_N, settings)
    in_file_C = np.bincount(table.class_N, minlength=len(table.class_names))
    for i, name in enumerate(names[1:], start=1):
        found_C = np.bincount(table.class_N[part_N == i], minlength=len(in_file_C))
        lacks_C = (in_file_C > 0) & (found_C == 0)
        if missing := list(itertools.compress(table.class_names, lacks_C)):
            more = f" and {len(missing) - _MAX_CLASSES} more" if len(missing) > _MAX_CLASSES else ""
            notes[name].append(f"has no example of {', '.join(missing[:_MAX_CLASSES])}{more}")
    return part_N, notes


def _on_groups(table: Table, key_N: np.ndarray, settings: FileSplit) -> Iterator[str]:
    """Yield notes about examples without a group, and texts in several groups."""
    assert table.groups is not None
    empty = sum(not group.strip() for group in table.groups)
    if empty:
        yield f"{settings.group} is empty in {empty:,} of {len(key_N):,} rows; the text of each is its group"
    text_M = np.unique(np.stack([text_hashes(table.texts), key_N.view(np.int64)]), axis=1)[0]
    several = int((np.unique(text_M, return_counts=True)[1] > 1).sum())
    if several:
        yield f"texts that are in more than one group of {settings.group}: {several:,}"


def _unit_keys(texts: Sequence[Sequence[str]], groups: Sequence[str] | None, seed: int) -> np.ndarray:
    """Return a hash of each example's unit, uint64 (N,)."""
    salt, keys = seed.to_bytes(8, "little"), bytearray()
    for fields, group in zip(zip(*texts, strict=True), groups or itertools.repeat(""), strict=False):
        named = group.strip()
        content, kind = (named, b"group") if named else ("\x1f".join(fields), b"text")
        keys += hashlib.blake2b(
            content.encode("utf-8", "surrogatepass"), digest_size=8, salt=salt, person=kind
        ).digest()
    return np.frombuffer(keys, "<u8")


def assign(key_N: np.ndarray, class_N: np.ndarray, settings: FileSplit, stratify: bool) -> np.ndarray:
    """Return the part of each example, int8 (N,): TRAIN, DEV or TEST.

    Args:
        key_N: hash of each example's unit.
        class_N: class indices; all 0 for a regression.
        stratify: give each class its share in each part.
    """
    unit_U, unit_N = np.unique(key_N, return_inverse=True)
    classes = int(class_N.max()) + 1
    left_C = np.bincount(class_N, minlength=classes).tolist()  # in train
    wanted_PS = _wanted(left_C if stratify else [sum(left_C)], settings)
    part_U = np.full(len(unit_U), TRAIN, np.int8)
    for unit, size_of in _class_sizes(unit_N, class_N, classes):
        if any(left_C[label] <= size for label, size in size_of):
            continue
        sizes = size_of if stratify else [(0, sum(size for _, size in size_of))]
        for part, wanted_S in wanted_PS.items():
            if sum(size * (2 * wanted_S[stratum] - size) for stratum, size in sizes) > 0:
                part_U[unit] = part
                for stratum, size in sizes:
                    wanted_S[stratum] -= size
                for label, size in size_of:
                    left_C[label] -= size
                if max(wanted_S) <= 0:
                    del wanted_PS[part]
                break
        if not wanted_PS:
            break
    part_N: np.ndarray = part_U[unit_N]
    return part_N


def _wanted(size_S: Sequence[int], settings: FileSplit) -> dict[int, list[int]]:
    """Return the examples of each stratum that test and dev should have: their share, at least 1 if there are enough."""
    wanted: dict[int, list[int]] = {TEST: [], DEV: []}
    for size in size_S:
        left = size - 1  # for train
        for part, share in ((DEV, settings.dev), (TEST, settings.test)):
            count = max(0, min(left, max(1, int(share * size + 0.5)))) if share else 0
            wanted[part].append(count)
            left -= count
    return wanted


def _class_sizes(unit_N: np.ndarray, class_N: np.ndarray, classes: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yield each unit with its (class, number of examples)."""
    pairs, counts = np.unique(unit_N.astype(np.int64) * classes + class_N, return_counts=True)
    rows = zip((pairs // classes).tolist(), (pairs % classes).tolist(), counts.tolist(), strict=True)
    for unit, group in itertools.groupby(rows, key=lambda row: row[0]):
        yield unit, [(label, count) for _, label, count in group]
