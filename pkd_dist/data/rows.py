"""Files and hub data sets -> rows: the values of named columns, by line or row number.

Rows are read one after the other, so that no file is in memory. Each reader is strict: a wrong line is refused by file and
line number when its turn comes, never repaired in silence.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pkd_dist.errors import UserError

EXTENSIONS = ("tsv", "csv", "jsonl", "parquet")
_BLANK = b"\xef\xbb\xbf \r\n\t"
_PARQUET_BATCH = 4096

Row = tuple[int, list[Any]]
"""The number of a line or row, and the values of the wanted columns; None for a value that is not there."""


@dataclass(frozen=True)
class Rows:
    """What stands in one file, or in one split of a hub data set.

    Attributes:
        name: the file, or `hub:NAME/SPLIT`.
        rows: read as they are iterated, once; what is wrong with one raises UserError there.
        unit: what its examples are counted in: `line` or `row`.
    """

    name: str
    rows: Iterator[Row]
    unit: str = "line"

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
        allow_short: a line with too few fields is a row without values; else it is refused.
    """

    columns: tuple[str, ...]
    optional: str | None = None
    headerless: tuple[str, ...] = ()
    allow_short: bool = False

    def missing(self, have: Sequence[str]) -> str | None:
        """The first column that should be there and is not."""
        return next((name for name in self.columns if name not in have and name != self.optional), None)


def read_file(path: Path, wanted: Wanted) -> Rows:
    """Reads a table: `.csv`, `.jsonl`, `.parquet`, anything else as TSV.

    Raises:
        UserError: whatever is wrong, with file and line; most of it once the rows are iterated.
    """
    if path.suffix == ".parquet":
        return _parquet(path, wanted)
    return Rows(str(path), (_jsonl if path.suffix == ".jsonl" else _table)(path, wanted))


def read_lines(path: Path) -> Rows:
    """A text file, one text a line; blank lines count for nothing. Iterated, raises UserError: empty, or not UTF-8."""
    return Rows(str(path), ((number, [line]) for number, line in _lines(path)))


def _decoded(path: Path) -> Iterator[str]:
    """What stands between two newlines, with the newline."""
    with open(path, "rb") as file:
        if not any(line.strip(_BLANK) for line in file):
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
    """CSV as RFC 4180 has it: a quoted field may hold commas, quotation marks and newlines."""
    csv.field_size_limit(1 << 30)
    lines = itertools.chain.from_iterable(io.StringIO(line, newline="") for line in _decoded(path))  # CR ends one, too
    reader = csv.reader(lines, strict=True)
    start = 1
    try:
        for fields in reader:
            line, start = start, reader.line_num + 1
            if len(fields) > 1 or any(field.strip() for field in fields):
                yield line, fields
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _table(path: Path, wanted: Wanted) -> Iterator[Row]:
    """CSV, or TSV as GLUE ships it: unquoted, so that a quotation mark is an ordinary character."""
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
            yield line, [None if i is None else fields[i] for i in places]
        elif len(fields) < len(header) and wanted.allow_short:
            yield line, [None] * len(places)
        else:
            raise UserError(
                f"{path}:{line}: has {len(fields)} field(s) where the header names {len(header)}: {', '.join(header)}"
            )


def _jsonl(path: Path, wanted: Wanted) -> Iterator[Row]:
    for number, line in _lines(path):
        where = f"{path}:{number}"
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
        yield number, [_as_text(record.get(name)) for name in wanted.columns]


def _parquet(path: Path, wanted: Wanted) -> Rows:
    from datasets import Features
    from pyarrow.parquet import ParquetFile

    def refusal(error: Exception) -> UserError:
        return UserError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}")

    try:
        table = ParquetFile(path, memory_map=True)
        features = Features.from_arrow_schema(table.schema_arrow)
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise refusal(error) from None
    twice = next((name for name in wanted.columns if table.schema_arrow.names.count(name) > 1), None)
    if twice:
        raise UserError(f"{path}: has two columns {twice!r}; keep one")

    def records(columns: list[str]) -> Iterator[dict[str, Any]]:
        try:
            for batch in table.iter_batches(_PARQUET_BATCH, columns=columns):
                yield from batch.to_pylist()
        except Exception as error:
            raise refusal(error) from None

    return _records(str(path), features, records, wanted)


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
            f"hub:{name} cannot be loaded: {(str(error).splitlines() or [type(error).__name__])[0]}",
            "task.data",
        ) from None


def read_hub(name: str, splits: Sequence[str], wanted: Wanted) -> Rows:
    """Reads the first of `splits` that a data set of the hub has.

    Raises:
        UserError: it has none of them, or not the columns.
    """
    tables = load_hub(name)
    for split in splits:
        if split in tables:
            return _records(f"hub:{name}/{split}", tables[split].features, tables[split].select_columns, wanted)
    raise UserError(f"hub:{name} has no split {splits[0]!r}; it has {', '.join(tables)}", "task.data")


def _records(
    name: str,
    features: Mapping[str, Any],
    select: Callable[[list[str]], Iterable[Mapping[str, Any]]],
    wanted: Wanted,
) -> Rows:
    """Rows of a table whose columns have types.

    Args:
        features: of each column, as `datasets` has them.
        select: names of columns -> a dictionary a row.
    """
    if missing := wanted.missing(list(features)):
        raise UserError(f"{name}: has no column {missing!r}; it has {', '.join(map(repr, features))}")
    names = [getattr(features.get(column), "names", None) for column in wanted.columns]

    def rows() -> Iterator[Row]:
        there = [column for column in wanted.columns if column in features]
        for number, record in enumerate(select(there), start=1):
            values: list[Any] = [record.get(column) for column in wanted.columns]
            for i, own in enumerate(names):
                if own and isinstance(values[i], int):
                    values[i] = own[values[i]] if values[i] >= 0 else None
            yield number, [_as_text(value) for value in values]

    return Rows(name, rows(), "row")


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(int(value)) if isinstance(value, (bool, int)) else str(value)
