"""Labels of texts that can have several classes, or none.

    a list, a delimited text, or one column for each class -> (N, C) of 0 and 1

Shapes: N examples, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from pkd_dist.data.class_values import ClassIndex, class_value, sorted_classes
from pkd_dist.data.examples import present
from pkd_dist.data.tables import Table
from pkd_dist.data.tasks import Task
from pkd_dist.errors import UserError
from pkd_dist.telemetry.markup import printable

_FLAGS = {"0": False, "1": True, "false": False, "true": True}
_MAX_SHOWN = 10


def read(
    table: Table,
    numbers: Sequence[int],
    columns: Sequence[Sequence[str]],
    task: Task,
    known: tuple[str, ...],
    split: str,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the labels, float32 (N, C), and the classes in their order.

    Args:
        table, split: for messages.
        numbers: line or row number of each example.
        columns: one column of lists or delimited text, or one for each of `task.class_columns`.
        known: the classes; empty: those of these examples, sorted.

    Raises:
        UserError: a value is invalid or no class; the message names the file and line.
    """
    rows = [
        given(cells, partial(table.at, number), task)
        for number, cells in zip(numbers, zip(*columns, strict=True), strict=True)
    ]
    known = known or tuple(sorted_classes({class_value(value) for values in rows for value in values}))
    if len(known) < 2:
        found = f"one class, {known[0]!r}" if known else "no class"
        raise UserError(f"{table.name}: {task.label} has {found}; a multilabel task needs at least two")
    if task.class_columns and set(known) != set(task.class_columns):
        raise UserError(
            f"{table.name}: the classes are {listed(known)}, the columns of task.label are "
            f"{listed(task.class_columns)}; name a column for each class"
        )
    index = ClassIndex(known, task, split)
    labels_NC = np.zeros((len(rows), len(known)), np.float32)
    for row, (number, values) in enumerate(zip(numbers, rows, strict=True)):
        for value in values:
            table.require_unicode(number, task.label, value)
            labels_NC[row, index.of(value, partial(table.at, number))] = 1
    if split == "dev":
        require_any(labels_NC, table.name)
    return labels_NC, known


def require_any(labels_NC: np.ndarray, name: str) -> None:
    """Raise UserError if no example of a dev split has a class."""
    if not labels_NC.any():
        raise UserError(
            f"{name}: no example has a class; dev selects the best epoch and the threshold of each class, so it needs some"
        )


def given(cells: Sequence[str], where: Callable[[], str], task: Task) -> list[str]:
    """Return the classes of one example as they are written.

    Args:
        cells: a list or a delimited text, or a value for each of `task.class_columns`.
        where: returns the place of the example, for messages.

    Raises:
        UserError: a value is invalid.
    """
    if task.class_columns:
        return [name for name, cell in zip(task.class_columns, cells, strict=True) if _flag(cell.strip(), name, where)]
    text = cells[0].strip()
    values = _of_list(text, where, task) if text[:1] == "[" else text.split(task.label_separator)
    return [value for value in map(str.strip, values) if value]


def _flag(text: str, column: str, where: Callable[[], str]) -> bool:
    value = _FLAGS.get(class_value(text).lower())
    if value is None:
        said = f"{_short(text)} is not 0 or 1" if text else "is empty, null or NaN"
        raise UserError(f"{where()}: {column} {said}; a column of a class needs 0 or 1")
    return value


def _of_list(text: str, where: Callable[[], str], task: Task) -> list[str]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(
            f'{where()}: {task.label} {_short(text)} is not a JSON list, such as ["a", "b"]; write one, or classes separated by '
            f"{task.label_separator!r}"
        ) from None
    if not isinstance(found, list) or any(
        isinstance(each, bool) or not isinstance(each, (str, int, float)) for each in found
    ):
        raise UserError(f"{where()}: {task.label} {_short(text)} must be a list of texts or numbers")
    return [each if isinstance(each, str) else json.dumps(each) for each in found]


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def doubts(labels_NC: np.ndarray, task: Task, classes: Sequence[str], split: str) -> Iterator[str]:
    """Yield what looks wrong in the labels of a split."""
    if split == "train" and labels_NC.sum(axis=1).max() < 2:
        how = "" if task.class_columns else f"; is task.label_separator {task.label_separator!r} right?"
        yield f"no text has more than one class{how}"
    if missing := [name for name, any_C in zip(task.names_of(classes), present(labels_NC), strict=True) if not any_C]:
        yield f"has no example of {listed(missing)}"


def lacking(part_NC: np.ndarray, all_NC: np.ndarray, names: Sequence[str]) -> Iterator[str]:
    """Yield a note on the classes that a part of the data lacks."""
    lacks_C = present(all_NC) & ~present(part_NC)
    if missing := [name for name, lacks in zip(names, lacks_C, strict=True) if lacks]:
        yield f"has no example of {listed(missing)}"


def listed(names: Sequence[str]) -> str:
    """Return the first few of many names, and the number of the others."""
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(map(printable, names[:_MAX_SHOWN])) + more
