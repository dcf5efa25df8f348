"""Files -> examples with stable ids.

A split is `FOLDER/SPLIT.{tsv,csv,jsonl,parquet}` or a split of a hub data set. Each reader yields (line, fields) strictly:
a wrong line is refused by file and line number, never repaired in silence. An example's id is a 64-bit hash of its text
columns and of how often that text stood in the split before, so it survives reordering and does not depend on position.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pkd_dist.config import project_path
from pkd_dist.data.tasks import Task
from pkd_dist.errors import UserError

EXTENSIONS = ("tsv", "csv", "jsonl", "parquet")
SPLITS = ("train", "dev", "test")
HUB_SPLITS = {"train": ("train",), "dev": ("validation", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Split:
    """One split as text.

    Attributes:
        ids_N: int64, unique.
        texts: one or two lists of N strings.
        labels_N: int64 class indices, or float32 values of a regression.
        classes: values of the label column in class order; empty for a regression.
        source: where it was read from.
    """

    ids_N: np.ndarray
    texts: tuple[list[str], ...]
    labels_N: np.ndarray
    classes: tuple[str, ...]
    source: str

    def __len__(self) -> int:
        return len(self.ids_N)


def find(data: str, split: str) -> Path | str | None:
    """The file (or `hub:NAME`) of a split; None where the folder has none.

    Raises:
        UserError: no such folder, or two files of one split.
    """
    if data.startswith("hub:"):
        return data
    folder = project_path(data)
    if not folder.is_dir():
        raise UserError(f"task.data: no such folder: {data}; it must hold train and dev as {', '.join(EXTENSIONS)}")
    found = [folder / f"{split}.{extension}" for extension in EXTENSIONS if (folder / f"{split}.{extension}").is_file()]
    if len(found) > 1:
        raise UserError(f"task.data: {found[0]} and {found[1].name} both hold the split {split}; keep one")
    return found[0] if found else None


def read(data: str, split: str, task: Task, classes: Sequence[str] | None = None) -> Split:
    """Reads one split.

    Args:
        data: `task.data`.
        split: train, dev or test.
        task: its columns.
        classes: label values in class order; None: the task's, else those of this split, sorted.

    Raises:
        UserError: whatever is wrong, with file and line.
    """
    source = find(data, split)
    if source is None:
        raise UserError(
            f"task.data: {data} has no split {split!r}; expected one of {', '.join(f'{split}.{e}' for e in EXTENSIONS)}"
        )
    rows = list(_rows(source, split, task))
    if not rows:
        raise UserError(f"{source}: has no examples; at least one is needed")
    for where, fields in rows:
        for column, value in zip((*task.text, task.label), fields, strict=True):
            if value is None or not value.strip():
                raise UserError(f"{where}: {column} is empty; give it a value or remove the line")
            if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise UserError(f"{where}: {column} holds half of a surrogate pair, which is not text; mend the escape")
    texts = tuple([fields[i] for _, fields in rows] for i in range(len(task.text)))
    labels = [(where, fields[-1].strip()) for where, fields in rows]
    if task.regression:
        return Split(_ids(texts), texts, _numbers(labels, task.label), (), str(source))
    known = tuple(classes or task.classes or _sorted_classes({value for _, value in labels}))
    index = {value: i for i, value in enumerate(known)}
    for where, value in labels:
        if value not in index:
            allowed = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
            seen = "" if task.classes else " of the teacher" if split == "train" else " seen in training"
            raise UserError(f"{where}: {task.label} {value!r} is not one of the labels{seen}: {allowed}")
    if split == "train" and len({value for _, value in labels}) < 2:
        raise UserError(f"{source}: every example has the label {labels[0][1]!r}; training needs at least two classes")
    return Split(
        _ids(texts), texts, np.array([index[value] for _, value in labels], dtype=np.int64), known, str(source)
    )


def _sorted_classes(values: set[str]) -> list[str]:
    """Numbers in numeric order, else alphabetical."""
    try:
        return sorted(values, key=float)
    except ValueError:
        return sorted(values)


def _numbers(labels: list[tuple[str, str]], column: str) -> np.ndarray:
    out = np.empty(len(labels), dtype=np.float32)
    for i, (where, value) in enumerate(labels):
        try:
            out[i] = float(value)
        except ValueError:
            out[i] = np.nan
        if not np.isfinite(out[i]):
            raise UserError(f"{where}: {column} {value!r} is not a number; a regression needs one")
    return out


def _ids(texts: tuple[list[str], ...]) -> np.ndarray:
    seen: dict[bytes, int] = {}
    out = np.empty(len(texts[0]), dtype=np.int64)
    for i, fields in enumerate(zip(*texts, strict=True)):
        content = "\x1f".join(fields).encode()
        repeat = seen[content] = seen.get(content, -1) + 1
        digest = hashlib.blake2b(content + repeat.to_bytes(8, "little"), digest_size=8).digest()
        out[i] = int.from_bytes(digest, "little", signed=True)
    if len(np.unique(out)) < len(out):
        raise UserError("two different texts have the same 64-bit id; change one of them by a space")
    return out


# ---------------------------------------------------------------------------------------------------------- readers


def _rows(source: Path | str, split: str, task: Task) -> Iterator[tuple[str, list[Any]]]:
    """(where, [text columns..., label]) of each example; `where` is `file:line`."""
    columns = (*task.text, task.label)
    if isinstance(source, str):
        yield from _hub(source.removeprefix("hub:"), split, columns)
    elif source.suffix == ".parquet":
        yield from _parquet(source, columns)
    elif source.suffix == ".jsonl":
        yield from _jsonl(source, columns)
    else:
        yield from _table(source, columns, quoted=source.suffix == ".csv")


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


def _table(path: Path, columns: tuple[str, ...], quoted: bool) -> Iterator[tuple[str, list[Any]]]:
    """TSV as GLUE ships it (unquoted: a quotation mark is an ordinary character), or CSV (RFC 4180)."""
    text = _decode(path)
    if quoted:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    else:
        reader = csv.reader(
            io.StringIO(text.replace("\r\n", "\n"), newline="\n"), delimiter="\t", quoting=csv.QUOTE_NONE
        )
    csv.field_size_limit(1 << 30)
    header: list[str] | None = None
    places: list[int] = []
    start = 1
    try:
        for fields in reader:
            line, start = start, reader.line_num + 1
            if header is None:
                header = [name.strip() for name in fields]
                places = [_column(path, header, name) for name in columns]
            elif len(fields) == len(header):
                yield f"{path}:{line}", [fields[i] for i in places]
            elif any(field.strip() for field in fields) or len(fields) > 1:
                raise UserError(
                    f"{path}:{line}: has {len(fields)} field(s) where the header names {len(header)}: {', '.join(header)}"
                )
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _column(path: Path, header: list[str], name: str) -> int:
    if name not in header:
        raise UserError(f"{path}:1: has no column {name!r}; the header names {', '.join(map(repr, header))}")
    return header.index(name)


def _jsonl(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, list[Any]]]:
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not valid JSON: {error.msg}") from None
        if not isinstance(record, dict):
            raise UserError(f"{where}: must be a JSON object with the keys {', '.join(columns)}")
        missing = [name for name in columns if name not in record]
        if missing:
            raise UserError(f"{where}: has no column {missing[0]!r}; its keys are {', '.join(map(repr, record))}")
        for name in columns:
            if isinstance(record[name], (list, dict)):
                raise UserError(f"{where}: {name} must be text or a number, not {json.dumps(record[name])[:40]}")
        yield where, [_as_text(record[name]) for name in columns]


def _parquet(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, list[Any]]]:
    from datasets import Dataset

    try:
        table = Dataset.from_parquet(str(path), keep_in_memory=True)
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise UserError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    yield from _dataset_rows(table, str(path), columns)


def _hub(name: str, split: str, columns: tuple[str, ...]) -> Iterator[tuple[str, list[Any]]]:
    from datasets import load_dataset

    try:
        table = load_dataset(*name.split(":"))
    except Exception as error:  # no network, no such data set, no such configuration
        raise UserError(f"task.data: hub:{name} cannot be loaded: {str(error).splitlines()[0]}") from None
    for candidate in HUB_SPLITS[split]:
        if candidate in table:
            yield from _dataset_rows(table[candidate], f"hub:{name}/{candidate}", columns)
            return
    raise UserError(f"task.data: hub:{name} has no split {split!r}; it has {', '.join(table)}")


def _dataset_rows(table: Any, where: str, columns: tuple[str, ...]) -> Iterator[tuple[str, list[Any]]]:
    for name in columns:
        if name not in table.column_names:
            raise UserError(f"{where}: has no column {name!r}; it has {', '.join(map(repr, table.column_names))}")
    names = getattr(table.features.get(columns[-1]), "names", None)
    for number, record in enumerate(table.select_columns(list(columns)), start=1):
        values = [_as_text(record[name]) for name in columns]
        if names and isinstance(record[columns[-1]], int) and record[columns[-1]] >= 0:
            values[-1] = names[record[columns[-1]]]
        yield f"{where}, row {number}", values


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(int(value)) if isinstance(value, (bool, int)) else str(value)
