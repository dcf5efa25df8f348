"""Starts programs of this package in milliseconds, by forking a process that has loaded the libraries.

A fresh Python needs seconds to load them, and each of a study's programs would hold its own copy in memory. So `pkd sweep` and `pkd compare`
first load what all programs need and then, while they have no thread yet, fork a *source* that does nothing but fork programs. It ends
with the command, and the programs that still run then get SIGTERM.

Where there are GPUs no program is forked: this was never tried there.
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple, NoReturn

from pkd_dist.distributed.signals import SIGNALS
from pkd_dist.errors import Preempted
from pkd_dist.loading import loading
from pkd_dist.telemetry.log import log

_LIBRARIES = ("pkd_dist.pipeline", "pkd_dist.search.worker", "transformers.models.auto.modeling_auto")
_WITH_THREADS = ("sklearn.metrics",)
"""Loaded by the source alone. A fork works without their threads, but the command must have none when it forks the source."""
_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/nvhost-ctrl")
PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


class _Order(NamedTuple):
    module: str
    arguments: list[str]
    output: str
    variables: dict[str, str]
    cores: tuple[int, ...]


class Fork:
    """A forked program, with the calls of `subprocess.Popen` that `Processes` needs."""

    def __init__(self, pid: int):
        self.pid = pid
        self._status: int | None = None
        self._ended = threading.Event()

    def poll(self) -> int | None:
        """Return the exit status, negative after a signal; None while it runs."""
        return self._status

    def wait(self) -> int:
        self._ended.wait()
        assert self._status is not None
        return self._status

    def terminate(self) -> None:
        if self._status is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def end(self, status: int) -> None:
        self._status = status
        self._ended.set()


class Forks:
    """The source, seen from the command; use `opened`."""

    def __init__(self) -> None:
        self._line, theirs = Pipe()
        self._begun: SimpleQueue[Fork | OSError | None] = SimpleQueue()
        self._closed = False
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self._source = os.fork()
            if not self._source:
                try:
                    self._line.close()
                    _serve(theirs)
                finally:
                    os._exit(1)
            theirs.close()
            # In a thread, because a signal's exception in the main thread could lose half a message.
            self._listener = threading.Thread(target=self._listen, name="forks", daemon=True)
            self._listener.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _listen(self) -> None:
        """Note what begins and ends, until the source and all programs have ended: each holds the other end of the line."""
        running: dict[int, Fork] = {}
        with suppress(EOFError, OSError):
            while True:
                pid, status = self._line.recv()
                if pid is None:
                    self._begun.put(status)
                elif status is None:
                    running[pid] = Fork(pid)
                    self._begun.put(running[pid])
                else:
                    running.pop(pid).end(status)
        if not self._closed:
            log.info("the process that forks programs was killed; %d that ran have stopped", len(running))
        for fork in running.values():  # they got SIGTERM when the source ended
            fork.end(Preempted.exit_status)
        self._begun.put(None)

    def start(
        self, module: str, arguments: Sequence[str], output: Path, variables: Mapping[str, str], cores: Iterable[int]
    ) -> Fork | None:
        """Fork a program, as `python -m module`; return None if the source has ended.

        Args:
            output: What it prints is appended to this file.
            variables: Of the environment, beside those of the command.
            cores: The cores that it may use; empty: those of the command.

        Raises:
            OSError: The file cannot be written, or there is no room for another process.
        """
        with open(output, "ab"):
            pass
        try:
            self._line.send(_Order(module, list(arguments), os.path.abspath(output), dict(variables), tuple(cores)))
            begun = self._begun.get()
        except OSError:
            return None
        except BaseException:  # of a signal's handler: half an order, or a program that nobody knows
            self._kill_source()
            raise
        if isinstance(begun, OSError):
            raise begun
        return begun

    def close(self) -> None:
        """End the source, and wait until programs that still run have stopped."""
        self._kill_source()
        os.waitpid(self._source, 0)
        self._listener.join()

    def _kill_source(self) -> None:
        self._closed = True
        os.kill(self._source, signal.SIGKILL)


def load_libraries(*more: str) -> None:
    """Load what all programs need, and more modules, without starting a thread."""
    given = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of numpy's products; large ones are torch's here
    _load((*_LIBRARIES, *more))
    if given is None:
        del os.environ["OPENBLAS_NUM_THREADS"]
    else:
        os.environ["OPENBLAS_NUM_THREADS"] = given


def _load(names: Iterable[str]) -> None:
    with loading():
        for name in names:
            importlib.import_module(name)


@contextmanager
def opened() -> Iterator[Forks | None]:
    """Fork the source from this process, after `load_libraries`; None where there are GPUs, or this process has threads."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # where it is ignored, nobody learns how a process has ended
    forks = None
    threads = len(os.listdir("/proc/self/task"))
    if threads == 1 and not any(map(os.path.exists, _GPUS)):
        with suppress(OSError):  # no room for another process of this size
            forks = Forks()
    if forks is None:
        log.debug("programs are not forked: %d thread(s)", threads)
    try:
        yield forks
    finally:
        if forks:
            forks.close()


def _serve(line: Connection) -> NoReturn:
    """Be the source: fork a program for each order and report its end, until the command ends."""
    # Signals stay blocked: those to all processes of a job are for the others.
    _name("pkd source")
    _output_to(os.devnull)
    _load(_WITH_THREADS)
    gc.freeze()  # else a collection in a program walks, and so copies, what all share
    running: list[ForkProcess] = []
    while True:
        # A sentinel stays silent while a process lives that a program has forked, so all are looked at each second.
        if line in wait([line, *(process.sentinel for process in running)], 1.0):
            process = ForkProcess(target=_become, args=(line.recv(), os.getpid()))
            try:
                process.start()
            except OSError as error:
                line.send((None, error))
            else:
                running.append(process)
                line.send((process.pid, None))
        for process in [process for process in running if process.exitcode is not None]:
            running.remove(process)
            line.send((process.pid, process.exitcode))


def _become(order: _Order, source: int) -> None:
    """Be a program. It inherits the source's end of the line, which must stay open: see `Forks._listen`."""
    import torch

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != source:  # it had ended before it was asked for
        os._exit(Preempted.exit_status)
    _name(f"pkd {order.module.rpartition('.')[2]}")
    _output_to(order.output)
    os.environ.update(order.variables)
    if order.cores:
        os.sched_setaffinity(0, order.cores)
    if (threads := order.variables.get("OMP_NUM_THREADS", "")).isdecimal() and int(threads):
        torch.set_num_threads(int(threads))  # torch has read the command's value
    sys.argv = [order.module, *order.arguments]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    runpy.run_module(order.module, run_name="__main__", alter_sys=True)


def _name(name: str) -> None:
    """Set the name that `ps -e` and `top` show; arguments stay those of the command."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode()[:15])


def _output_to(path: str) -> None:
    """Append what this process prints to a file."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    os.close(file)
