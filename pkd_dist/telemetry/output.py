"""Standard output and error that are closed, full, or pipes that nobody reads.

A run does not end for want of a reader: its messages are also in its log files. Commands whose output is their product do.
"""

from __future__ import annotations

import io
import os
import select
import sys

from pkd_dist.telemetry.log import log


def open_missing() -> None:
    """Open standard input, output and error on /dev/null if they are closed: a file of the run would get their number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        if getattr(sys, name) is None:
            stream = open(number, mode, closefd=False, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            setattr(sys, name, stream)


def drop(number: int) -> None:
    """Drop what is written to a file descriptor from now on."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


def keep_going() -> None:
    """Let the process continue without messages once standard output or error cannot be written."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or stream is not getattr(sys, f"__{name}__"):
            continue  # it belongs to whoever redirected it
        raw = _Messages(stream.fileno(), "w", closefd=False)
        encoding, by_line = stream.encoding, stream.line_buffering
        setattr(
            sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=by_line)
        )


class _Messages(io.FileIO):
    """Standard output or error. After the first error of the system what is written is dropped."""

    def write(self, data) -> int:  # type: ignore[no-untyped-def, override]  # any buffer
        try:
            while (written := super().write(data)) is None:  # the other end made it non-blocking
                select.select([], [self], [])
            return written
        except OSError as error:
            drop(self.fileno())
            name = "error" if self.fileno() == 2 else "output"
            log.debug("standard %s cannot be written (%s); the rest of it is dropped", name, error.strerror)
            return memoryview(data).nbytes
