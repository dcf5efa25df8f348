"""Files -> examples with stable ids.

A split is `FOLDER/SPLIT.{tsv,csv,jsonl,parquet}`, a file as GLUE calls it, or a split of a hub data set; `tasks.py` says
what each task's files look like. What is wrong is refused by file and line; what a task allows to be left out is counted
and said in the split's notes. An example's id is a 64-bit hash of its text columns and of how often that text stood in the
split before, so it survives reordering and does not depend on position.

Rows pass one by one, and what is kept of them lies on disk (`columns.py`): in memory are ids, labels, and where a text ends.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import math
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pkd_dist.config.deepspeed import project_path
from pkd_dist.data.columns import TextColumn
from pkd_dist.data.rows import EXTENSIONS, Row, Rows, Wanted, load_hub, read_file, read_hub, read_lines
from pkd_dist.data.tasks import Task
from pkd_dist.errors import UserError
from pkd_dist.files import sha256

UNLABELLED = -1
"""The class index of an example without a label; a regression has NaN there. `is_labelled` knows both."""

_HUB_UNLABELLED = ("-1", "-1.0")
_SHOWN = 5
_CHUNK = 4096


@dataclass(frozen=True)
class Split:
    """One split as text; at least one example.

    Attributes:
        ids_N: int64, unique; see `example_ids`.
        texts: one or two columns of N strings.
        labels_N: int64 class indices, or float32 values of a regression; see `is_labelled`.
        classes: values of the label column in class order; empty for a regression.
        source: where it was read from.
        notes: what was left out and why, for the user.
    """

    ids_N: np.ndarray
    texts: tuple[Sequence[str], ...]
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
        raise UserError(f"{data} has no split {split!r}; expected one of {', '.join(names)}", "task.data")


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
        raise UserError(f"no such folder: {data}; it must hold train and dev as {', '.join(EXTENSIONS)}", "task.data")

    def files(name: str) -> list[Path]:
        stems = _stems(name, task)
        return [path for stem in stems for end in EXTENSIONS if (path := folder / f"{stem}.{end}").is_file()]

    found = files(split)
    if len(found) > 1:
        raise UserError(f"{found[0]} and {found[1].name} both hold the split {split}; keep one", "task.data")
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
        kept = _of_pairs(kept, source, task.release.id_columns, rows.name, notes)
    at = len(task.text)
    undecided: set[str | None] = {task.no_label} if task.no_label is not None else set()
    if isinstance(source.place, str) and not optional:
        undecided |= {None}  # as the hub has them
    if undecided:
        reason = f"nobody could decide ({task.label} is {task.no_label or 'missing'!r})"
        kept = _noted(kept, lambda fields: fields[at] not in undecided, reason, rows.unit, notes)
    numbers, columns = _on_disk(kept, at + 1)
    if not numbers:
        raise UserError(f"{rows.name}: has no examples; at least one is needed")
    texts, values = columns[:at], columns[at]
    known = tuple(classes or task.classes or ())
    part = Split(example_ids(texts), texts, unlabelled(len(numbers), task.regression), known, rows.name, tuple(notes))
    nothing = {"", *_HUB_UNLABELLED} - set(known)
    if optional and all(value.strip() in nothing for value in values):
        if len(notes) > len(source.notes):
            lacks = "GLUE wants a prediction for each line, so it will refuse a submission that lacks those left out"
            part = replace(part, notes=(*notes, lacks))
        return part
    labels = _Labels(rows, numbers, task.label, values)
    if task.regression:
        return replace(part, labels_N=_numbers(labels, task))
    known = known or tuple(_sorted_classes({value for _, value in labels}))
    labels_N = _class_indices(labels, known, split, task)
    if split == "train" and (labels_N == labels_N[0]).all():
        raise UserError(
            f"{rows.name}: every example has the label {values[0].strip()!r}; training needs at least two classes"
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


def _of_pairs(
    kept: Iterator[Row], source: _Source, id_columns: tuple[str, str], name: str, notes: list[str]
) -> Iterator[Row]:
    """The rows whose last two values are a pair of the list, or those whose are not."""
    assert source.dev_ids is not None
    chosen = _pairs_of(source.dev_ids, id_columns)
    count = 0
    for number, fields in kept:
        if (tuple(fields[-2:]) in chosen) == source.listed:
            count += 1
            yield number, fields
    if source.listed and count < len(chosen):
        notes.append(f"{len(chosen) - count} pair(s) of {source.dev_ids.name} are not in {name}")


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
    texts = tuple(TextColumn() for _ in task.text)
    notes: list[str] = []
    for path in unlabeled_paths(files, task):
        wanted = Wanted(task.text, None, task.headerless, task.leave_out_broken)
        rows = read_lines(path) if path.suffix == ".txt" else read_file(path, wanted)
        of_file: list[str] = []
        before = len(texts[0])
        _append(texts, _with_text(rows, task, of_file))
        if len(texts[0]) == before:
            raise UserError(f"{path}: has no examples; at least one is needed")
        notes += [f"{path.name}: {note}" for note in of_file]
    labels = unlabelled(len(texts[0]), task.regression)
    return Split(example_ids(texts), texts, labels, task.classes or (), ", ".join(files), tuple(notes))


def without(split: Split, *others: Split) -> Split:
    """The examples whose text stands neither in `others` nor before in the split itself. Their ids are none of others'.
    Two texts of one 64-bit hash count as one.

    Raises:
        UserError: nothing is left.
    """
    hash_N = _hashes(split.texts)
    why = ["repeated", *(f"in {other.source}" for other in others)]
    why_N = np.zeros(len(split), np.int16)  # place in `why`
    why_N[np.unique(hash_N, return_index=True)[1]] = -1
    for place, other in reversed(list(enumerate(others, start=1))):
        why_N[_stand_in(hash_N, other.ids_N)] = place  # the id of a text that stands for the first time is its hash
    keep_N = why_N < 0
    if keep_N.all():
        return split
    places, first, counts = np.unique(why_N[~keep_N], return_index=True, return_counts=True)
    dropped: collections.Counter[str] = collections.Counter()
    for i in np.argsort(first):
        dropped[why[places[i]]] += int(counts[i])
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    note = f"{dropped.total()} of {len(split)} texts are left out: {reasons}"
    if not keep_N.any():
        raise UserError(f"{split.source}: nothing is left, {note}; give other texts, or none")
    texts = tuple(TextColumn(itertools.compress(column, keep_N)) for column in split.texts)
    return replace(
        split, ids_N=hash_N[keep_N], texts=texts, labels_N=split.labels_N[keep_N], notes=(*split.notes, note)
    )  # fmt: skip


def _stand_in(hash_N: np.ndarray, ids_M: np.ndarray) -> np.ndarray:
    """Which of some numbers are among others: booleans (N,)."""
    ids_M = np.sort(ids_M)
    return ids_M[np.minimum(np.searchsorted(ids_M, hash_N), len(ids_M) - 1)] == hash_N


def _on_disk(rows: Iterator[Row], width: int) -> tuple[array[int], tuple[TextColumn, ...]]:
    """The numbers of rows, and their first values; one that is not there is empty."""
    numbers: array[int] = array("q")
    columns = tuple(TextColumn() for _ in range(width))
    _append(columns, rows, numbers)
    return numbers, columns


def _append(columns: Sequence[TextColumn], rows: Iterator[Row], numbers: array[int] | None = None) -> None:
    while chunk := list(itertools.islice(rows, _CHUNK)):
        if numbers is not None:
            numbers.extend([number for number, _ in chunk])
        for i, column in enumerate(columns):
            column.extend([fields[i] or "" for _, fields in chunk])


def _with_text(rows: Rows, task: Task, notes: list[str]) -> Iterator[Row]:
    """The rows that have text in every text column; others are refused, or left out and noted where the task says so."""
    width = len(task.text)

    def whole(fields: list[Any]) -> bool:
        return all(value and value.strip() for value in fields[:width])

    kept = rows.rows
    if task.leave_out_broken:
        kept = _noted(kept, whole, "broken, with too few fields or an empty text", rows.unit, notes)
    for number, fields in kept:
        for column, value in zip(task.text, fields, strict=False):
            _require_text(rows, number, column, value)
        yield number, fields


def _noted(
    rows: Iterator[Row], keep: Callable[[list[Any]], bool], what: str, unit: str, notes: list[str]
) -> Iterator[Row]:
    """The rows whose values are to be kept. Once all have passed, a note says how many did not, and where the first stand."""
    count, first = 0, []
    for number, fields in rows:
        if keep(fields):
            yield number, fields
        else:
            count += 1
            if count <= _SHOWN:
                first.append(str(number))
    if count:
        notes.append(f"{count} left out, {what}: {unit} {', '.join(first)}{', ...' if count > _SHOWN else ''}")


def _require_text(rows: Rows, number: int, column: str, value: str | None) -> None:
    if not value or value.isspace():
        raise UserError(f"{rows.at(number)}: {column} is empty; give it a value or remove the line")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{rows.at(number)}: {column} holds half of a surrogate pair, which is not text; mend the escape"
            ) from None


def _sorted_classes(values: set[str]) -> list[str]:
    """Numbers in numeric order, else alphabetical."""
    try:
        numbers = {value: float(value) for value in values}
    except ValueError:
        return sorted(values)
    if not all(map(math.isfinite, numbers.values())):
        return sorted(values)
    return sorted(values, key=lambda value: (numbers[value], value))  # 1 and 1.0 are two classes, in a fixed order


@dataclass(frozen=True)
class _Labels:
    """The label column: (line or row number, value) of each example, as often as one likes. Raises UserError where a value
    is empty."""

    rows: Rows
    numbers: Sequence[int]
    column: str
    values: Sequence[str]

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for number, value in zip(self.numbers, self.values, strict=True):
            _require_text(self.rows, number, self.column, value)
            yield number, value.strip()


def _class_indices(labels: _Labels, known: tuple[str, ...], split: str, task: Task) -> np.ndarray:
    """A value may be the class's name."""
    index = {value: i for values in (task.names_of(known), known) for i, value in enumerate(values)}
    out = np.empty(len(labels), np.int64)
    for i, (number, value) in enumerate(labels):
        if value not in index:
            allowed = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
            seen = "" if task.classes else " of the teacher" if split == "train" else " seen in training"
            raise UserError(
                f"{labels.rows.at(number)}: {task.label} {value!r} is not one of the labels{seen}: {allowed}"
            )
        out[i] = index[value]
    return out


def _numbers(labels: _Labels, task: Task) -> np.ndarray:
    out = np.empty(len(labels), dtype=np.float32)
    low, high = task.value_range or (-np.inf, np.inf)
    for i, (number, value) in enumerate(labels):
        where = labels.rows.at(number)
        try:
            out[i] = float(value)
        except ValueError:
            out[i] = np.nan
        if not np.isfinite(out[i]):
            raise UserError(f"{where}: {task.label} {value!r} is not a number; a regression needs one")
        if not low <= out[i] <= high:
            raise UserError(f"{where}: {task.label} {value} is not between {low:g} and {high:g}")
    return out


# ----------------------------------------------------------------------------------------------------------------- ids


def example_ids(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """int64 (N,): a hash of each example's text, and of how often it stood before.

    Args:
        texts: one or two columns of N strings.

    Raises:
        UserError: two different texts have one id.
    """
    ids_N = _hashes(texts)
    refusal = UserError("two different texts have the same 64-bit id; change one of them by a space")
    order_N = np.argsort(ids_N, kind="stable")
    again = _places_of_repeats(ids_N[order_N])
    repeat, last, before = 0, 0, b""
    for place in again.tolist():
        repeat = repeat + 1 if place == last + 1 else 1
        if repeat == 1:
            before = _content(column[order_N[place - 1]] for column in texts)
        last = place
        content = _content(column[order_N[place]] for column in texts)
        if content != before:
            raise refusal
        ids_N[order_N[place]] = int.from_bytes(_hash(content, repeat), "little", signed=True)
    del order_N
    if len(again) and len(_places_of_repeats(np.sort(ids_N))):
        raise refusal
    return ids_N


def _places_of_repeats(sorted_N: np.ndarray) -> np.ndarray:
    """Where a value stands that is the one before."""
    return np.flatnonzero(sorted_N[1:] == sorted_N[:-1]) + 1


def _hashes(texts: Sequence[Sequence[str]]) -> np.ndarray:
    """int64 (N,): of each example's text alone, which is the id of one that did not stand before."""
    hashes = bytearray()
    for fields in zip(*texts, strict=True):
        hashes += _hash(_content(fields), 0)
    return np.frombuffer(hashes, "<i8")


def _content(fields: Iterable[str]) -> bytes:
    return "\x1f".join(fields).encode()


def _hash(content: bytes, repeat: int) -> bytes:
    return hashlib.blake2b(content + repeat.to_bytes(8, "little"), digest_size=8).digest()
