"""Read JSON files: one object per line, or one list of objects; and the values that JSON can hold."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from pkd_dist.data.tables import Fields, Row, Table, TableSpec, decoded, lines, place
from pkd_dist.errors import UserError

_SPACE = re.compile(r"[ \t\r\n]*")


class _Repeated(dict[str, object]):
    """An object that has keys more than once."""

    def __init__(self, pairs: list[tuple[str, object]]):
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.names = {name for name in names if names.count(name) > 1}


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    return record if len(record) == len(pairs) else _Repeated(pairs)


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_ANY_DIGITS = json.JSONDecoder(object_pairs_hook=_object, parse_int=str)
"""Reads an integer as text. Python limits the digits of an int, JSON does not."""


def read_json(path: Path, spec: TableSpec, document: bool) -> Table:
    """Open a JSON file.

    Args:
        path: the file.
        spec: the columns to read.
        document: whether the file may hold one list of objects, which is then held in memory, instead of lines.
    """
    unused: dict[str, None] = {}
    others: dict[str, object] = {}

    def fields(record: object, where: str) -> Fields:
        values = _fields(record, spec, where)
        spec.add_unused(cast(dict[str, object], record), unused)
        spec.update_others(cast(dict[str, object], record), others)
        return values

    if document and next((line for line in decoded(path) if not line.isspace()), "").lstrip().startswith("["):
        return Table(str(path), _of_list(path, fields), "row", unused=unused, others=others)
    return Table(str(path), _of_lines(path, fields, document), unused=unused, others=others)


def _of_lines(path: Path, fields: Callable[[object, str], Fields], document: bool) -> Iterator[Row]:
    for number, line in lines(path):
        where = place(str(path), number, "line")
        try:
            record, end = _decode(line, _skip_space(line, 0), where)
            _require_end(line, end)
        except json.JSONDecodeError as error:
            if document and number == 1:
                raise UserError(f"{path}: must be a list of objects, or one object per line: {error.msg}") from None
            raise UserError(f"{where}: not valid JSON: {error.msg}") from None
        yield number, fields(record, where)


def _of_list(path: Path, fields: Callable[[object, str], Fields]) -> Iterator[Row]:
    text = "".join(decoded(path))
    number, at = 0, _skip_space(text, text.index("[") + 1)
    try:
        while number or text[at : at + 1] != "]":
            number += 1
            where = place(str(path), number, "row")
            record, at = _decode(text, at, where)
            yield number, fields(record, where)
            at = _skip_space(text, at)
            if text[at : at + 1] != ",":
                break
            at = _skip_space(text, at + 1)
        if text[at : at + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        _require_end(text, at + 1)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from None


def _decode(text: str, at: int, where: str) -> tuple[object, int]:
    """Return the value that begins at a position, and where it ends."""
    try:
        try:
            return _DECODER.raw_decode(text, at)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer with too many digits
            return _ANY_DIGITS.raw_decode(text, at)
    except RecursionError:
        raise UserError(f"{where}: the JSON is nested too deeply to be read; remove the nested field") from None


def _fields(record: object, spec: TableSpec, where: str) -> Fields:
    """Return the values of the requested columns."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be a JSON object with the keys {', '.join(spec.columns)}")
    if missing := spec.missing(record):
        raise UserError(f"{where}: has no column {missing!r}; its keys are {', '.join(map(repr, record))}")
    if isinstance(record, _Repeated):
        for name in record.names.intersection(spec.columns):
            raise UserError(f"{where}: has the key {name!r} twice; keep one")
    return spec.fields(record, lambda: where)


def _require_end(text: str, at: int) -> None:
    if (end := _skip_space(text, at)) < len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _skip_space(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at


def as_json(value: object) -> object:
    """Return a value as JSON can hold it: infinity and NaN as null, what JSON does not have as text."""
    if isinstance(value, dict):
        return {str(key): as_json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)
