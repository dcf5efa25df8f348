"""The processes of a study: workers, and runs of the launcher. A stop signal reaches all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pkd_dist.distributed.signals import SIGNALS
from pkd_dist.errors import DivergedError, Preempted, UserError
from pkd_dist.lock import waiting_lock
from pkd_dist.search.forks import PR_SET_PDEATHSIG, Fork, Forks
from pkd_dist.telemetry.log import log


def _ends_with_parent() -> str:
    """Return Python code that asks for SIGTERM when the starting thread ends, and exits at once if this process is already gone."""
    ask = f"ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, {signal.SIGTERM.value})"
    return f"import ctypes, os, sys; {ask}; os.getppid() == {os.getpid()} or sys.exit({Preempted.exit_status}); "


def python(module: str) -> list[str]:
    """Return the command of a module, as `python -m` but never of a package of the same name in the working folder.

    To be started by this process. When the thread that starts it ends, be it by a kill, it gets SIGTERM, commits a checkpoint
    and stops.
    """
    code = f"{_ends_with_parent()}import runpy; del sys.path[0]; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
    return [sys.executable, "-c", code, module]


def program(command: Sequence[str]) -> list[str]:
    """Return the command of another program; see `python`."""
    return [sys.executable, "-c", f"{_ends_with_parent()}os.execvp(sys.argv[1], sys.argv[1:])", *command]


Process = Fork | subprocess.Popen[bytes]


class Processes:
    """The running processes of a command. To be used in the main thread.

    Args:
        command: Its name, for messages.
        forks: What forks them; None (there are GPUs): each loads the libraries itself.
    """

    def __init__(self, command: str, forks: Forks | None = None):
        self.command, self._forks = command, forks
        self._running: list[Process] = []
        self._stopped = f"{command}: stopped; finished runs are kept, rerun the same command to resume"

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        output: Path,
        variables: Mapping[str, str],
        cores: Iterable[int] = (),
    ) -> Process:
        """Start a program of this package, as `python -m module`.

        Args:
            output: What it prints is appended to this file.
            variables: Of the environment, beside those of this process.
            cores: The cores that it may use; empty: all of this process.
        """
        if self._forks:
            if fork := self._forks.start(module, arguments, output, variables, cores):
                self._running.append(fork)
                return fork
            log.debug("%s: the source of programs has ended; %s loads the libraries itself", self.command, module)
        process = self._start([*python(module), *arguments], output, variables)
        if cores:
            with suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, cores)
        return process

    def _start(self, command: Sequence[str], output: Path, variables: Mapping[str, str]) -> Process:
        with open(output, "ab") as file:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env={**os.environ, **variables}
            )
        self._running.append(process)
        return process

    def run(self, arguments: Sequence[str], output: Path, launcher: Sequence[str] = ()) -> None:
        """Run the launcher with these arguments to its end.

        Args:
            output: What it prints is appended to this file.
            launcher: See `shares.train_command`; empty: this Python, one rank.

        Raises:
            UserError, DivergedError, Preempted: As it ended.
        """
        with waiting_lock(output.parent):  # a run that a killed command left behind is still stopping
            pass
        if launcher:
            process = self._start([*program(launcher), *arguments], output, {})
        else:
            process = self.start("pkd_dist.train", arguments, output, {})
        self.require_success(process, output, process.wait())

    def require_success(self, process: Process, output: Path, status: int) -> None:
        """Raise what a process ended with, unless it ended well."""
        self._running.remove(process)
        if status == Preempted.exit_status:
            raise Preempted(self._stopped, signal.SIGTERM)
        if status:
            kind = DivergedError if status == DivergedError.exit_status else UserError
            raise kind(f"{last_error(output)} (full output: {output})")

    def forget(self, process: Process) -> None:
        """Leave out a process that has ended."""
        self._running.remove(process)

    def stop(self) -> None:
        """Ask all processes to stop, and wait for them: they commit a checkpoint."""
        for process in self._running:
            process.terminate()
        for process in self._running:
            process.wait()

    @contextmanager
    def stopped_on_signal(self) -> Iterator[None]:
        """Stop all processes when the block ends early, and raise Preempted on the signals that stop a run."""

        def interrupt(number: int, frame: FrameType | None) -> NoReturn:
            raise Preempted(self._stopped, number)

        numbers = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
        before = {number: signal.signal(number, interrupt) for number in numbers}
        try:
            yield
        finally:
            for number in before:
                signal.signal(number, signal.SIG_IGN)
            self.stop()
            for number, handler in before.items():
                signal.signal(number, handler)


def last_error(log: Path) -> str:
    """Return the last error that a process of this package printed."""
    lines = log.read_bytes()[-100_000:].decode(errors="replace").splitlines()
    return next(
        (line for line in reversed(lines) if line.startswith("pkd: ")), "pkd: it printed no error"
    ).removeprefix("pkd: ")
