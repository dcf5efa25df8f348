"""Progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

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
from pkd_dist.telemetry.markup import console

_SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """Progress of one task; use as a context manager.

    Args:
        label: name of the task.
        total: units of work.
        done: units already done, after a resume.
        show: False for silence.
    """

    def __init__(self, label: str, total: int, done: int = 0, show: bool = True):
        self._label, self._total, self._done = label, total, done
        self._rich: Progress | None = None
        self._last_line = time.monotonic()
        self._show = show
        if show and sys.stdout.isatty():
            self._rich = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                console=console(sys.stdout),
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

    def finish(self) -> None:
        """Show the work as complete, though there was less of it than expected."""
        if self._rich:
            self._rich.update(self._task, total=self._done)

    def grow(self, total: int) -> None:
        """Set the units of work, where there are more than was known."""
        self._total = total
        if self._rich:
            self._rich.update(self._task, total=total)

    def advance(self, units: int = 1, note: str = "") -> None:
        """Add finished units; `note` is shown after the bar."""
        self._done += units
        if self._rich:
            self._rich.update(self._task, advance=units, note=note)
        elif self._show:
            now = time.monotonic()
            if now - self._last_line >= _SECONDS_BETWEEN_LINES:
                self._last_line = now
                percent = 100 * self._done // max(1, self._total)
                log.info("%s: %d/%d (%d%%) %s", self._label, self._done, self._total, percent, note)


@contextmanager
def timed() -> Iterator[list[float]]:
    """Yield a list to which the duration of the block, in seconds, is appended when it ends."""
    seconds: list[float] = []
    start = time.perf_counter()
    try:
        yield seconds
    finally:
        seconds.append(time.perf_counter() - start)
