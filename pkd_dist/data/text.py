"""Files -> examples with stable ids.

A split is `FOLDER/SPLIT.{tsv,csv,jsonl,parquet}`, a file as GLUE calls it, or a split of a hub data set; `tasks.py` says
what each task's files look like. What is wrong is refused by file and line; what a task allows to be left out is counted
and said in the split's notes. An example's id is a 64-bit hash of its text columns and of how often that text stood in the
split before, so it survives reordering and does not depend on position.
"""

from __future__ import annotations

import collections
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pkd_dist.config import project_path
from pkd_dist.data.rows import EXTENSIONS, Rows, Wanted, load_hub, read_file, read_hub, read_lines
from pkd_dist.data.tasks import Task
from pkd_dist.errors import UserError
from pkd_dist.files import sha256

UNLABELLED = -1
"""The class index of an example without a label; a regression has NaN there. `is_labelled` knows both."""

_HUB_UNLABELLED = ("-1", "-1.0")


@dataclass(frozen=True)
class Split:
    """One split as text; at least one example.

    Attributes:
        ids_N: int64, unique.
        texts: one or two lists of N strings.
        labels_N: int64 class indices, or float32 values of a regression; see `is_labelled`.
        classes: values of the label column in class order; empty for a regression.
        source: where it was read from.
        notes: what was left out and why, for the user.
    """

    ids_N: np.ndarray
    texts: tuple[list[str], ...]
    labels_N: np.ndarray
    classes: tuple[str, ...]
    source: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids_N)


def is_labelled(labels: Any) -> Any:
    """Which examples have a label: booleans of the shape of `labels`, an array of numpy or torch, integer or floating."""
    floating = labels.dtype.kind == "f" if isinstance(labels, np.ndarray) else labels.is_floating_point()
    return labels == labels if floating else labels >= 0  # NaN equals nothing


def unlabelled(count: int, regression: bool) -> np.ndarray:
    """Labels of so many examples that have none."""
    return np.full(count, np.nan, np.float32) if regression else np.full(count, UNLABELLED, np.int64)


# --------------------------------------------------------------------------------------------------------- which file


@dataclass(frozen=True)
class _Source:
    """Where a split stands.

    Attributes:
        place: a file, or `hub:NAME`.
        dev_ids: a list of id pairs: the split is those rows of `place` that are in it (or that are not).
        listed: which of the two.
    """

    place: Path | str
    dev_ids: Path | None = None
    listed: bool = False
    notes: tuple[str, ...] = ()


def find(data: str, split: str, task: Task) -> Path | str | None:
    """The file (or `hub:NAME`) that holds a split; None where the folder has none.

    Raises:
        UserError: no such folder, or two files of one split.
    """
    source = _locate(data, split, task)
    return source.place if source else None


def require(data: str, split: str, task: Task) -> None:
    """Raises UserError where a folder has no file of a split."""
    if find(data, split, task) is None:
        names = [f"{stem}.{extension}" for stem in _stems(split, task) for extension in EXTENSIONS]
        names += [task.release.train] if task.release else []
        raise UserError(f"task.data: {data} has no split {split!r}; expected one of {', '.join(names)}")


def available(data: str, task: Task) -> list[str]:
    """The task's splits that a folder or a hub data set has, in order."""
    if data.startswith("hub:"):
        there = load_hub(data.removeprefix("hub:"))
        return [split for split in task.splits if any(name in there for name in _hub_names(split, task))]
    return [split for split in task.splits if find(data, split, task) is not None]


def digests(data: str, splits: Sequence[str], task: Task) -> dict[str, str]:
    """What splits are read from: file name -> sha256; for the hub, split -> its name and what was loaded of it."""
    if data.startswith("hub:"):
        there = load_hub(data.removeprefix("hub:"))
        names = {split: name for split in splits for name in reversed(_hub_names(split, task)) if name in there}
        return {split: f"{data} {there[name]._fingerprint}" for split, name in names.items()}
    sources = {split: source for split in splits if (source := _locate(data, split, task))}
    files = [p for s in sources.values() for p in (s.place, s.dev_ids) if isinstance(p, Path)]
    return {path.name: sha256(path) for path in dict.fromkeys(files)}


def _stems(split: str, task: Task) -> tuple[str, ...]:
    return tuple(dict.fromkeys((split, task.files.get(split, split))))


def _hub_names(split: str, task: Task) -> tuple[str, ...]:
    return tuple(dict.fromkeys((task.hub_splits.get(split, split), split)))


def _locate(data: str, split: str, task: Task) -> _Source | None:
    if data.startswith("hub:"):
        return _Source(data)
    folder = project_path(data)
    if not folder.is_dir():
        raise UserError(f"task.data: no such folder: {data}; it must hold train and dev as {', '.join(EXTENSIONS)}")

    def files(name: str) -> list[Path]:
        stems = _stems(name, task)
        return [path for stem in stems for end in EXTENSIONS if (path := folder / f"{stem}.{end}").is_file()]

    found = files(split)
    if len(found) > 1:
        raise UserError(f"task.data: {found[0]} and {found[1].name} both hold the split {split}; keep one")
    if found:
        return _Source(found[0])
    if task.release is None or any(files(name) for name in task.splits):
        return None
    train, test, dev_ids = (folder / n for n in (task.release.train, task.release.test, task.release.dev_ids))
    if not dev_ids.is_file():
        note = f"there is no {dev_ids.name}: the release's labelled test file serves as dev, and there is no test split"
        by_split = {"train": _Source(train), "dev": _Source(test, notes=(note,))}
    else:
        by_split = {
            "train": _Source(train, dev_ids),
            "dev": _Source(train, dev_ids, listed=True),
            "test": _Source(test),
        }
    source = by_split.get(split)
    return source if source and Path(source.place).is_file() else None


# ---------------------------------------------------------------------------------------------------- rows to examples


def read(data: str, split: str, task: Task, classes: Sequence[str] | None = None) -> Split:
    """Reads one split. A split without labels is allowed where its name starts with `test`.

    Args:
        data: `task.data`.
        split: one of `task.splits`.
        task: its columns, and what its files look like.
        classes: label values in class order; None: the task's, else those of this split, sorted.

    Raises:
        UserError: whatever is wrong, with file and line.
    """
    require(data, split, task)
    source = _locate(data, split, task)
    assert source is not None
    optional = task.label if split.startswith("test") else None
    rows = _rows(source, split, task, optional)
    notes = list(source.notes)
    kept = _with_text(rows, task, notes)
    if source.dev_ids and task.release:
        chosen = _pairs_of(source.dev_ids, task.release.id_columns)
        kept = [(n, fields) for n, fields in kept if (tuple(fields[-2:]) in chosen) == source.listed]
        if source.listed and len(kept) < len(chosen):
            notes.append(f"{len(chosen) - len(kept)} pair(s) of {source.dev_ids.name} are not in {rows.name}")
    at = len(task.text)
    undecided: set[str | None] = {task.no_label} if task.no_label is not None else set()
    if isinstance(source.place, str) and not optional:
        undecided |= {None}  # as the hub has them
    left_out = [n for n, fields in kept if fields[at] in undecided]
    _note(notes, left_out, f"nobody could decide ({task.label} is {task.no_label or 'missing'!r})", rows.unit)
    kept = [(n, fields) for n, fields in kept if fields[at] not in undecided]
    if not kept:
        raise UserError(f"{rows.name}: has no examples; at least one is needed")
    texts = tuple([fields[i] for _, fields in kept] for i in range(at))
    known = tuple(classes or task.classes or ())
    part = Split(example_ids(texts), texts, unlabelled(len(kept), task.regression), known, rows.name, tuple(notes))
    if optional and {(fields[at] or "").strip() for _, fields in kept} <= {"", *_HUB_UNLABELLED} - set(known):
        if len(kept) < len(rows.rows) + len(rows.short):
            lacks = "GLUE wants a prediction for each line, so it will refuse a submission that lacks those left out"
            part = replace(part, notes=(*notes, lacks))
        return part
    for number, fields in kept:
        _require_text(rows, number, task.label, fields[at])
    labels = [(rows.at(number), fields[at].strip()) for number, fields in kept]
    if task.regression:
        return replace(part, labels_N=_numbers(labels, task))
    known = known or tuple(_sorted_classes({value for _, value in labels}))
    labels_N = _class_indices(labels, known, split, task)
    if split == "train" and len(np.unique(labels_N)) < 2:
        raise UserError(
            f"{rows.name}: every example has the label {labels[0][1]!r}; training needs at least two classes"
        )
    return replace(part, labels_N=labels_N, classes=known)


def _rows(source: _Source, split: str, task: Task, optional: str | None) -> Rows:
    """The text columns and the label, and the ids that a list of pairs refers to."""
    columns = (*task.text, task.label)
    if isinstance(source.place, str):
        own = {name: task.hub_columns.get(name, name) for name in columns}
        wanted = Wanted(tuple(own.values()), optional and own[optional])
        return read_hub(source.place.removeprefix("hub:"), _hub_names(split, task), wanted)
    if source.dev_ids and task.release:
        columns += task.release.id_columns
    return read_file(source.place, Wanted(columns, optional, task.headerless, task.leave_out_broken))


def _pairs_of(path: Path, header: tuple[str, ...]) -> set[tuple[str, ...]]:
    pairs = {tuple(line.strip().split("\t")): number for number, (line,) in read_lines(path).rows}
    for pair, number in pairs.items():
        if len(pair) != 2:
            raise UserError(f"{path}:{number}: has {len(pair)} field(s); expected the two ids of a pair")
    return set(pairs) - {header}


def unlabeled_paths(files: Sequence[str], task: Task) -> list[Path]:
    """Where the files of `task.unlabeled` are. Raises UserError where one is not there, or is of a kind that cannot be read."""
    for name in files:
        path = project_path(name)
        if not path.is_file():
            raise UserError(f"task.unlabeled: no such file: {name}")
        if path.suffix.removeprefix(".") not in (*EXTENSIONS, "txt"):
            raise UserError(f"task.unlabeled: {name} is not one of .txt, {', '.join(f'.{e}' for e in EXTENSIONS)}")
        if path.suffix == ".txt" and len(task.text) > 1:
            raise UserError(
                f"task.unlabeled: {name}: a .txt file holds single texts, {task.name} needs pairs; give a table with the "
                f"columns {' and '.join(task.text)}"
            )
    return [project_path(name) for name in files]


def read_unlabeled(files: Sequence[str], task: Task) -> Split:
    """Reads text without labels (`task.unlabeled`): repeats and texts of other splits are still in it; see `without`.

    Args:
        files: `.txt` with one text a line (single sentences only), or tables with the task's text columns; other columns,
            the label's too, are ignored.

    Raises:
        UserError: whatever is wrong, with file and line.
    """
    texts: tuple[list[str], ...] = tuple([] for _ in task.text)
    notes: list[str] = []
    for path in unlabeled_paths(files, task):
        wanted = Wanted(task.text, None, task.headerless, task.leave_out_broken)
        rows = read_lines(path) if path.suffix == ".txt" else read_file(path, wanted)
        of_file: list[str] = []
        kept = _with_text(rows, task, of_file)
        if not kept:
            raise UserError(f"{path}: has no examples; at least one is needed")
        notes += [f"{path.name}: {note}" for note in of_file]
        for i, column in enumerate(texts):
            column += [fields[i] for _, fields in kept]
    labels = unlabelled(len(texts[0]), task.regression)
    return Split(example_ids(texts), texts, labels, task.classes or (), ", ".join(files), tuple(notes))


def without(split: Split, *others: Split) -> Split:
    """The examples whose text stands neither in `others` nor before in the split itself. Their ids are none of others'.

    Raises:
        UserError: nothing is left.
    """
    seen: dict[tuple[str, ...], str] = {}
    for other in others:
        for fields in zip(*other.texts, strict=True):
            seen.setdefault(fields, f"in {other.source}")
    dropped: collections.Counter[str] = collections.Counter()
    keep: list[int] = []
    for i, fields in enumerate(zip(*split.texts, strict=True)):
        if fields in seen:
            dropped[seen[fields]] += 1
        else:
            seen[fields] = "repeated"
            keep.append(i)
    if not dropped:
        return split
    reasons = ", ".join(f"{count} {why}" for why, count in dropped.items())
    note = f"{dropped.total()} of {len(split)} texts are left out: {reasons}"
    if not keep:
        raise UserError(f"{split.source}: nothing is left, {note}; give other texts, or none")
    texts = tuple([column[i] for i in keep] for column in split.texts)
    return replace(
        split, ids_N=example_ids(texts), texts=texts, labels_N=split.labels_N[keep], notes=(*split.notes, note)
    )  # fmt: skip


def _with_text(rows: Rows, task: Task, notes: list[str]) -> list[tuple[int, list[Any]]]:
    """The rows that have text in every text column; others are refused, or left out and noted where the task says so."""
    kept, broken = [], list(rows.short)
    for number, fields in rows.rows:
        if task.leave_out_broken and not all(value and value.strip() for value in fields[: len(task.text)]):
            broken.append(number)
            continue
        for column, value in zip(task.text, fields, strict=False):
            _require_text(rows, number, column, value)
        kept.append((number, fields))
    _note(notes, sorted(broken), "broken, with too few fields or an empty text", rows.unit)
    return kept


def _require_text(rows: Rows, number: int, column: str, value: str | None) -> None:
    if value is None or not value.strip():
        raise UserError(f"{rows.at(number)}: {column} is empty; give it a value or remove the line")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise UserError(
            f"{rows.at(number)}: {column} holds half of a surrogate pair, which is not text; mend the escape"
        )


def _note(notes: list[str], numbers: list[int], what: str, unit: str) -> None:
    if numbers:
        shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
        notes.append(f"{len(numbers)} left out, {what}: {unit} {shown}")


def _sorted_classes(values: set[str]) -> list[str]:
    """Numbers in numeric order, else alphabetical."""
    try:
        numbers = {value: float(value) for value in values}
    except ValueError:
        return sorted(values)
    if not all(map(math.isfinite, numbers.values())):
        return sorted(values)
    return sorted(values, key=lambda value: (numbers[value], value))  # 1 and 1.0 are two classes, in a fixed order


def _class_indices(labels: list[tuple[str, str]], known: tuple[str, ...], split: str, task: Task) -> np.ndarray:
    """Of (where, value) pairs; a value may be the class's name."""
    index = {value: i for values in (task.names_of(known), known) for i, value in enumerate(values)}
    for where, value in labels:
        if value not in index:
            allowed = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
            seen = "" if task.classes else " of the teacher" if split == "train" else " seen in training"
            raise UserError(f"{where}: {task.label} {value!r} is not one of the labels{seen}: {allowed}")
    return np.array([index[value] for _, value in labels], np.int64)


def _numbers(labels: list[tuple[str, str]], task: Task) -> np.ndarray:
    out = np.empty(len(labels), dtype=np.float32)
    low, high = task.value_range or (-np.inf, np.inf)
    for i, (where, value) in enumerate(labels):
        try:
            out[i] = float(value)
        except ValueError:
            out[i] = np.nan
        if not np.isfinite(out[i]):
            raise UserError(f"{where}: {task.label} {value!r} is not a number; a regression needs one")
        if not low <= out[i] <= high:
            raise UserError(f"{where}: {task.label} {value} is not between {low:g} and {high:g}")
    return out


def example_ids(texts: tuple[list[str], ...]) -> np.ndarray:
    """int64 (N,): a hash of each example's text, and of how often it stood before."""
    seen: dict[bytes, int] = {}
    out = np.empty(len(texts[0]), dtype=np.int64)
    for i, fields in enumerate(zip(*texts, strict=True)):
        content = "\x1f".join(fields).encode()
        repeat = seen[content] = seen.get(content, -1) + 1
        digest = hashlib.blake2b(content + repeat.to_bytes(8, "little"), digest_size=8).digest()
        out[i] = int.from_bytes(digest, "little", signed=True)
    if len(np.unique(out)) < len(out):
        raise UserError("two different texts have the same 64-bit id; change one of them by a space")
    return out
