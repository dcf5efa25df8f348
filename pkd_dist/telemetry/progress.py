"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pkd_dist.telemetry.log import log

_LINE_SECONDS = 10.0


class Bar:
    """Progress of one piece of work.

    Args:
        label: what is being done.
        total: units of work.
        done: units already done (after a resume).
        show: False keeps it silent.
    """

    def __init__(self, label: str, total: int, done: int = 0, show: bool = True):
        self._label, self._total, self._done = label, total, done
        self._rich: Progress | None = None
        self._last_line = self._start = time.monotonic()
        self._show = show
        if show and sys.stdout.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn())
            self._rich = Progress(
                *columns,
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(file=sys.stdout),
            )
            self._task = self._rich.add_task(label, total=total, completed=done, note="")

    def __enter__(self) -> Bar:
        if self._rich:
            self._rich.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich:
            self._rich.stop()

    def advance(self, units: int = 1, note: str = "") -> None:
        self._done += units
        if self._rich:
            self._rich.update(self._task, advance=units, note=note)
        elif self._show:
            now = time.monotonic()
            if now - self._last_line >= _LINE_SECONDS:
                self._last_line = now
                log.info(
                    "%s: %d/%d (%d%%) %s",
                    self._label,
                    self._done,
                    self._total,
                    100 * self._done // max(1, self._total),
                    note,
                )


@contextmanager
def timed() -> Iterator[list[float]]:
    """Yields a list that holds the block's seconds once it ends."""
    out: list[float] = []
    start = time.perf_counter()
    try:
        yield out
    finally:
        out.append(time.perf_counter() - start)
