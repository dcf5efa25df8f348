"""Files and hub data sets -> rows: the values of named columns, by line or row number.

Each reader is strict: a wrong line is refused by file and line number, never repaired in silence.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pkd_dist.errors import UserError

EXTENSIONS = ("tsv", "csv", "jsonl", "parquet")


@dataclass(frozen=True)
class Rows:
    """What stands in one file, or in one split of a hub data set.

    Attributes:
        name: the file, or `hub:NAME/SPLIT`.
        unit: what its examples are counted in: `line` or `row`.
        rows: (number, values of the wanted columns) of each; None for a value that is not there.
        short: numbers of the lines that were left out because they have too few fields.
    """

    name: str
    unit: str = "line"
    rows: list[tuple[int, list[Any]]] = field(default_factory=list)
    short: list[int] = field(default_factory=list)

    def at(self, number: int) -> str:
        """Where a row stands, for messages."""
        return f"{self.name}:{number}" if self.unit == "line" else f"{self.name}, row {number}"


@dataclass(frozen=True)
class Wanted:
    """What to read.

    Attributes:
        columns: in the order in which their values are returned.
        optional: the column that may be absent.
        headerless: all columns of a TSV whose first line does not name those wanted.
        leave_out_short: lines with too few fields are left out and counted; else they are refused.
    """

    columns: tuple[str, ...]
    optional: str | None = None
    headerless: tuple[str, ...] = ()
    leave_out_short: bool = False

    def missing(self, have: Sequence[str]) -> str | None:
        """The first column that should be there and is not."""
        return next((name for name in self.columns if name not in have and name != self.optional), None)


def read_file(path: Path, wanted: Wanted) -> Rows:
    """Reads a table: `.csv`, `.jsonl`, `.parquet`, anything else as TSV.

    Raises:
        UserError: whatever is wrong, with file and line.
    """
    if path.suffix == ".parquet":
        return _parquet(path, wanted)
    return _jsonl(path, wanted) if path.suffix == ".jsonl" else _table(path, wanted)


def read_lines(path: Path) -> Rows:
    """A text file, one text a line; blank lines count for nothing.

    Raises:
        UserError: empty, or not UTF-8.
    """
    return Rows(str(path), rows=[(number, [line]) for number, line in _lines(path)])


def _decode(path: Path) -> str:
    raw = path.read_bytes()
    if not raw.strip(b"\xef\xbb\xbf \r\n\t"):
        raise UserError(f"{path}: is empty; expected a header line and examples")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} is not valid UTF-8; save the file as UTF-8"
        ) from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if line.strip() or "\t" in line:
            yield number, line.removesuffix("\r")


def _csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """CSV as RFC 4180 has it: a quoted field may hold commas, quotation marks and newlines."""
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(_decode(path), newline=""), strict=True)
    start = 1
    try:
        for fields in reader:
            line, start = start, reader.line_num + 1
            if len(fields) > 1 or any(field.strip() for field in fields):
                yield line, fields
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _table(path: Path, wanted: Wanted) -> Rows:
    """CSV, or TSV as GLUE ships it: unquoted, so that a quotation mark is an ordinary character."""
    out = Rows(str(path))
    header: Sequence[str] = ()
    places: list[int | None] = []
    for line, fields in _csv(path) if path.suffix == ".csv" else ((n, text.split("\t")) for n, text in _lines(path)):
        if not header:
            header = [name.strip() for name in fields]
            missing = wanted.missing(header)
            headerless = missing is not None and len(fields) == len(wanted.headerless)
            if missing and not headerless:
                raise UserError(f"{path}:1: has no column {missing!r}; the header names {', '.join(map(repr, header))}")
            twice = next((name for name in wanted.columns if header.count(name) > 1), None)
            if twice and not headerless:
                raise UserError(f"{path}:1: the header names {twice!r} twice; keep one")
            header = wanted.headerless if headerless else header
            places = [header.index(name) if name in header else None for name in wanted.columns]
            if not headerless:
                continue
        if len(fields) == len(header):
            out.rows.append((line, [None if i is None else fields[i] for i in places]))
        elif len(fields) < len(header) and wanted.leave_out_short:
            out.short.append(line)
        else:
            raise UserError(
                f"{path}:{line}: has {len(fields)} field(s) where the header names {len(header)}: {', '.join(header)}"
            )
    return out


def _jsonl(path: Path, wanted: Wanted) -> Rows:
    out = Rows(str(path))
    for number, line in _lines(path):
        where = out.at(number)
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON: {error.msg}") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: must be a JSON object with the keys {', '.join(wanted.columns)}")
        if missing := wanted.missing(list(record)):
            raise UserError(f"{where}: has no column {missing!r}; its keys are {', '.join(map(repr, record))}")
        for name in wanted.columns:
            if isinstance(record.get(name), (list, dict)):
                raise UserError(f"{where}: {name} must be text or a number, not {json.dumps(record[name])[:40]}")
        out.rows.append((number, [_as_text(record.get(name)) for name in wanted.columns]))
    return out


def _parquet(path: Path, wanted: Wanted) -> Rows:
    from datasets import Dataset

    try:
        table = Dataset.from_parquet(str(path), keep_in_memory=True)
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise UserError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    return _dataset(table, str(path), wanted)


def load_hub(name: str) -> Any:
    """The splits of a data set of the hub, or of a local folder in its layout.

    Args:
        name: `NAME` or `NAME:CONFIGURATION`.

    Raises:
        UserError: no network, no such data set, no such configuration.
    """
    from datasets import load_dataset

    try:
        return load_dataset(*name.split(":"))
    except Exception as error:  # of many kinds
        raise UserError(
            f"task.data: hub:{name} cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from None


def read_hub(name: str, splits: Sequence[str], wanted: Wanted) -> Rows:
    """Reads the first of `splits` that a data set of the hub has.

    Raises:
        UserError: it has none of them, or not the columns.
    """
    tables = load_hub(name)
    for split in splits:
        if split in tables:
            return _dataset(tables[split], f"hub:{name}/{split}", wanted)
    raise UserError(f"task.data: hub:{name} has no split {splits[0]!r}; it has {', '.join(tables)}")


def _dataset(table: Any, name: str, wanted: Wanted) -> Rows:
    if missing := wanted.missing(table.column_names):
        raise UserError(f"{name}: has no column {missing!r}; it has {', '.join(map(repr, table.column_names))}")
    out = Rows(name, "row")
    there = [column for column in wanted.columns if column in table.column_names]
    names = [getattr(table.features.get(column), "names", None) for column in wanted.columns]
    for number, record in enumerate(table.select_columns(there), start=1):
        values = [record.get(column) for column in wanted.columns]
        for i, own in enumerate(names):
            if own and isinstance(values[i], int):
                values[i] = own[values[i]] if values[i] >= 0 else None
        out.rows.append((number, [_as_text(value) for value in values]))
    return out


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(int(value)) if isinstance(value, (bool, int)) else str(value)
