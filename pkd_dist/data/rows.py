"""Read tables as rows: the values of named columns, with their line or row number.

Rows are streamed, so no file is held in memory. Readers are strict: an invalid line raises `UserError` with file and line
number when it is reached, and is never repaired silently.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pkd_dist.errors import UserError

if TYPE_CHECKING:
    from datasets import DatasetDict

EXTENSIONS = ("tsv", "csv", "jsonl", "parquet")
_WHITESPACE = b"\xef\xbb\xbf \r\n\t"
_PARQUET_BATCH_ROWS = 4096

Fields = list[str | None]
"""Values of the requested columns; None for a missing value."""

Row = tuple[int, Fields]
"""The number of a line or row, from 1, and its values."""


@dataclass(frozen=True)
class Table:
    """The rows of one file or of one split of a hub data set.

    Attributes:
        name: the file, or `hub:NAME/SPLIT`.
        rows: can be iterated once; raises UserError at an invalid row.
        unit: what the row numbers count: `line` or `row`.
    """

    name: str
    rows: Iterator[Row]
    unit: str = "line"

    def at(self, number: int) -> str:
        """Return the place of a row, for messages."""
        return f"{self.name}:{number}" if self.unit == "line" else f"{self.name}, row {number}"


@dataclass(frozen=True)
class TableSpec:
    """The columns to read from a table.

    Attributes:
        columns: names, in the order in which values are returned.
        optional: the one of them that may be missing.
        headerless: all columns of a TSV file that has no header line.
        allow_short: yield a line with too few fields as a row without values instead of raising an error.
    """

    columns: tuple[str, ...]
    optional: str | None = None
    headerless: tuple[str, ...] = ()
    allow_short: bool = False

    def missing(self, available: Collection[str]) -> str | None:
        """Return the first required column that is not available."""
        return next((name for name in self.columns if name not in available and name != self.optional), None)


def read_file(path: Path, spec: TableSpec) -> Table:
    """Open a table: `.csv`, `.jsonl`, `.parquet`, anything else as TSV.

    Raises:
        UserError: invalid content, with file and line; mostly while the rows are iterated.
    """
    if path.suffix == ".parquet":
        return _parquet(path, spec)
    return Table(str(path), (_jsonl if path.suffix == ".jsonl" else _delimited)(path, spec))


def read_lines(path: Path) -> Table:
    """Open a text file with one text per line. Blank lines are skipped. Iterating raises UserError if the file is empty or
    not UTF-8."""
    return Table(str(path), ((number, [line]) for number, line in _lines(path)))


def _decoded(path: Path) -> Iterator[str]:
    """Yield each line with its newline, without a byte-order mark."""
    with open(path, "rb") as file:
        if not any(line.strip(_WHITESPACE) for line in file):
            raise UserError(f"{path}: is empty; expected a header line and examples")
        file.seek(0)
        for number, raw in enumerate(file, start=1):
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}:{number}: byte 0x{raw[error.start]:02x} is not valid UTF-8; save the file as UTF-8"
                ) from None
            yield line if number > 1 else line.removeprefix("\ufeff")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_decoded(path), start=1):
        if not line.isspace() or "\t" in line:
            yield number, line.removesuffix("\n").removesuffix("\r")


def _csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line, fields) of each record. A quoted field may contain commas, quotes and newlines (RFC 4180)."""
    csv.field_size_limit(1 << 30)
    lines = itertools.chain.from_iterable(
        io.StringIO(line, newline="") for line in _decoded(path)
    )  # a CR ends a line too
    reader = csv.reader(lines, strict=True)
    start = 1
    try:
        for fields in reader:
            line, start = start, reader.line_num + 1
            if len(fields) > 1 or any(field.strip() for field in fields):
                yield line, fields
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def header_of(path: Path, spec: TableSpec) -> Sequence[str]:
    """Return the names of all columns of a CSV or TSV file.

    Raises:
        UserError: as `read_file`.
    """
    first = next(_records(path), None)
    return () if first is None else _header(path, [name.strip() for name in first[1]], spec)[0]


def _records(path: Path) -> Iterator[tuple[int, list[str]]]:
    return _csv(path) if path.suffix == ".csv" else ((number, line.split("\t")) for number, line in _lines(path))


def _delimited(path: Path, spec: TableSpec) -> Iterator[Row]:
    """Yield the rows of a CSV file, or of a TSV file as GLUE ships it: unquoted, so a quote is an ordinary character."""
    records = _records(path)
    first = next(records, None)
    if first is None:
        return
    header, has_header = _header(path, [name.strip() for name in first[1]], spec)
    indices = [header.index(name) if name in header else None for name in spec.columns]
    for line, fields in records if has_header else itertools.chain([first], records):
        if len(fields) == len(header):
            yield line, [None if i is None else fields[i] for i in indices]
        elif len(fields) < len(header) and spec.allow_short:
            yield line, [None] * len(indices)
        else:
            raise UserError(
                f"{path}:{line}: has {len(fields)} field(s) where the header names {len(header)}: {', '.join(header)}"
            )


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


def _jsonl(path: Path, spec: TableSpec) -> Iterator[Row]:
    for number, line in _lines(path):
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON: {error.msg}") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: must be a JSON object with the keys {', '.join(spec.columns)}")
        if missing := spec.missing(record):
            raise UserError(f"{where}: has no column {missing!r}; its keys are {', '.join(map(repr, record))}")
        for name in spec.columns:
            if isinstance(record.get(name), (list, dict)):
                raise UserError(f"{where}: {name} must be text or a number, not {json.dumps(record[name])[:40]}")
        yield number, [_as_text(record.get(name)) for name in spec.columns]


def _parquet(path: Path, spec: TableSpec) -> Table:
    from datasets import Features
    from pyarrow.parquet import ParquetFile

    def unreadable(error: Exception) -> UserError:
        return UserError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}")

    try:
        table = ParquetFile(path, memory_map=True)
        features = Features.from_arrow_schema(table.schema_arrow)
    except Exception as error:  # pyarrow and datasets raise many types
        raise unreadable(error) from None
    duplicate = next((name for name in spec.columns if table.schema_arrow.names.count(name) > 1), None)
    if duplicate:
        raise UserError(f"{path}: has two columns {duplicate!r}; keep one")

    def records(columns: list[str]) -> Iterator[dict[str, object]]:
        try:
            for batch in table.iter_batches(_PARQUET_BATCH_ROWS, columns=columns):
                yield from batch.to_pylist()
        except Exception as error:
            raise unreadable(error) from None

    return _typed(str(path), features, records, spec)


def load_hub(name: str) -> DatasetDict:
    """Return the splits of a hub data set, or of a local folder in its layout.

    Args:
        name: `NAME` or `NAME:CONFIGURATION`.

    Raises:
        UserError: no network, no such data set or configuration.
    """
    from datasets import load_dataset

    try:
        return load_dataset(*name.split(":"))
    except Exception as error:  # of many types
        raise UserError(
            f"hub:{name} cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}",
            "task.data",
        ) from None


def read_hub(name: str, splits: Sequence[str], spec: TableSpec) -> Table:
    """Open the first of `splits` that a hub data set has.

    Raises:
        UserError: the data set has none of them, or a column is missing.
    """
    tables = load_hub(name)
    for split in splits:
        if split in tables:
            return _typed(f"hub:{name}/{split}", tables[split].features, tables[split].select_columns, spec)
    raise UserError(f"hub:{name} has no split {splits[0]!r}; it has {', '.join(tables)}", "task.data")


def _typed(
    name: str,
    features: Mapping[str, object],
    select: Callable[[list[str]], Iterable[Mapping[str, object]]],
    spec: TableSpec,
) -> Table:
    """Return a table whose columns have types.

    Args:
        name: of the table, for messages.
        features: column -> its `datasets` feature.
        select: column names -> one mapping per row.
        spec: columns to read.
    """
    if missing := spec.missing(features):
        raise UserError(f"{name}: has no column {missing!r}; it has {', '.join(map(repr, features))}")
    class_names = [getattr(features.get(column), "names", None) for column in spec.columns]

    def rows() -> Iterator[Row]:
        present = [column for column in spec.columns if column in features]
        for number, record in enumerate(select(present), start=1):
            fields: Fields = []
            for column, names in zip(spec.columns, class_names, strict=True):
                value = record.get(column)
                if names and isinstance(value, int):
                    value = names[value] if value >= 0 else None
                fields.append(_as_text(value))
            yield number, fields

    return Table(name, rows(), "row")


def _as_text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(int(value)) if isinstance(value, (bool, int)) else str(value)
