"""metrics.jsonl: one JSON object a line, append-only, without gaps or doubles across kills and resumes.

A resumed run does again the steps since its checkpoint. Their lines are already there, so they are not written twice: a
line is known by its step and, for an evaluation, its split. A line torn by a kill is cut off first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pkd_dist.errors import UserError
from pkd_dist.files import require_space

_WORDS = {"split", "seconds"}  # what is no number in a record


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics file; nothing where there is none.

    Raises:
        UserError: a line is not one that a run has written.
    """
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                yield _parsed(line, f"{path}, line {number}")


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if isinstance(record["step"], int) and all(
            isinstance(record[key], int | float) for key in record.keys() - _WORDS
        ):
            return record  # type: ignore[no-any-return]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{where}: is not a record of a step or an evaluation; remove the line")


def _key(record: dict[str, Any]) -> tuple[int, str | None]:
    return record["step"], record.get("split")


class Records:
    """The writer; use on one rank alone."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known = {_key(record) for record in read(path)}
        self._path = path
        self._file = open(path, "ab+")  # noqa: SIM115 - lives as long as the run
        self._cut_torn_line()

    def _cut_torn_line(self) -> None:
        size = self._file.seek(0, os.SEEK_END)
        window = min(size, 1 << 16)
        self._file.seek(size - window)
        tail = self._file.read(window)
        if tail and not tail.endswith(b"\n"):
            self._file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)

    def write(self, record: dict[str, Any]) -> bool:
        """Writes a line that is not there yet; says whether it was not."""
        if _key(record) in self._known:
            return False
        self._known.add(_key(record))
        line = (json.dumps(record) + "\n").encode()
        with require_space(self._path.parent, len(line), self._path.name):
            self._file.write(line)
            self._file.flush()
        return True

    def close(self) -> None:
        self._file.close()
