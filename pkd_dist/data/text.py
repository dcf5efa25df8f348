"""Read a split: files -> rows -> examples.

`sources.py` finds the file, `rows.py` reads its rows, and `read` drops rows that the task excludes, gives each option a column of
its own (`multiple_choice.py`), stores the text on disk (`columns.py`), and turns labels into numbers (`labels.py`). Invalid rows
raise `UserError` with file and line. Rows that a task allows to skip are counted in the split's notes.

Rows are streamed: memory holds only ids, labels, and the end of each text. One file that is split (`splitting.py`) is read once
for all its parts.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pkd_dist.config.task import FileSplit
from pkd_dist.data import duplicates, multilabel, multiple_choice, splitting
from pkd_dist.data.columns import TextColumn
from pkd_dist.data.examples import Split, example_ids, is_labelled, select, unlabelled, unlabelled_sets
from pkd_dist.data.labels import all_empty, read_labels, require_different
from pkd_dist.data.rows import read_file, read_lines
from pkd_dist.data.sources import Source, available, hub_names, require, unlabeled_paths
from pkd_dist.data.tables import Fields, Row, RowNumbers, Table, TableSpec
from pkd_dist.data.tasks import GLUE_COLUMNS, Task
from pkd_dist.data.typed import read_hub
from pkd_dist.errors import UserError
from pkd_dist.telemetry.markup import printable

_WITHOUT_LABELS = "with distill.alpha: 1, the student learns from a given teacher alone, which needs none"
_MAX_COLUMNS_IN_NOTE = 10
_CHUNK_ROWS = 4096


def read(data: str, split: str, task: Task, classes: Sequence[str] | None = None) -> Split:
    """Read one split. Labels are optional if the split's name starts with `test`.

    Args:
        data: `task.data`.
        split: one of `task.splits`.
        task: its columns and file names.
        classes: label values in class order; None: the task's, else those of this split, sorted.

    Raises:
        UserError: invalid data; the message names the file and line.
    """
    source = require(data, split, task)
    if source.is_part:
        return _read_parts(source, task, classes)[split]
    try:
        return _read_split(source, split, task, classes)
    except UserError as error:
        if split != "train" or task.unlabelled_train == "refuse" or not task.has_labels:
            raise
        without_labels = _without_labels(source, task, classes)
        if without_labels is None:
            raise
        if task.unlabelled_train == "explain":
            raise UserError(f"{error.message}; {_WITHOUT_LABELS}") from None
        return without_labels


def _without_labels(source: Source, task: Task, classes: Sequence[str] | None) -> Split | None:
    """Return a train split that has no label at all; None if it has one, or is invalid."""
    try:
        found = _read_split(source, "train", task, classes, may_lack=True)
    except UserError:
        return None
    return None if is_labelled(found.labels_N).any() else found


def _read_split(source: Source, split: str, task: Task, classes: Sequence[str] | None, may_lack: bool = False) -> Split:
    """Read a split that has a table of its own.

    Args:
        may_lack: accept a train split without labels.
    """
    labels_optional = split.startswith("test") or not task.has_labels or may_lack
    found = _content(source, split, task, labels_optional, options=len(classes or ()))
    known, notes = _known(found, task, classes), found.notes
    no_labels_N = _unlabelled(len(found.numbers), task, known)
    examples = Split(
        example_ids(found.texts), found.texts, no_labels_N, known, found.table.name, notes, choices=task.choices
    )
    if labels_optional and all(all_empty(column, known) for column in found.labels):
        if found.skipped and split.startswith("test"):
            warning = "GLUE requires a prediction for every line and will reject a submission without the skipped ones"
            examples = replace(examples, notes=(*notes, warning))
        if may_lack:
            examples = replace(examples, notes=(*notes, f"has no labels; {_WITHOUT_LABELS}"))
        return examples
    labels_N, known = _labels(found, known, split, task)
    if split == "train":
        require_different(labels_N, found.table, found.labels, task)
    if task.multilabel:
        examples = replace(examples, notes=(*notes, *multilabel.doubts(labels_N, task, known, split)))
    return replace(examples, labels_N=labels_N, classes=known)


def read_all(
    data: str, task: Task, classes: Sequence[str] | None = None, check: Callable[[], None] = lambda: None
) -> dict[str, Split]:
    """Read all splits that the data has, train first, and do with duplicates what `task.duplicates` says.

    Args:
        data, task, classes: see `read`; classes found in train are those of all splits.
        check: called between splits; an exception it raises stops the work.

    Raises:
        UserError: as `read`, train or dev is missing, or duplicates are refused.
    """
    source = require(data, "train", task)
    if source.is_part:
        splits = _read_parts(source, task, classes)
    else:
        splits = {"train": read(data, "train", task, classes)}
        for name in dict.fromkeys(("dev", *available(data, task)[1:])):
            check()
            splits[name] = read(data, name, task, splits["train"].classes or None)
            if not splits["train"].classes:  # it has no labels
                splits["train"] = replace(splits["train"], classes=splits[name].classes)
    check()
    return duplicates.settled(splits, task)


def _read_parts(source: Source, task: Task, classes: Sequence[str] | None) -> dict[str, Split]:
    """Read one file, and return its parts."""
    settings = task.file_split or FileSplit()
    found = _content(source, "train", task, labels_optional=not task.has_labels, group=settings.group)
    known = _known(found, task, classes)
    if task.has_labels:
        labels_N, known = _labels(found, known, "train", task)
    else:
        labels_N = unlabelled(len(found.numbers), regression=False)
    is_classified = task.has_labels and task.has_single_classes and task.has_named_classes
    class_N = labels_N if is_classified else np.zeros(len(labels_N), np.int64)
    names = task.names_of(known) if is_classified else []
    table = splitting.Table(found.table.name, found.texts, class_N, names, found.groups)
    part_N, notes = splitting.split(table, task.file_split)
    if task.multilabel:
        for i, name in enumerate(splitting.parts(task.file_split)):
            notes[name] += multilabel.lacking(labels_N[part_N == i], labels_N, task.names_of(known))
            if name == "dev":
                multilabel.require_any(labels_N[part_N == i], f"{found.table.name} (dev)")
    if task.has_labels:
        require_different(labels_N[part_N == splitting.TRAIN], found.table, found.labels, task)
    whole = Split(
        example_ids(found.texts),
        found.texts,
        labels_N,
        known,
        found.table.name,
        rows=found.numbers,
        choices=task.choices,
    )
    splits = {name: select(whole, part_N == i) for i, name in enumerate(splitting.parts(task.file_split))}
    return {
        name: replace(
            part,
            source=f"{whole.source} ({name})",
            notes=(*(found.notes if name == "train" else ()), *notes[name]),
        )
        for name, part in splits.items()
    }


def read_unlabeled(files: Sequence[str], task: Task, classes: Sequence[str] = ()) -> Split:
    """Read text without labels (`task.unlabeled`). The result may hold repeats and texts of other splits; see `without`.

    Args:
        files: `.txt` with one text per line (single sentences only), or tables with the task's text columns. Other columns
            are ignored, including the label's.
        task: its text columns.
        classes: of the task, where the data decides them.

    Raises:
        UserError: invalid data; the message names the file and line.
    """
    texts = tuple(TextColumn() for _ in (*task.text, *(classes if task.multiple_choice else ())))
    spec = TableSpec(task.inputs, (), task.headerless, task.skip_broken, lists=task.list_columns)
    notes: list[str] = []
    for path in unlabeled_paths(files, task):
        table = read_lines(path) if path.suffix == ".txt" else read_file(path, spec)
        skipped: list[str] = []
        before = len(texts[0])
        rows = _with_text(table, task, skipped)
        if task.multiple_choice:
            rows, _ = multiple_choice.with_option_columns(rows, table, task, len(classes))
        _append(texts, rows)
        if len(texts[0]) == before:
            raise UserError(f"{path}: has no examples; at least one is needed")
        notes += [f"{path.name}: {note}" for note in (*table.notes, *skipped)]
    labels_N = _unlabelled(len(texts[0]), task, tuple(classes) or task.classes or ())
    known = task.classes or ()
    return Split(example_ids(texts), texts, labels_N, known, ", ".join(files), tuple(notes), choices=task.choices)


def _known(found: _Content, task: Task, classes: Sequence[str] | None) -> tuple[str, ...]:
    """Return the classes that are known before labels are read; of options, what labels call them."""
    if task.choices:
        return multiple_choice.classes_of(task.choices.count(found.texts), task)
    return tuple(classes or task.classes or ())


def _labels(found: _Content, known: tuple[str, ...], split: str, task: Task) -> tuple[np.ndarray, tuple[str, ...]]:
    options = task.choices.options(found.texts) if task.choices else ()
    return read_labels(found.table, found.numbers, found.labels, options, known, split, task)


def _unlabelled(count: int, task: Task, classes: Sequence[str]) -> np.ndarray:
    return unlabelled_sets(count, len(classes)) if task.multilabel else unlabelled(count, task.regression)


# --------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class _Content:
    """The rows of a split, or of a file that is to be split.

    Attributes:
        numbers: line or row number of each.
        texts: the text columns, then one for each option.
        labels: one column, or one for each class.
        groups: values of `task.split.group`; None: not read.
        skipped: notes about the rows that were left out.
    """

    table: Table
    numbers: array[int]
    texts: tuple[TextColumn, ...]
    labels: tuple[TextColumn, ...]
    groups: TextColumn | None
    notes: tuple[str, ...]
    skipped: tuple[str, ...]


def _content(
    source: Source, split: str, task: Task, labels_optional: bool, group: str | None = None, options: int = 0
) -> _Content:
    """Read the text, the label and the group of each row that belongs to a split.

    Args:
        options: how many each example must have, of a multiple-choice task; 0: as many as the first.
    """
    table = _open(source, split, task, labels_optional, group)
    skipped: list[str] = []
    rows, inputs = _select(table, source, task, labels_optional, skipped), len(task.text)
    if task.multiple_choice:
        rows, options = multiple_choice.with_option_columns(rows, table, task, options)
        inputs += options
    width = inputs + len(task.label_columns)
    more = group is not None and group not in task.text
    numbers, columns = _store(rows, width + more)
    if not numbers:
        raise UserError(f"{table.name}: has no examples; at least one is needed")
    texts, labels, groups = columns[:inputs], columns[inputs:width], None
    if group is not None:
        groups = columns[width] if more else texts[task.text.index(group)]
    notes = (*source.notes, *table.notes, *_unused(table, task), *skipped)
    return _Content(table, numbers, texts, labels, groups, notes, tuple(skipped))


def _open(source: Source, split: str, task: Task, labels_optional: bool, group: str | None) -> Table:
    """Open a table with the text columns, the label, the group and, if the source lists dev pairs, the two id columns."""
    columns = (*task.inputs, *task.label_columns)
    optional = task.label_columns if labels_optional else ()
    if isinstance(source.place, str):
        hub_columns = {name: task.hub_columns.get(name, name) for name in columns}
        spec = TableSpec(
            tuple(hub_columns.values()), tuple(hub_columns[name] for name in optional), lists=task.list_columns
        )
        return read_hub(source.place, hub_names(split, task), spec)
    if source.dev_ids and task.release:
        columns += task.release.id_columns
    if group is not None and group not in columns:
        columns += (group,)
    spec = TableSpec(columns, optional, task.headerless, task.skip_broken, lists=task.list_columns)
    return read_file(source.place, spec)


def _select(table: Table, source: Source, task: Task, labels_optional: bool, skipped: list[str]) -> Iterator[Row]:
    """Yield the rows that belong to the split. `skipped` and the table's notes are complete once all rows were read."""
    rows = _with_text(table, task, skipped)
    if source.dev_ids and task.release:
        rows = _of_split(rows, source.dev_ids, source.is_dev, task.release.id_columns, table.name, table.notes)
    no_label: set[str | None] = {task.no_label} if task.no_label is not None else set()
    if isinstance(source.place, str) and not labels_optional and not task.multilabel:
        no_label.add(None)  # -1 of a class label on the hub
    if no_label:
        at = len(task.inputs)
        shown = " or ".join("missing" if value is None else repr(value) for value in sorted(no_label, key=str))
        reason = f"without a label ({task.label} is {shown})"
        rows = _skip(rows, lambda fields: fields[at] in no_label, reason, table.unit, skipped)
    return rows


def _of_split(
    rows: Iterator[Row], dev_ids: Path, is_dev: bool, id_columns: tuple[str, str], name: str, notes: list[str]
) -> Iterator[Row]:
    """Yield the rows whose last two values are a pair of `dev_ids` (`is_dev`), or the others."""
    dev_pairs = _read_pairs(dev_ids, id_columns)
    count = 0
    for number, fields in rows:
        if (tuple(fields[-2:]) in dev_pairs) == is_dev:
            count += 1
            yield number, fields
    if is_dev and count < len(dev_pairs):
        notes.append(f"{len(dev_pairs) - count} pair(s) of {dev_ids.name} are not in {name}")


def _read_pairs(path: Path, header: tuple[str, str]) -> set[tuple[str | None, ...]]:
    pairs: set[tuple[str | None, ...]] = set()
    for number, (line,) in read_lines(path).rows:
        pair = tuple((line or "").strip().split("\t"))
        if len(pair) != 2:
            raise UserError(f"{path}:{number}: has {len(pair)} field(s); expected the two ids of a pair")
        pairs.add(pair)
    return pairs - {header}


def _with_text(table: Table, task: Task, skipped: list[str]) -> Iterator[Row]:
    """Yield the rows with text. Others are skipped if the task allows it, else they are an error.

    One half of a pair may be empty; the table's notes tell how often.
    """
    width = len(task.text)
    rows = table.rows
    if task.skip_broken:
        rows = _skip(rows, lambda fields: not any(map(_has_text, fields[:width])), "without text", table.unit, skipped)
    empty = [RowNumbers(table.unit) for _ in task.text]
    for number, fields in rows:
        for column, value, empty_rows in zip(task.text, fields, empty, strict=False):
            if value and not value.isspace():
                table.require_unicode(number, column, value)
            elif any(map(_has_text, fields[:width])):
                empty_rows.add(number)
            else:
                what = "is empty; give it a value" if width == 1 else "are both empty; give one of them a value"
                raise UserError(f"{table.at(number)}: {' and '.join(task.text)} {what} or remove the {table.unit}")
        yield number, fields
    for column, empty_rows in zip(task.text, empty, strict=True):
        if empty_rows.count:
            table.notes.append(f"{column} is empty in {empty_rows}")


def _skip(
    rows: Iterator[Row], exclude: Callable[[Fields], bool], reason: str, unit: str, skipped: list[str]
) -> Iterator[Row]:
    """Yield the rows that are not excluded. After the last one, add a note with the number of the others and the first few."""
    excluded = RowNumbers(unit)
    for number, fields in rows:
        if exclude(fields):
            excluded.add(number)
        else:
            yield number, fields
    if excluded.count:
        skipped.append(f"skipped {excluded.counted} {reason}: {excluded.first}")


def _unused(table: Table, task: Task) -> Iterator[str]:
    """Yield a note about the columns of a table that the task does not use, except those that GLUE's files have."""
    unused = [name for name in table.unused if task.name == "custom" or name not in GLUE_COLUMNS]
    if unused:
        more = ", ..." if len(unused) > _MAX_COLUMNS_IN_NOTE else ""
        yield f"columns not used: {', '.join(map(printable, unused[:_MAX_COLUMNS_IN_NOTE]))}{more}"


def _has_text(value: str | None) -> bool:
    return bool(value and not value.isspace())


def _store(rows: Iterator[Row], width: int) -> tuple[array[int], tuple[TextColumn, ...]]:
    """Return the row numbers and the first `width` values of all rows; a missing value becomes an empty text."""
    numbers: array[int] = array("q")
    columns = tuple(TextColumn() for _ in range(width))
    _append(columns, rows, numbers)
    return numbers, columns


def _append(columns: Sequence[TextColumn], rows: Iterator[Row], numbers: array[int] | None = None) -> None:
    while chunk := list(itertools.islice(rows, _CHUNK_ROWS)):
        if numbers is not None:
            numbers.extend([number for number, _ in chunk])
        for i, column in enumerate(columns):
            column.extend([fields[i] or "" for _, fields in chunk])
