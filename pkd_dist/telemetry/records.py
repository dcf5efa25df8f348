"""metrics.jsonl: one JSON object per line, append-only, without gaps or duplicates across kills and resumes.

A resumed run repeats the steps since its checkpoint, whose lines are already in the file. They are identified by step and, for
evaluations, split, and are not written again. What a kill or a power loss left at the end, a torn line or blocks of zeros, is cut
off first. All lines up to a checkpoint are on disk before it is committed.

A step has `step`, `epoch`, `loss`, `loss_TERM`, `learning_rate`, `grad_norm`, `time` and more numbers; an evaluation has
`split` and its metrics. In both, `seconds` is an object: the seconds of each part of the step, or of the evaluation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any, TypeAlias

from pkd_dist.errors import UserError
from pkd_dist.files import make_folder, require_space, sync, write_atomically

Record: TypeAlias = dict[str, Any]
"""One line of the file."""
_NOT_NUMBERS = {"split", "seconds"}
_OF_A_STEP = {"step", "epoch", "loss", "learning_rate", "grad_norm"}


def read(path: Path, needed: Set[str] = frozenset()) -> Iterator[Record]:
    """Yield the complete lines of a metrics file; none if it does not exist.

    Args:
        needed: keys that the record of a step must have.

    Raises:
        UserError: a line was not written by a run.
    """
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if line.endswith("\n"):
                yield _parse(line, f"{path}, line {number}", needed)


def read_complete(path: Path) -> Iterator[Record]:
    """Yield the same; every step has all that charts and gauges show."""
    return read(path, _OF_A_STEP)


def _parse(line: str, where: str, needed: Set[str]) -> Record:
    try:
        record = json.loads(line)
        numbers = [record["step"], *(record[key] for key in record.keys() - _NOT_NUMBERS)]
        numbers += record.get("seconds", {}).values()
        complete = isinstance(record["split"], str) if "split" in record else needed <= record.keys()
        complete = complete and line.isascii()  # as it was written
        if complete and isinstance(record["step"], int) and all(isinstance(number, int | float) for number in numbers):
            return dict(record)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"{where}: is not a record of a step or an evaluation; remove the line")


def cut_after(path: Path, step: int) -> None:
    """Drop the records after a step, where a training takes another course from there."""
    if path.exists():
        kept = [json.dumps(record) + "\n" for record in read(path) if record["step"] <= step]
        write_atomically(path, lambda temporary: temporary.write_text("".join(kept)))


def losses(record: Record) -> dict[str, float]:
    """Return the losses of a step by term; the sum is `total`."""
    return {
        "total" if key == "loss" else key.removeprefix("loss_"): value
        for key, value in record.items()
        if key == "loss" or (key.startswith("loss_") and key != "loss_scale")
    }


def _key(record: Record) -> tuple[int, str | None]:
    return record["step"], record.get("split")


class Records:
    """Writer of a metrics file; use on one rank only."""

    def __init__(self, path: Path):
        make_folder(path.parent)
        self._path = path
        self._file = open(path, "ab+")  # noqa: SIM115 - open as long as the run
        sync(path.parent)
        self._cut_tail()
        self._written = {_key(record) for record in read(path)}

    def _cut_tail(self) -> None:
        """Cut the file before the first line that a kill tore, or of which a power loss left zeros."""
        self._file.seek(0)
        intact = 0
        for line in self._file:
            if not line.endswith(b"\n") or b"\0\0" in line:
                self._file.truncate(intact)
                return
            intact += len(line)

    def sync(self) -> None:
        """Flush the file to disk. Call before a checkpoint is committed: earlier records are not written again."""
        os.fsync(self._file.fileno())

    def write(self, record: Record) -> bool:
        """Append a record and return True; return False if the file already has it."""
        if _key(record) in self._written:
            return False
        self._written.add(_key(record))
        line = (json.dumps(record) + "\n").encode()
        with require_space(self._path.parent, len(line), self._path.name):
            self._file.write(line)
            self._file.flush()
        return True

    def close(self) -> None:
        self._file.close()
