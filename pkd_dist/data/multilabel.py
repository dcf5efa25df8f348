"""Labels of texts that can have several classes, or none.

    a list, a delimited text, or one column for each class -> (N, C) of 0 and 1

Shapes: N examples, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np

from pkd_dist.data.class_values import class_value, sorted_classes
from pkd_dist.data.examples import present
from pkd_dist.data.tables import Table
from pkd_dist.data.tasks import Task
from pkd_dist.errors import UserError

_FLAGS = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0}
_MAX_SHOWN = 10


def read(
    table: Table, numbers: Sequence[int], columns: Sequence[Sequence[str]], task: Task, known: tuple[str, ...]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the labels, float32 (N, C), and the classes in their order.

    Args:
        table: for messages.
        numbers: line or row number of each example.
        columns: one column of lists or delimited text, or one for each of `task.class_columns`.
        known: the classes; empty: those of these examples, sorted.

    Raises:
        UserError: a value is invalid or no class; the message names the file and line.
    """
    if task.class_columns:
        return _flags(table, numbers, columns, task, known)
    rows = list(_sets(table, numbers, columns[0], task))
    known = known or tuple(sorted_classes({class_value(value) for values in rows for value in values}))
    if len(known) < 2:
        found = f"one class, {known[0]!r}" if known else "no class"
        raise UserError(f"{table.name}: {task.label} has {found}; a multilabel task needs at least two")
    index = {value: i for values in (task.names_of(known), known) for i, value in enumerate(values)}
    index = {class_value(value): i for value, i in index.items()} | index
    labels_NC = np.zeros((len(rows), len(known)), np.float32)
    for row, (number, values) in enumerate(zip(numbers, rows, strict=True)):
        for value in values:
            at = index.get(value, index.get(class_value(value)))
            if at is None:
                allowed = ", ".join(known[:_MAX_SHOWN]) + (", ..." if len(known) > _MAX_SHOWN else "")
                raise UserError(f"{table.at(number)}: {task.label} {value!r} is not one of the classes: {allowed}")
            labels_NC[row, at] = 1
    return labels_NC, known


def _sets(table: Table, numbers: Sequence[int], cells: Sequence[str], task: Task) -> Iterator[list[str]]:
    """Yield the classes of each example, as they are written."""
    for number, cell in zip(numbers, cells, strict=True):
        text = cell.strip()
        values = _of_list(text, table.at(number), task) if text[:1] == "[" else text.split(task.label_separator)
        yield [value for value in map(str.strip, values) if value]


def _of_list(text: str, where: str, task: Task) -> list[str]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(
            f'{where}: {task.label} {_short(text)} is not a JSON list, such as ["a", "b"]; write one, or classes separated by '
            f"{task.label_separator!r}"
        ) from None
    if not isinstance(found, list) or any(
        isinstance(each, bool) or not isinstance(each, (str, int, float)) for each in found
    ):
        raise UserError(f"{where}: {task.label} {_short(text)} must be a list of texts or numbers")
    return [each if isinstance(each, str) else json.dumps(each) for each in found]


def _flags(
    table: Table, numbers: Sequence[int], columns: Sequence[Sequence[str]], task: Task, known: tuple[str, ...]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the labels of one column for each class, in the order of `known`."""
    order = known or task.classes or task.class_columns
    place = {value: i for i, value in enumerate(order)}
    if set(place) != set(task.class_columns):
        raise UserError(
            f"{table.name}: the classes are {', '.join(order[:_MAX_SHOWN])}, the columns of task.label are "
            f"{', '.join(task.class_columns[:_MAX_SHOWN])}; name a column for each class"
        )
    labels_NC = np.zeros((len(numbers), len(order)), np.float32)
    for name, column in zip(task.class_columns, columns, strict=True):
        for row, (number, cell) in enumerate(zip(numbers, column, strict=True)):
            value = _FLAGS.get(class_value(cell.strip()).lower())
            if value is None:
                said = f"{_short(cell)} is not 0 or 1" if cell.strip() else "is empty, null or NaN"
                raise UserError(f"{table.at(number)}: {name} {said}; a column of a class needs 0 or 1")
            labels_NC[row, place[name]] = value
    return labels_NC, order


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def doubts(labels_NC: np.ndarray, task: Task, classes: Sequence[str]) -> Iterator[str]:
    """Yield what looks wrong in the labels of a training split."""
    if labels_NC.sum(axis=1).max() < 2:
        how = "" if task.class_columns else f"; is task.label_separator {task.label_separator!r} right?"
        yield f"no text has more than one class{how}"
    if missing := [name for name, any_C in zip(task.names_of(classes), present(labels_NC), strict=True) if not any_C]:
        yield f"has no example of {_listed(missing)}"


def lacking(part_NC: np.ndarray, all_NC: np.ndarray, names: Sequence[str]) -> Iterator[str]:
    """Yield a note on the classes that a part of the data lacks."""
    lacks_C = present(all_NC) & ~present(part_NC)
    if missing := [name for name, lacks in zip(names, lacks_C, strict=True) if lacks]:
        yield f"has no example of {_listed(missing)}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(names[:_MAX_SHOWN]) + more
