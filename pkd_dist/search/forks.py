"""Starts programs of this package in milliseconds: forks of a process that has loaded the libraries.

A fresh Python needs seconds to load them, and each of a study's programs would hold its own copy in memory. So `pkd sweep` and `pkd compare`
fork a *source* before they do anything else, when they have no thread yet. It loads the libraries while the command checks its input, and
then only forks. It ends with the command, and the programs that still run then get SIGTERM.

Where there are GPUs no program is forked: what has looked for a GPU before a fork has lost it after.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import runpy
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, NoReturn

from pkd_dist.allocator import keep_freed_blocks
from pkd_dist.distributed.signals import SIGNALS
from pkd_dist.errors import Preempted

_LIBRARIES = (
    "pkd_dist.pipeline", "pkd_dist.search.worker", "pkd_dist.comparison.runs",
    "transformers.models.auto.modeling_auto", "sklearn.metrics",
)  # fmt: skip
_GPUS = ("/dev/nvidiactl", "/dev/kfd")
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


class _Order(NamedTuple):
    module: str
    arguments: list[str]
    log: str
    variables: dict[str, str]


class Fork:
    """A forked program, with the calls of `subprocess.Popen` that `Processes` needs."""

    def __init__(self, pid: int):
        self.pid = pid
        self.returncode: int | None = None
        self._ended = threading.Event()

    def poll(self) -> int | None:
        """Return the exit status, negative after a signal; None while it runs."""
        return self.returncode

    def wait(self) -> int:
        self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def end(self, status: int) -> None:
        self.returncode = status
        self._ended.set()


class Forks:
    """The source, seen from the command; use `opened`."""

    def __init__(self) -> None:
        self._line, theirs = Pipe()
        self._begun: SimpleQueue[Fork | None] = SimpleQueue()
        command = os.getpid()
        self._source = os.fork()
        if not self._source:
            try:
                self._line.close()
                _serve(theirs, command)
            finally:
                os._exit(1)
        theirs.close()
        # In a thread, because a signal's exception in the main thread could lose half a message.
        threading.Thread(target=self._listen, name="forks", daemon=True).start()

    def _listen(self) -> None:
        running: dict[int, Fork] = {}
        with suppress(EOFError, OSError):
            while True:
                pid, status = self._line.recv()
                if status is None:
                    running[pid] = Fork(pid)
                    self._begun.put(running[pid])
                else:
                    running.pop(pid).end(status)
        for fork in running.values():  # the source was killed, and they stopped with it
            fork.end(-signal.SIGKILL)
        self._begun.put(None)

    def start(self, module: str, arguments: Sequence[str], log: Path, variables: Mapping[str, str]) -> Fork | None:
        """Fork a program, as `python -m module`; its output is appended to a file. None: the source has ended.

        Args:
            variables: Of the environment, beside those of the command.
        """
        try:
            self._line.send(_Order(module, list(arguments), os.path.abspath(log), dict(variables)))
        except OSError:
            return None
        return self._begun.get()

    def close(self) -> None:
        os.kill(self._source, signal.SIGKILL)
        os.waitpid(self._source, 0)


@contextmanager
def opened() -> Iterator[Forks | None]:
    """Fork the source from this process; None where there are GPUs, or this process has threads already."""
    if any(map(os.path.exists, _GPUS)) or len(os.listdir("/proc/self/task")) > 1:
        yield None
        return
    forks = Forks()
    try:
        yield forks
    finally:
        forks.close()


def _serve(line: Connection, command: int) -> NoReturn:
    """Be the source: load the libraries, then fork a program for each order and report its end, until the command ends."""
    _with_parent(command, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # those to all processes of a job are for the others
    _output_to(os.devnull)
    keep_freed_blocks()
    gc.disable()
    for name in _LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # else a collection in a program walks, and so copies, what all share
    gc.enable()
    running: list[ForkProcess] = []
    while True:
        if line in wait([line, *(process.sentinel for process in running)]):
            process = ForkProcess(target=_become, args=(line.recv(), os.getpid()))
            process.start()
            running.append(process)
            line.send((process.pid, None))
        for process in [process for process in running if process.exitcode is not None]:
            running.remove(process)
            line.send((process.pid, process.exitcode))


def _become(order: _Order, source: int) -> None:
    """Be a program."""
    import torch

    _with_parent(source, signal.SIGTERM)
    _name(f"pkd {order.module.rpartition('.')[2]}")
    _output_to(order.log)
    os.environ.update(order.variables)
    if (threads := order.variables.get("OMP_NUM_THREADS", "")).isdecimal():  # torch has read the command's
        torch.set_num_threads(int(threads))
    sys.argv = [order.module, *order.arguments]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    runpy.run_module(order.module, run_name="__main__", alter_sys=True)


def _with_parent(parent: int, number: signal.Signals) -> None:
    """Get a signal when the parent ends; end now if it has ended already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(Preempted.exit_status)


def _name(name: str) -> None:
    """Set the name that `ps -e` and `top` show; arguments stay those of the command."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15])


def _output_to(path: str) -> None:
    """Read nothing, and append what this process prints to a file."""
    for name, numbers, flags in (
        (os.devnull, (0,), os.O_RDONLY),
        (path, (1, 2), os.O_WRONLY | os.O_APPEND | os.O_CREAT),
    ):
        file = os.open(name, flags, 0o666)
        for number in numbers:
            os.dup2(file, number)
        os.close(file)
