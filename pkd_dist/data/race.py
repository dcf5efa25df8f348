"""Read the texts of RACE as published: one JSON object a file, with an `article` and several questions about it.

    {"article": "...", "questions": ["...", ...], "options": [["...", "...", "...", "..."], ...], "answers": ["A", ...], "id": "..."}

Each question is a row with the columns `article`, `question`, `options` (a JSON list) and `answer`.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pkd_dist.data.tables import Row, Table, TableSpec
from pkd_dist.errors import UserError

PATTERN = "*.txt"
_OPTIONAL = "answers"
"""The key that may be null: a test split may have no answers."""
_LISTS = {"question": "questions", "options": "options", "answer": "answers"}
"""Column -> the key of its list in a file, which has an entry for each question."""


@dataclass(frozen=True)
class RaceTable(Table):
    """The questions of all texts of a split, numbered from 1 through all files.

    Attributes:
        starts: the number of the first question of each file so far.
        files: these files.
    """

    starts: list[int] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def at(self, number: int) -> str:
        """Return the place of a question, for messages: its file, and its number there from 1."""
        file = bisect.bisect_right(self.starts, number) - 1
        return _place(self.files[file], number - self.starts[file] + 1)


def read_race(folder: Path, spec: TableSpec) -> Table:
    """Open the texts of a split: all `.txt` files in its subfolders, such as `middle` and `high`, in the order of their numbers.

    Raises:
        UserError: while the rows are iterated: a file is not of this form; the message names it and the question.
    """
    starts: list[int] = []
    files: list[Path] = []
    return RaceTable(str(folder), _rows(folder, spec, starts, files), "question", starts=starts, files=files)


def _rows(folder: Path, spec: TableSpec, starts: list[int], files: list[Path]) -> Iterator[Row]:
    number = 1
    for path in sorted(files_of(folder), key=lambda path: (path.parent, len(path.name), path.name)):
        starts.append(number)
        files.append(path)
        for own, record in enumerate(_records(path, spec), start=1):
            yield number, spec.fields(record, partial(_place, path, own))
            number += 1


def files_of(folder: Path) -> list[Path]:
    """Return the texts of a split, in any order."""
    return [path for path in folder.rglob(PATTERN) if path.is_file()]


def _place(path: Path, question: int) -> str:
    return f"{path}, question {question}"


def _records(path: Path, spec: TableSpec) -> Iterator[dict[str, object]]:
    """Yield the columns of each question of a text."""
    try:
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not valid UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must be a JSON object with the keys article, questions, options and answers")
    wanted = [column for column in _LISTS if column in spec.columns]
    required = ["article", *(_LISTS[column] for column in wanted if column not in spec.optional)]
    if missing := next((key for key in required if key not in content), None):
        raise UserError(f"{path}: has no key {missing!r}; its keys are {', '.join(map(repr, content))}")
    lists: dict[str, list[object]] = {}
    for column in wanted:
        values = content.get(_LISTS[column])
        if values is None and _LISTS[column] == _OPTIONAL:
            continue
        if not isinstance(values, list):
            raise UserError(f"{path}: {_LISTS[column]} must be a list with an entry for each question")
        lists[column] = values
    lengths = {_LISTS[column]: len(values) for column, values in lists.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{count} {key}" for key, count in lengths.items())
        raise UserError(f"{path}: has {found}; each question needs its options and its answer")
    for row in zip(*lists.values(), strict=True):
        yield {"article": content["article"], **dict(zip(lists, row, strict=True))}
