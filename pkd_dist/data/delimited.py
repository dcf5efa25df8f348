"""Read CSV and TSV files.

A TSV file is read as GLUE ships it: unquoted, so that a quote is an ordinary character. If every field with a quote is
quoted as in CSV (RFC 4180), which is how pandas and spreadsheets write it, the fields are unquoted. `_quoting` decides this
for the whole file, and a note tells the user.
"""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pkd_dist.data.tables import Row, Table, TableSpec, decoded, lines
from pkd_dist.errors import UserError

_FIELD = r'(?:"[^"]*(?:""[^"]*)*"|[^"\t\r\n]*)'
_FIELDS = re.compile(rf"(?:^|\t)({_FIELD})")
_RECORD = re.compile(rf"{_FIELD}(?:\t{_FIELD})*\r?\n?")
_NEEDS_QUOTES = re.compile(r'(?:^|\t)"[^"]*(?:""|[\t\r\n])')
"""A quoted field that holds what has to be quoted: a doubled quote, a tab or a newline."""
_MAX_QUOTED_RECORD = 1 << 20
"""Characters. A lone quote does not make the rest of a file one record."""


def read_delimited(path: Path, spec: TableSpec, comma: bool) -> Table:
    """Open a CSV file (`comma`) or a TSV file."""
    notes: list[str] = []
    unused: dict[str, None] = {}
    others: dict[str, object] = {}
    rows = _rows(path, spec, comma, notes, unused, others)
    return Table(str(path), rows, notes=notes, unused=unused, others=others)


def _rows(
    path: Path, spec: TableSpec, comma: bool, notes: list[str], unused: dict[str, None], others: dict[str, object]
) -> Iterator[Row]:
    if comma:
        records = _csv(path, ",")
    else:
        quoting = _quoting(path, spec)
        notes += [quoting.note] if quoting.note else []
        unquoted = ((number, line.split("\t")) for number, line in lines(path))
        records = _csv(path, "\t") if quoting.quoted else unquoted
    first = next(records, None)
    if first is None:
        return
    header, has_header = _header(path, [name.strip() for name in first[1]], spec)
    spec.add_unused(header, unused)
    indices = [header.index(name) if name in header else None for name in spec.columns]
    for line, fields in records if has_header else itertools.chain([first], records):
        if len(fields) == len(header):
            spec.update_others(dict(zip(header, fields, strict=True)), others)
            yield line, [None if i is None else fields[i] for i in indices]
        elif len(fields) < len(header) and spec.allow_short:
            yield line, [None] * len(indices)
        else:
            raise UserError(
                f"{path}:{line}: has {len(fields)} field(s) where the header names {len(header)}: {', '.join(header)}"
            )


def _csv(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, fields) of each record. A quoted field may contain delimiters, quotes and newlines."""
    csv.field_size_limit(1 << 30)
    ended = itertools.chain.from_iterable(io.StringIO(line, newline="") for line in decoded(path))  # by a CR too
    reader = csv.reader(ended, strict=True, delimiter=delimiter)
    start = 1
    try:
        for fields in reader:
            line, start = start, reader.line_num + 1
            if len(fields) > 1 or any(field.strip() for field in fields):
                yield line, fields
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _header(path: Path, names: list[str], spec: TableSpec) -> tuple[Sequence[str], bool]:
    """Return the column names of a file, and whether its first line holds them."""
    missing = spec.missing(names)
    if missing and len(names) == len(spec.headerless):
        return spec.headerless, False
    if missing:
        raise UserError(f"{path}:1: has no column {missing!r}; the header names {', '.join(map(repr, names))}")
    duplicate = next((name for name in spec.columns if names.count(name) > 1), None)
    if duplicate:
        raise UserError(f"{path}:1: the header names {duplicate!r} twice; keep one")
    return names, True


def is_quoted(path: Path) -> bool:
    """Return whether a TSV file is quoted as in CSV."""
    return _quoting(path, None).quoted


@dataclass(frozen=True)
class _Quoting:
    """Whether the fields of a TSV file are quoted, and a note about it."""

    quoted: bool
    note: str | None = None


def _quoting(path: Path, spec: TableSpec | None) -> _Quoting:
    """Tell whether a TSV file is quoted as in CSV.

    It is if every field with a quote is well quoted, and there is evidence that the quotes are not text: a field that has
    to be quoted, a quoted header, or a column that is quoted in each of several lines. Two lone quotes look like a field with
    newlines in it, but the lines have the right number of fields without it.
    """
    proven = False
    always: set[int] | None = None  # columns that are quoted in each line after the header
    count = width = 0  # records so far, and fields of the first
    for first, lines_of_record in _records(path):
        record = "".join(lines_of_record)
        fields = _FIELDS.findall(record) if '"' in record or not count or always else []
        width = width or len(fields)
        if '"' in record:
            fits_unquoted = len(lines_of_record) > 1 and all(line.count("\t") + 1 == width for line in lines_of_record)
            if not _RECORD.fullmatch(record) or len(fields) != width or fits_unquoted:
                note = (
                    f"quotes are read as text, because not every field with a quote is quoted as in CSV: line {first}"
                )
                return _Quoting(False, note if proven else None)
            proven = proven or bool(_NEEDS_QUOTES.search(record)) or (not count and _is_header(record, spec))
        if count and always != set():
            quoted = {i for i, text in enumerate(fields) if text.startswith('"')}
            always = quoted if always is None else always & quoted
        count += 1
    proven = proven or (bool(always) and count > 2)
    return _Quoting(proven, "fields are quoted as in CSV; the quotes were removed" if proven else None)


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, its lines) of each record of a quoted file: it ends with the line that closes all its quotes."""
    record: list[str] = []
    size, is_open = 0, False
    for number, line in enumerate(decoded(path), start=1):
        record.append(line)
        size += len(line)
        is_open ^= bool(line.count('"') % 2)
        if is_open and size <= _MAX_QUOTED_RECORD:
            continue
        if not line.isspace() or len(record) > 1:
            yield number - len(record) + 1, record
        record, size = [], 0
    if record:
        yield number - len(record) + 1, record


def _is_header(record: str, spec: TableSpec | None) -> bool:
    """Return whether a first line with quotes holds the requested column names."""
    return spec is not None and not spec.missing([name.strip('" \r\n') for name in record.split("\t")])
