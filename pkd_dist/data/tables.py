"""What all readers of tables share: rows, the columns to read, the conversion of a value to text, and decoded lines."""

from __future__ import annotations

import gzip
import json
import math
import reprlib
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import BinaryIO, cast

from pkd_dist.errors import UserError

_WHITESPACE = b"\xef\xbb\xbf \r\n\t"
_EXACT_INTEGERS = 2**53
_MAX_UNUSED = 50
_MAX_NUMBERS_IN_NOTE = 5
NUL_REMEDY = "save the file as UTF-8 if it is UTF-16, else remove it"

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
        notes: what a user should know about how the rows were read. Complete once all rows were read.
        unused: the columns that were not requested, at most 50. Complete once all rows were read.
    """

    name: str
    rows: Iterator[Row]
    unit: str = "line"
    notes: list[str] = field(default_factory=list)
    unused: dict[str, None] = field(default_factory=dict)
    others: dict[str, object] = field(default_factory=dict)
    """The columns of the latest row that were not requested, if `TableSpec.keep_others`."""

    def at(self, number: int) -> str:
        """Return the place of a row, for messages."""
        return place(self.name, number, self.unit)

    def require_unicode(self, number: int, column: str, value: str) -> None:
        """Raise UserError if a value of a row cannot be written as UTF-8, or holds a NUL."""
        if "\0" in value:
            raise UserError(f"{self.at(number)}: {column} contains a NUL character; {NUL_REMEDY}")
        if value.isascii():
            return
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{self.at(number)}: {column} contains an unpaired surrogate, which is not valid text; fix the escape"
            ) from None


def place(name: str, number: int, unit: str) -> str:
    """Return the place of a line or row of a table, for messages."""
    return f"{name}:{number}" if unit == "line" else f"{name}, row {number}"


class RowNumbers:
    """Counts rows and remembers the first few numbers, for notes."""

    def __init__(self, unit: str):
        self._unit = unit
        self._numbers: list[str] = []
        self.count = 0

    def add(self, number: int) -> None:
        self.count += 1
        if self.count <= _MAX_NUMBERS_IN_NOTE:
            self._numbers.append(str(number))

    @property
    def counted(self) -> str:
        return f"{self.count} {self._unit}{'s' if self.count > 1 else ''}"

    @property
    def first(self) -> str:
        return ", ".join(self._numbers) + (", ..." if self.count > len(self._numbers) else "")

    def __str__(self) -> str:
        return f"{self.counted}: {self.first}"


@dataclass(frozen=True)
class TableSpec:
    """The columns to read from a table.

    Attributes:
        columns: names, in the order in which values are returned.
        optional: those of them that may be missing.
        headerless: all columns of a TSV file that has no header line.
        allow_short: yield a line with too few fields as a row without values instead of raising an error.
        keep_others: fill `Table.others`.
        lists: those of the columns whose value may be a list of texts and numbers, which is returned as JSON.
    """

    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    headerless: tuple[str, ...] = ()
    allow_short: bool = False
    keep_others: bool = False
    lists: tuple[str, ...] = ()

    def missing(self, available: Collection[str]) -> str | None:
        """Return the first required column that is not available."""
        return next((name for name in self.columns if name not in available and name not in self.optional), None)

    def add_unused(self, available: Iterable[str], unused: dict[str, None]) -> None:
        """Add the columns that are not requested to `unused`."""
        for name in available:
            if name not in self.columns and len(unused) < _MAX_UNUSED:
                unused[name] = None

    def update_others(self, record: Mapping[str, object], others: dict[str, object]) -> None:
        """Replace the columns of the latest row that are not requested, if they are kept."""
        if self.keep_others:
            others.clear()
            others.update((name, value) for name, value in record.items() if name not in self.columns)

    def fields(self, record: Mapping[str, object], where: Callable[[], str]) -> Fields:
        """Return the values of the requested columns of a typed record as text. All typed formats use this conversion.

        Null and NaN are missing values. A number without a fraction becomes an integer, so that 1 and 1.0 are the same.

        Args:
            record: column -> value.
            where: returns the place of the record, for messages.

        Raises:
            UserError: a value is neither text nor a finite number.
        """
        values = map(record.get, self.columns)
        return [
            value
            if value is None or type(value) is str
            else _list_as_text(value, column, where)
            if column in self.lists and isinstance(value, list)
            else _as_text(value, column, where)
            for column, value in zip(self.columns, values, strict=True)
        ]


def _list_as_text(values: list[object], column: str, where: Callable[[], str]) -> str:
    texts = [value if value is None else _as_text(value, f"a value of {column}", where) for value in values]
    if None in texts:
        raise UserError(f"{where()}: a value of {column} is null or NaN; remove it from the list")
    return json.dumps(texts, ensure_ascii=False)


def _as_text(value: object, column: str, where: Callable[[], str]) -> str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, int):  # bool too
        return str(int(value))
    if isinstance(value, (float, Decimal)):
        if math.isnan(value):
            return None
        if math.isfinite(value):
            return f"{value + 0:.0f}" if value % 1 == 0 and -_EXACT_INTEGERS < value < _EXACT_INTEGERS else str(value)
    kind = "a list" if isinstance(value, list) else "an object" if isinstance(value, dict) else type(value).__name__
    raise UserError(
        f"{where()}: {column} must be text or a finite number, not {kind}: {reprlib.repr(value)}; convert the column"
    )


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else open(path, "rb")


def decoded(path: Path) -> Iterator[str]:
    """Yield each line of a file with its newline, without a byte-order mark. A name that ends in `.gz` is decompressed.

    Raises:
        UserError: the file is empty, not UTF-8, or not valid gzip.
    """
    try:
        with _open(path) as file:
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
                if "\0" in line:
                    raise UserError(f"{path}:{number}: contains a NUL character; {NUL_REMEDY}")
                yield line if number > 1 else line.removeprefix("\ufeff")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be decompressed as gzip: {error}; write the file again") from None


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line without its newline) of the lines that are not blank."""
    for number, line in enumerate(decoded(path), start=1):
        if not line.isspace() or "\t" in line:
            yield number, line.removesuffix("\n").removesuffix("\r")
