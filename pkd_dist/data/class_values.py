"""Values of a label column as classes: how a number is written, in which order classes are, and which class a label is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from pkd_dist.data.tasks import Task
from pkd_dist.errors import UserError

_WHOLE_NUMBER = re.compile(r"(-?(?:0|[1-9][0-9]*))\.0+")
_NUMBERED = re.compile(r"(.*[^\W\d]\W*)([0-9]{1,9})", re.DOTALL)


def class_value(value: str) -> str:
    """Return the class that a label is a value of: a number without a fraction is written as an integer, 1.0 as 1."""
    whole = _WHOLE_NUMBER.fullmatch(value)
    return (whole[1] if whole[1] != "-0" else "0") if whole else value


def sorted_classes(values: set[str]) -> list[str]:
    """Sort label values: by number if all are finite numbers or one prefix with a number (`LABEL_10`), else as text."""
    try:
        numbers = {value: float(value) for value in values}
    except ValueError:
        order = _numbered(values)
        return sorted(values, key=lambda value: (order[value], value)) if order else sorted(values)
    if not all(map(math.isfinite, numbers.values())):
        return sorted(values)
    return sorted(values, key=lambda value: (numbers[value], value))  # 1 and 01 are two classes, in a fixed order


def _numbered(values: set[str]) -> dict[str, int] | None:
    """Return the number of each value; None unless all are the same text with a number after it."""
    parts = {value: _NUMBERED.fullmatch(value) for value in values}
    found = {value: (part[1], int(part[2])) for value, part in parts.items() if part}
    if len(found) < len(values) or len({prefix for prefix, _ in found.values()}) != 1:
        return None
    return {value: number for value, (_, number) in found.items()}


class ClassIndex:
    """Finds the class of a label, which is the value of a class or its name.

    Args:
        known: the values of the classes, in class order.
        split: the one that the labels are from, for messages.
    """

    def __init__(self, known: Sequence[str], task: Task, split: str):
        self._known, self._task, self._split = known, task, split
        index = {value: i for values in (task.names_of(known), known) for i, value in enumerate(values)}
        self._index = {class_value(value): i for value, i in index.items()} | index

    def of(self, label: str, where: Callable[[], str]) -> int:
        """Return the index of a label's class.

        Args:
            where: returns the place of the label, for messages.

        Raises:
            UserError: it is no class.
        """
        found = self._index.get(label)
        if found is None and (found := self._index.get(class_value(label))) is None:
            allowed = ", ".join(self._known[:10]) + (", ..." if len(self._known) > 10 else "")
            own = "" if self._task.classes else " of the teacher" if self._split == "train" else " seen in training"
            remedy = "; task.class_names maps labels to its classes" if own == " of the teacher" else ""
            raise UserError(f"{where()}: {self._task.label} {label!r} is not one of the labels{own}: {allowed}{remedy}")
        return found
