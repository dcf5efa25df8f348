"""Read tables as rows: the values of named columns, with their line or row number.

Rows are streamed, so no file is held in memory, except a `.json` file with one list. Readers are strict: an invalid line
raises `UserError` with file and line number when it is reached, and is never repaired silently. Every format converts values
to text in the same way (`TableSpec.fields`).
"""

from __future__ import annotations

from pathlib import Path

from pkd_dist.data.delimited import read_delimited
from pkd_dist.data.json_rows import read_json
from pkd_dist.data.race import read_race
from pkd_dist.data.tables import Table, TableSpec, lines
from pkd_dist.data.typed import read_parquet

EXTENSIONS = ("tsv", "csv", "jsonl", "json", "parquet")
FILE_EXTENSIONS = (*EXTENSIONS, *(f"{name}.gz" for name in EXTENSIONS if name != "parquet"))
"""What the name of a table's file can end in."""


def is_table(path: Path) -> bool:
    """Return whether a file is a table by its name."""
    return path.name.endswith(tuple(f".{name}" for name in FILE_EXTENSIONS))


def read_file(path: Path, spec: TableSpec) -> Table:
    """Open a table of a format in `FILE_EXTENSIONS`, by the file's name; any other file as TSV, a folder as texts of RACE.

    Raises:
        UserError: invalid content, with file and line; mostly while the rows are iterated.
    """
    if path.is_dir():
        return read_race(path, spec)
    extension = path.name.removesuffix(".gz").rpartition(".")[2]
    if extension == "parquet":
        return read_parquet(path, spec)
    if extension in ("json", "jsonl"):
        return read_json(path, spec, extension == "json")
    return read_delimited(path, spec, comma=extension == "csv")


def read_lines(path: Path) -> Table:
    """Open a text file with one text per line. Blank lines are skipped. Iterating raises UserError if the file is empty or
    not UTF-8."""
    return Table(str(path), ((number, [line]) for number, line in lines(path)))
