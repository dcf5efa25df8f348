"""Read labels: the values of the label columns as numbers.

    a class, a number, several classes (`multilabel.py`) or an option (`multiple_choice.py`) -> an array of labels

Shapes: N examples, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from pkd_dist.data import multilabel, multiple_choice
from pkd_dist.data.class_values import ClassIndex, class_value, sorted_classes
from pkd_dist.data.tables import Table
from pkd_dist.data.tasks import Task
from pkd_dist.errors import UserError

_HUB_UNLABELLED = "-1"
_PLAIN_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
"""Of what `float` reads, neither `1_000` nor digits of other scripts."""


@dataclass(frozen=True)
class _LabelColumn:
    """The label column. Iterating yields (line or row number, value) and raises UserError for an empty value."""

    table: Table
    numbers: Sequence[int]
    name: str
    values: Sequence[str]

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for number, value in zip(self.numbers, self.values, strict=True):
            if not value or value.isspace():
                where = self.table.at(number)
                raise UserError(
                    f"{where}: {self.name} is empty, null or NaN; give it a value or remove the {self.table.unit}"
                )
            self.table.require_unicode(number, self.name, value)
            yield number, value.strip()


def read_labels(
    table: Table, numbers: Sequence[int], columns: Sequence[Sequence[str]], options: Sequence[Sequence[str]],
    known: tuple[str, ...], split: str, task: Task,
) -> tuple[np.ndarray, tuple[str, ...]]:  # fmt: skip
    """Return the label of each row as a number, and the classes: the known ones, else those of the rows.

    Args:
        table: for messages.
        numbers: line or row number of each example.
        columns: the label columns.
        options: the columns of the options, of a multiple-choice task.
        known: the classes; empty: those of these examples.
        split: name of the split, for messages.

    Returns:
        int64 (N,) class indices or places of the right option, float32 (N,) targets of a regression, or float32 (N, C) of 0 and 1
        where a text can have several classes; and the classes.

    Raises:
        UserError: a value is invalid or no class; the message names the file and line.
    """
    if task.multilabel:
        return multilabel.read(table, numbers, columns, task, known, split)
    labels = _LabelColumn(table, numbers, task.label, columns[0])
    if task.multiple_choice:
        return multiple_choice.read_labels(table, labels, options, task), known
    if task.regression:
        return _numbers(labels, task), known
    known = known or tuple(sorted_classes(set(map(class_value, {value for _, value in labels}))))
    return _class_indices(labels, known, split, task), known


def require_different(labels_N: np.ndarray, table: Table, columns: Sequence[Sequence[str]], task: Task) -> None:
    """Raise UserError if all training examples have the same label; of options, the first may always be the right one."""
    if task.regression or task.multiple_choice or not (labels_N == labels_N[0]).all():
        return
    if task.multilabel:
        raise UserError(f"{table.name}: every example has the same classes, or none; training needs different ones")
    raise UserError(
        f"{table.name}: every example has the label {columns[0][0].strip()!r}; training needs at least two classes"
    )


def all_empty(values: Sequence[str], known: tuple[str, ...]) -> bool:
    """Return whether no label is set: all are empty, or -1 as on the hub unless -1 is a class."""
    empty = {"", _HUB_UNLABELLED} - set(known)
    return all(class_value(value.strip()) in empty for value in values)


def _class_indices(labels: _LabelColumn, known: tuple[str, ...], split: str, task: Task) -> np.ndarray:
    """Return int64 (N,) class indices. A label may be the value of a class or its name."""
    index = ClassIndex(known, task, split)
    found = (index.of(value, partial(labels.table.at, number)) for number, value in labels)
    return np.fromiter(found, np.int64, len(labels))


def _numbers(labels: _LabelColumn, task: Task) -> np.ndarray:
    """Return float32 (N,) regression targets."""
    out = np.empty(len(labels), dtype=np.float32)
    low, high = task.value_range or (-np.inf, np.inf)
    for i, (number, value) in enumerate(labels):
        where = labels.table.at(number)
        out[i] = float(value) if _PLAIN_NUMBER.fullmatch(value) else np.nan
        if not np.isfinite(out[i]):
            raise UserError(f"{where}: {task.label} {value!r} is not a number; a regression needs one")
        if not low <= out[i] <= high:
            raise UserError(f"{where}: {task.label} {value} is not between {low:g} and {high:g}")
    return out
