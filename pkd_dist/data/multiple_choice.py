"""Read multiple-choice examples: options and labels.

    rows with a list of options, or a column for each -> rows with a column for each -> columns of text
    a label that is an index, a letter or the option itself -> the index of the right option

Shapes: N examples, C options.
"""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pkd_dist.config.multiple_choice import MOST_OPTIONS
from pkd_dist.data.class_values import class_value
from pkd_dist.data.tables import Row, RowNumbers, Table
from pkd_dist.data.tasks import Task
from pkd_dist.errors import UserError

_SHOWN = 60


def classes_of(count: int, task: Task) -> tuple[str, ...]:
    """Return what the labels call the options of an example, in order: 0, 1, ..., or A, B, ... where they are letters."""
    return tuple(string.ascii_uppercase[:count] if task.label_is == "letter" else map(str, range(count)))


def with_option_columns(rows: Iterator[Row], table: Table, task: Task, known: int) -> tuple[Iterator[Row], int]:
    """Return rows with one value for each option in place of a list, and the number of options C.

    Args:
        rows: the values of `task.text`, `task.options` and others; not None for options that are columns of their own.
        known: the number of options of the training split; 0: the first row decides.

    Raises:
        UserError: an example has another number of options than the others, or a value is no list of texts; also while the rows
            are iterated. The message names the file and line.
    """
    start = len(task.text)
    if not task.has_option_lists:
        return _complete(rows, table, task), len(task.options)
    first = next(rows, None)
    if first is None:
        return iter(()), known
    count = known or len(options_of(first[1][start], table.at(first[0]), task))

    empty, repeated = RowNumbers(table.unit), RowNumbers(table.unit)

    def spread() -> Iterator[Row]:
        for number, fields in itertools.chain([first], rows):
            options = options_of(fields[start], table.at(number), task)
            for option in options:
                table.require_unicode(number, task.options[0], option)
            if len(options) != count:
                whose = "the training split" if known else "the first example"
                raise UserError(
                    f"{table.at(number)}: {task.options[0]} has {len(options)} options, {whose} has {count}; all examples need the "
                    "same number"
                )
            if not all(map(str.strip, options)):
                empty.add(number)
            if len(set(options)) < count:
                repeated.add(number)
            yield number, [*fields[:start], *options, *fields[start + 1 :]]
        for found, what in ((empty, "an empty option"), (repeated, "the same option twice")):
            if found.count:
                table.notes.append(f"{task.options[0]} has {what} in {found}")

    return spread(), count


def _complete(rows: Iterable[Row], table: Table, task: Task) -> Iterator[Row]:
    """Yield rows whose options, in columns of their own, all have text."""
    start = len(task.text)
    for number, fields in rows:
        for name, value in zip(task.options, fields[start:], strict=False):
            if not value or value.isspace():
                raise UserError(
                    f"{table.at(number)}: {name} is empty; all examples need the same number of options: give it a text or "
                    f"remove the {table.unit}"
                )
            table.require_unicode(number, name, value)
        yield number, fields


def options_of(cell: object, where: str, task: Task) -> list[str]:
    """Return the options in a value of a column of lists: a list of texts, also as JSON.

    Raises:
        UserError: it is no such list; the message begins with `where`.
    """
    found, cell = cell, cell if isinstance(cell, str) else json.dumps(cell)
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            found = None
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise UserError(
            f'{where}: {task.options[0]} {_short(cell)} is not a list of texts, such as ["a", "b"]; write one, or give a '
            "column for each option as task.options"
        )
    if not 2 <= len(found) <= MOST_OPTIONS:
        raise UserError(f"{where}: {task.options[0]} has {len(found)} option(s); an example needs 2 to {MOST_OPTIONS}")
    return found


def read_labels(
    table: Table, labels: Iterable[tuple[int, str]], options: Sequence[Sequence[str]], task: Task
) -> np.ndarray:
    """Return the index of the right option of each example, int64 (N,).

    Args:
        table: for messages.
        labels: line or row number and label of each example.
        options: C columns of N texts.

    Raises:
        UserError: a label names no option, or two; the message names the file and line.
    """
    index = {name: i for i, name in enumerate(classes_of(len(options), task))}
    found: list[int] = []
    for row, (number, label) in enumerate(labels):
        if task.label_is == "text":
            own = [column[row] for column in options]
            found.append(_place_of(label, own, table.at(number), task))
        elif (at := index.get(class_value(label))) is not None:
            found.append(at)
        else:
            said = (
                f"an index from 0 to {len(options) - 1}" if task.label_is == "index" else f"one of {', '.join(index)}"
            )
            remedy = (
                "; task.label_is says how labels name options: index, letter or text" if task.name == "custom" else ""
            )
            raise UserError(f"{table.at(number)}: {task.label} {_short(label)} is not {said}{remedy}")
    return np.asarray(found, np.int64)


def _place_of(label: str, options: Sequence[str], where: str, task: Task) -> int:
    places = [i for i, option in enumerate(options) if option.strip() == label]
    if len(places) == 1:
        return places[0]
    problem = "is none of the options" if not places else f"is the text of {len(places)} options"
    shown = ", ".join(map(_short, options))
    raise UserError(f"{where}: {task.label} {_short(label)} {problem}, {shown}; each label must be exactly one of them")


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
