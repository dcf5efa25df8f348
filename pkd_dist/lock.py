"""Gives a folder to one job at a time. A crash leaves nothing locked.

The kernel releases the lock on FOLDER/run.lock when the process that holds it ends. Shared file systems may not pass such
locks on to other hosts. There the modification time of the file decides: the holder keeps renewing it, and a holder on
another host that has been silent for `LEASE_SECONDS` is considered dead. On file systems without kernel locks, a holder on this host
is dead if its process is.
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
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import psutil

from pkd_dist.errors import UserError
from pkd_dist.files import make_folder
from pkd_dist.telemetry.log import log

NAME = "run.lock"
LEASE_SECONDS = 60.0
_RENEW_SECONDS = LEASE_SECONDS / 6
_CLOCK_SECONDS = 1.0
"""How far the start of a process, which is known to a tick, may be off."""
_LOCKS_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""From file systems without kernel locks."""


@dataclass(frozen=True)
class _Holder:
    """The content of the lock file. `since` is in seconds since 1970."""

    host: str
    pid: int
    since: float


class Lock:
    """Holds the lock of a folder from `acquire` to `release`. To be used on one rank.

    Args:
        folder: an existing folder.
        lease_seconds: how long a holder on another host may be silent.
    """

    def __init__(self, folder: Path, lease_seconds: float = LEASE_SECONDS):
        self._path, self._lease_seconds = folder / NAME, lease_seconds
        self._file: IO[str] | None = None
        self._released = threading.Event()

    def acquire(self, wait: bool = False, tick: Callable[[], None] = lambda: None) -> Lock:
        """Take the lock.

        Args:
            wait: wait while another job has the lock, instead of raising.
            tick: called at least every half second of waiting.

        Raises:
            UserError: another job has the lock; names its host, process and age.
        """
        reported = False
        while not self._try(tick):
            if not wait:
                raise UserError(
                    f"{self._path.parent}: in use by {self._describe_holder()}; wait for that job, or stop it"
                )
            if not reported:
                log.info("%s: waiting for %s", self._path.parent, self._describe_holder())
                reported = True
            self._pause(tick)
        return self

    def _pause(self, tick: Callable[[], None]) -> None:
        tick()
        time.sleep(min(0.5, self._lease_seconds / 10))

    def _try(self, tick: Callable[[], None]) -> bool:
        while True:
            file, locked = open(self._path, "a+"), True  # noqa: SIM115 - held until `release`
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                return False
            except OSError as error:
                if error.errno not in _LOCKS_UNSUPPORTED:
                    file.close()
                    raise
                locked = False
            if not self._is_current(file):  # the previous holder removed the file after it was opened here
                file.close()
                continue
            if self._is_held(file, locked, tick):
                file.close()
                return False
            self._write(file)
            if not locked:
                self._pause(tick)  # of several that found it free, the last to write has it
                if not self._is_ours():
                    file.close()
                    return False
            self._file = file
            threading.Thread(target=self._renew, name="lock", daemon=True).start()
            return True

    def _is_current(self, file: IO[str]) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _is_held(self, file: IO[str], locked: bool, tick: Callable[[], None]) -> bool:
        """Return whether a job that the kernel's lock, if there is one, did not keep out holds the file.

        One on another host is alive if it renews the file.
        """
        holder = _read(self._path)
        if holder is None:
            return False
        if holder.host == socket.gethostname():
            return not locked and _runs(holder)
        before = modified = os.fstat(file.fileno()).st_mtime_ns
        log.info(
            "%s: checking for %g s whether %s is alive", self._path.parent, self._lease_seconds, self._describe_holder()
        )
        deadline = time.monotonic() + self._lease_seconds
        while modified == before and time.monotonic() < deadline:
            self._pause(tick)
            modified = os.stat(self._path).st_mtime_ns if self._path.exists() else before
        return modified != before

    def _write(self, file: IO[str]) -> None:
        file.truncate(0)
        file.write(json.dumps(asdict(_Holder(socket.gethostname(), os.getpid(), time.time()))) + "\n")
        file.flush()

    def _renew(self) -> None:
        while not self._released.wait(_RENEW_SECONDS):
            with contextlib.suppress(OSError):
                if self._is_ours():
                    os.utime(self._path)

    def _is_ours(self) -> bool:
        """Return False if another host took over the lock because this one was silent for too long."""
        holder = _read(self._path)
        return holder is not None and (holder.host, holder.pid) == (socket.gethostname(), os.getpid())

    def _describe_holder(self) -> str:
        holder = _read(self._path)
        if holder is None:
            return "another job"
        age = max(0.0, time.time() - holder.since)
        return f"process {holder.pid} on {holder.host}, which started {_format_age(age)} ago"

    def release(self) -> None:
        if self._file is None:
            return
        self._released.set()
        if self._is_ours():
            self._path.unlink(missing_ok=True)
        self._file.close()
        self._file = None


@contextlib.contextmanager
def waiting_lock(folder: Path, tick: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock of a folder for the block; it is created, and another job that has the lock is waited for.

    Args:
        tick: see `Lock.acquire`.
    """
    make_folder(folder)
    held = Lock(folder).acquire(wait=True, tick=tick)
    try:
        yield
    finally:
        held.release()


def _read(path: Path) -> _Holder | None:
    """Return the content of the lock file, None if it has not been written yet."""
    try:
        content = json.loads(path.read_text())
        return _Holder(str(content["host"]), int(content["pid"]), float(content["since"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _runs(holder: _Holder) -> bool:
    """Return whether a process of this host still runs; a later one with its ID began after it had taken the lock."""
    try:
        process = psutil.Process(holder.pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= holder.since + _CLOCK_SECONDS
    except psutil.NoSuchProcess:
        return False


def _format_age(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
