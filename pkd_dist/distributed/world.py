"""The process group: the ranks of a run, the few collectives that the stages need, and how the ranks end together.

`World` connects the ranks that `ranks.py` has found and starts the watchdog. Objects and small host values are exchanged over
gloo; the gradients are DeepSpeed's. After an exception the ranks agree over the board on who reports it.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as torch_dist

from pkd_dist.distributed.board import REPORTED, STATUS, Board, left_by, life_of
from pkd_dist.distributed.ranks import Ranks, speaks_without_rank_0
from pkd_dist.distributed.signals import StopSignals, name_of
from pkd_dist.distributed.watchdog import LATE_SECONDS, Watchdog, first_remote_rank
from pkd_dist.errors import DivergedError, LostRank, Preempted, UserError
from pkd_dist.limits import cores, subnormals_are_zero
from pkd_dist.network import own_address_towards
from pkd_dist.telemetry.log import log, log_file

T = TypeVar("T")
_COLLECTIVE_TIMEOUT = timedelta(days=1)
"""The watchdog ends a wait that is too long: it knows whether the other ranks still work."""
_LAST_WORDS_SECONDS = 2.5
_RETRY_SECONDS = 0.05
_RESUME = "; rerun the same command to resume"


class World:
    """The ranks of a run. Methods are collective unless they say otherwise.

    Args:
        ranks: this process among the others.
        timeout_seconds: how long this rank waits for others that make no progress.
        signals: the signals noted since the process began; None: stop signals are not handled.

    Raises:
        UserError: another program uses the port of the rendezvous.
        LostRank: the ranks did not meet in time.
    """

    def __init__(self, ranks: Ranks, timeout_seconds: float = 600.0, signals: StopSignals | None = None):
        self._position, self._must_linger = "start", False
        self.rank, self.size, self.launcher = ranks.rank, ranks.world_size, ranks.launcher
        self._local_rank = ranks.local_rank
        if torch.cuda.is_available():
            self.device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
            torch.backends.cuda.enable_cudnn_sdp(False)  # it compiles a kernel for every shape, and text has many
        else:
            self.device = torch.device("cpu")
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        ranks.export()  # DeepSpeed reads these variables even if the process group exists
        self.signals = signals or StopSignals()
        places = self._meet(timeout_seconds)
        self.signals.met()
        self._hosts = [host for host, _ in places]
        if self._watchdog:
            self._watchdog.hosts = self._hosts
        if self.device.type == "cpu" and ("OMP_NUM_THREADS" not in os.environ or self.size > 1):
            torch.set_num_threads(max(1, cores() // places.count(places[self.rank])))
        _start_threads()

    def _meet(self, timeout_seconds: float) -> list[tuple[str, tuple[int, ...]]]:
        """Connect the ranks, start the watchdog if there are others, and return each rank's host and cores."""
        store = _open_store(self.rank, self.size, timeout_seconds)
        self._watchdog: Watchdog | None = None
        if self.size > 1:
            own_signal = self.stop_signal
            self._watchdog = Watchdog(self.rank, self.size, Board(), timeout_seconds, own_signal, self._end).start()
        self.at(f"meeting the other ranks at {_rendezvous()}")
        store.set_timeout(_COLLECTIVE_TIMEOUT)
        backend = "cuda:nccl,cpu:gloo" if self.device.type == "cuda" else "gloo"
        if torch_dist.is_initialized():  # by an earlier run in this process, which ended with an error
            torch_dist.destroy_process_group()
        try:
            torch_dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.size, timeout=_COLLECTIVE_TIMEOUT
            )
            # Objects and small host values always use gloo, so that they never wait for a GPU stream.
            self._host_group = torch_dist.new_group(backend="gloo", timeout=_COLLECTIVE_TIMEOUT)
            return self.gather((socket.gethostname(), tuple(sorted(os.sched_getaffinity(0)))))
        except Exception as error:
            if self._watchdog and is_lost(error):  # before the hosts are known the watchdog alone can name a rank
                self._end(self._watchdog.last_words())
            raise

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def node_main(self) -> bool:
        return self._local_rank == 0

    @property
    def one_host(self) -> bool:
        return len(set(self._hosts)) == 1

    # -------------------------------------------------------------------------------------- progress and stop signals

    def at(self, position: str, loop: bool = True) -> None:
        """Note what this rank does next, for messages; a beat. Not collective.

        Args:
            loop: part of a loop that calls `at` or `beat` in every iteration. On a GPU, computation between them does
                not count as progress.
        """
        self._position = position
        if self._watchdog:
            self._watchdog.at(position, not loop or self.device.type == "cpu")

    def beat(self) -> None:
        """Note progress of this rank. Not collective."""
        if self._watchdog:
            self._watchdog.beat()

    def stop_signal(self) -> int:
        """Return this rank's stop signal, 0 if none. Not collective: ranks must agree before they act on it."""
        return self.signals.number

    def stopping(self) -> bool:
        """Return whether any rank is known to have a stop signal; a beat. Not collective."""
        self.beat()
        return bool(self._known_stop_signal())

    def _known_stop_signal(self) -> int:
        return self.signals.number or (self._watchdog.peer_stop_signal if self._watchdog else 0)

    def stop_here(self, what: str) -> None:
        """Raise Preempted on every rank if any has a stop signal. For points at which everything is committed."""
        if self.sum(np.array([self.signals.number]))[0]:
            raise _stopped(what, max(self.gather(self.signals.number)))

    def interrupt(self, what: str) -> None:
        """Raise Preempted on this rank if any is known to have a stop signal. Not collective.

        For long work inside `on_main`, which passes the exception on to all ranks.
        """
        if self.stopping():
            raise _stopped(what, self._known_stop_signal())

    # ----------------------------------------------------------------------------------------------------- collectives

    def barrier(self) -> None:
        with self._collective():
            torch_dist.barrier(group=self._host_group)

    @contextmanager
    def _collective(self) -> Iterator[None]:
        self.beat()
        yield
        self.beat()

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return the source rank's value on every rank."""
        box = [value]
        with self._collective():
            torch_dist.broadcast_object_list(box, src=source, group=self._host_group)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order, on every rank."""
        out = [value] * self.size
        with self._collective():
            torch_dist.all_gather_object(out, value, group=self._host_group)
        return out

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its value on every rank. An exception is raised on every rank."""
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self.main:
            try:
                outcome = (work(), None)
            except Exception as error:
                outcome = (None, _picklable(error))
        value, failure = self.broadcast(outcome)
        if failure is not None:
            raise _mark_raised_everywhere(failure)
        return value  # type: ignore[return-value]

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank and return each rank's own value.

        If it fails on any rank, every rank raises the exception of the lowest one.
        """
        mine: Exception | None = None
        value: T | None = None
        try:
            value = work()
        except Exception as error:
            mine = _picklable(error)
        for failure in self.gather(mine):
            if failure is not None:
                raise _mark_raised_everywhere(failure)
        return value  # type: ignore[return-value]

    def everywhere(self, work: Callable[[], T]) -> list[T]:
        """Run `work` as `together` does, and return the values of all ranks, in rank order, on every rank."""
        return self.gather(self.together(work))

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Return the elementwise float64 sum of a small array over ranks."""
        total = np.array(values, dtype=np.float64)
        if self.size > 1:
            with self._collective():
                torch_dist.all_reduce(torch.from_numpy(total), group=self._host_group)
        return total

    def gather_rows(self, rows: np.ndarray, positions: np.ndarray, total: int) -> np.ndarray:
        """Return one array of `total` rows, assembled from the rows of all ranks, on every rank.

        Args:
            rows: (n, ...) of this rank.
            positions: (n,) where they belong; each of 0..total-1 occurs exactly once over all ranks.
        """
        out = np.empty((total, *rows.shape[1:]), dtype=rows.dtype)
        seen = np.zeros(total, dtype=bool)
        for part, where in self.gather((rows, positions)):
            assert not seen[where].any(), "an example was scored twice"
            out[where], seen[where] = part, True
        assert seen.all(), "an example was not scored"
        return out

    # --------------------------------------------------------------------------------------------------- ending the run

    def close(self) -> None:
        """Leave the process group after success. After a failure the process just ends: NCCL would wait for lost ranks."""
        if self._watchdog:
            self._watchdog.stop()
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()

    def agree_on_end(self, error: Exception) -> tuple[str | None, int]:
        """Agree on one rank that reports an exception, and on the exit status of all. Not collective.

        Rank 0 reports an exception that all ranks raise. If a single rank raises one, the others lose that rank: the first
        to claim the report on the board makes it.

        Returns:
            The message, None if another rank reports, and the exit status.
        """
        status = getattr(error, "exit_status", 1)
        everywhere = isinstance(error, (DivergedError, Preempted)) or getattr(error, "raised_everywhere", False)
        if self.size == 1 or everywhere:
            return (self._describe(error) if self.main else None), status
        board = Board()
        try:
            board.post(left_by(self.rank), "")
            lost = self._find_lost(board) if isinstance(error, LostRank) else []
            first = board.claim(REPORTED)
            if first:
                board.post(STATUS, str(status))
            status = int(board.read([STATUS]).get(STATUS, status))
        except ConnectionRefusedError:  # rank 0, which hosts the board, is lost
            return self._report_rank_0(1), 1
        except Exception:  # its host is lost as well
            return self._report_rank_0(first_remote_rank(self._hosts)), 1
        self._must_linger = self.main
        if not first:
            return None, status
        if not isinstance(error, LostRank):
            return self._describe(error), status
        names = ", ".join(f"rank {rank} ({self._hosts[rank]})" for rank in lost[:4])
        more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
        reason = f"{names}{more} {'was' if len(lost) == 1 else 'were'} lost"
        if not lost:
            reason = f"the ranks lost each other ({_first_line(error)})"
        return f"{self._position}: {reason}{_RESUME}", status

    def linger(self) -> None:
        """Wait after the last message if the board ends with this process, so that the other ranks can still read it."""
        if self._must_linger:
            time.sleep(_LAST_WORDS_SECONDS)

    def _report_rank_0(self, reporter: int) -> str | None:
        if self.rank != reporter or (self._watchdog and self._watchdog.reported):
            return None
        return f"{self._position}: rank 0 ({self._hosts[0]}) was lost{_RESUME}"

    def _find_lost(self, board: Board) -> list[int]:
        """Return the ranks that neither left a note nor show signs of life."""
        keys = [key(rank) for key in (left_by, life_of) for rank in range(self.size)]
        before = board.read(keys)
        time.sleep(_LAST_WORDS_SECONDS)
        after = board.read(keys)
        return [
            rank
            for rank in range(self.size)
            if left_by(rank) not in after and before.get(life_of(rank)) == after.get(life_of(rank))
        ]

    def _describe(self, error: Exception) -> str:
        if hasattr(error, "exit_status"):
            return str(error)
        what = f"{self._position}: a bug in pkd_dist on rank {self.rank}: {type(error).__name__}: {_first_line(error)}"
        if log_file():
            return f"{what}; the traceback is in {log_file()}"
        traceback.print_exception(error)
        return what

    @staticmethod
    def _end(message: str | None) -> None:
        """End the process from the watchdog's thread, because the main thread may never return."""
        if message:
            print(f"pkd: {message}", file=sys.stderr, flush=True)
        os._exit(LostRank.exit_status)


def _rendezvous() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _start_threads() -> None:
    """Start the threads of PyTorch's operations; in them, subnormal numbers are zero (see `subnormals_are_zero`).

    A thread inherits the mode of the one that starts it, and keeps it.
    """
    with subnormals_are_zero():
        torch.empty(1 << 20).fill_(1)


def _open_store(rank: int, size: int, timeout_seconds: float) -> torch_dist.Store:
    """Return the store through which the ranks meet, without waiting for the other ranks than its host.

    One rank alone opens no port. Rank 0 listens only on its address towards the others, loopback on one host; torch would
    listen on all interfaces. Under torchrun the agent hosts the store.
    """
    if size == 1:
        return torch_dist.HashStore()
    timeout = timedelta(seconds=timeout_seconds)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _await_host(address, port, size, timeout_seconds)
        return torch_dist.TCPStore(address, port, size, False, timeout, wait_for_workers=False)
    os.environ["MASTER_ADDR"] = address = own_address_towards(address)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        handle = socket.create_server((address, port), family=family, backlog=max(128, size)).detach()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"MASTER_PORT: {_rendezvous()} is in use by another program; choose another port (launcher flag --master_port)"
            ) from error
        raise UserError(
            f"MASTER_PORT: rank 0 cannot listen at {_rendezvous()} ({error.strerror}); choose another address or port"
        ) from error
    return torch_dist.TCPStore(address, port, size, True, timeout, wait_for_workers=False, master_listen_fd=handle)


def _await_host(address: str, port: int, size: int, timeout_seconds: float) -> None:
    """Wait until the host of the store listens; torch would print a stack for each failure."""
    began, told = time.monotonic(), False
    while True:
        try:
            socket.create_connection((address, port), timeout_seconds).close()
            return
        except OSError as error:
            waited = time.monotonic() - began
            if waited > timeout_seconds:
                raise LostRank(
                    f"the {size} ranks did not meet at {_rendezvous()} within {timeout_seconds:g} s "
                    "(run.timeout_seconds); check that all of them were started and that every host can reach this address"
                ) from error
        if waited > LATE_SECONDS and not told and speaks_without_rank_0():
            print(f"pkd: waiting for rank 0 at {_rendezvous()}", file=sys.stderr, flush=True)
            told = True
        time.sleep(_RETRY_SECONDS)


def _stopped(what: str, number: int) -> Preempted:
    return Preempted(f"{what}: stopped by {name_of(number)}{_RESUME}", number)


def _picklable(error: Exception) -> Exception:
    """Return the exception, or one with its text if it cannot be pickled."""
    log.debug("passed on to the other ranks", exc_info=error)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _mark_raised_everywhere(error: Exception) -> Exception:
    error.raised_everywhere = True  # type: ignore[attr-defined]
    return error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


# ------------------------------------------------------------------------------------------------------ upstream errors
# The only place that matches the texts of another library, because the exception types do not tell the causes apart:
# - gloo's IoException and TimeoutException reach Python as plain RuntimeErrors (gloo/common/error.h, thrown in
#   gloo/transport/tcp/{pair,buffer,unbound_buffer}.cc). Their texts begin with "[.../gloo/.../pair.cc:LINE]".
# - DistNetworkError covers every socket error (torch/csrc/distributed/c10d/socket.cpp and TCPStoreLibUvBackend.cpp).

_LOST_CONNECTION = re.compile(
    r"closed by (the )?peer|reset by peer|Broken pipe|Connection (closed|reset|refused)|[Tt]imed out|gloo|NCCL", re.I
)


def is_lost(error: Exception) -> bool:
    """Return whether an exception of this rank alone means that another rank cannot be reached."""
    if getattr(error, "raised_everywhere", False):
        return False
    if isinstance(error, (torch_dist.DistNetworkError, torch_dist.DistBackendError, torch_dist.DistStoreError)):
        return True
    return isinstance(error, RuntimeError) and bool(_LOST_CONNECTION.search(str(error)))
