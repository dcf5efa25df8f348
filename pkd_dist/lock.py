"""A folder belongs to one job at a time; a crash leaves nothing stuck.

The kernel's lock on FOLDER/run.lock goes with the process that holds it. Where a shared file system does not carry such
locks from host to host, the sign of life that the holder keeps renewing in the file decides: silent for `LEASE_SECONDS`,
the holder is gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from pkd_dist.errors import UserError
from pkd_dist.telemetry.log import log

NAME = "run.lock"
LEASE_SECONDS = 60.0
_RENEW_SECONDS = LEASE_SECONDS / 6
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems without such locks answer: then the sign of life alone decides."""


class Lock:
    """Holds a folder's lock from `acquire` to `release`; use on one rank.

    Args:
        folder: exists.
        lease_seconds: how long a holder on another host may be silent.
    """

    def __init__(self, folder: Path, lease_seconds: float = LEASE_SECONDS):
        self._path, self._lease = folder / NAME, lease_seconds
        self._file: IO[str] | None = None
        self._released = threading.Event()

    def acquire(self, wait: bool = False, tick: Callable[[], None] = lambda: None) -> Lock:
        """Takes the lock.

        Args:
            wait: for as long as another job has it, instead of refusing.
            tick: called every half second of waiting.

        Raises:
            UserError: another job has it; names its host, process and age.
        """
        told = False
        self._tick = tick
        while not self._try():
            if not wait:
                raise UserError(f"{self._path.parent}: in use by {self._holder()}; wait for that job, or stop it")
            if not told:
                log.info("%s: waiting for %s", self._path.parent, self._holder())
                told = True
            self._pause()
        return self

    def _pause(self) -> None:
        self._tick()
        time.sleep(min(0.5, self._lease / 10))

    def _try(self) -> bool:
        while True:
            file = open(self._path, "a+")  # noqa: SIM115 - held until `release`
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                return False
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    file.close()
                    raise
            if not self._still_there(file):  # the holder before removed the file while we opened it
                file.close()
                continue
            if self._alive_elsewhere(file):
                file.close()
                return False
            self._file = file
            self._write()
            threading.Thread(target=self._renew, name="lock", daemon=True).start()
            return True

    def _still_there(self, file: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _alive_elsewhere(self, file: IO[str]) -> bool:
        """Whether a job on another host, from which the kernel's lock may not reach here, still renews the file."""
        content = _read(self._path)
        if content.get("host") in (None, socket.gethostname()):
            return False
        before = file_time = os.fstat(file.fileno()).st_mtime_ns
        log.info("%s: %s may still be at work; watching for %g s", self._path.parent, self._holder(), self._lease)
        deadline = time.monotonic() + self._lease
        while file_time == before and time.monotonic() < deadline:
            self._pause()
            file_time = os.stat(self._path).st_mtime_ns if self._path.exists() else before
        return file_time != before

    def _write(self) -> None:
        assert self._file is not None
        self._file.truncate(0)
        self._file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}) + "\n")
        self._file.flush()

    def _renew(self) -> None:
        while not self._released.wait(_RENEW_SECONDS):
            with contextlib.suppress(OSError):
                if self._is_ours():
                    os.utime(self._path)

    def _is_ours(self) -> bool:
        """Not so where another host took the lock over, because this one was silent for too long."""
        content = _read(self._path)
        return (content.get("host"), content.get("pid")) == (socket.gethostname(), os.getpid())

    def _holder(self) -> str:
        content = _read(self._path)
        if not content:
            return "another job"
        age = max(0.0, time.time() - content["since"])
        return f"process {content['pid']} on {content['host']}, which started {_age(age)} ago"

    def release(self) -> None:
        if self._file is None:
            return
        self._released.set()
        if self._is_ours():
            self._path.unlink(missing_ok=True)
        self._file.close()
        self._file = None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) and {"host", "pid", "since"} <= content.keys() else {}


def _age(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
