"""Values of a label column as classes: how a number is written, and in which order classes are."""

from __future__ import annotations

import math
import re

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
