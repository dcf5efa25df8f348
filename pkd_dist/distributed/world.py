"""The process group: the ranks of a run and the few collectives that the stages need.

The only user of `torch.distributed` (DeepSpeed's engine aside). Who is who stands in `ranks.py`.
"""

from __future__ import annotations

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
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as torch_dist

from pkd_dist.distributed.ranks import Ranks
from pkd_dist.distributed.signals import StopSignals, name_of
from pkd_dist.distributed.watchdog import Watchdog
from pkd_dist.errors import DivergedError, LostRank, Preempted, UserError
from pkd_dist.telemetry.log import log, log_file

T = TypeVar("T")
_COLLECTIVE_TIMEOUT = timedelta(days=1)
"""Waiting is the watchdog's to end: it knows whether the others still work."""
_BOARD_SECONDS, _LAST_WORDS_SECONDS = 5.0, 2.5
_GOES_ON = "; the same command goes on from what is committed"
_LOST = re.compile(
    r"closed by (the )?peer|reset by peer|Broken pipe|Connection (closed|reset|refused)|[Tt]imed out|gloo|NCCL", re.I
)


class World:
    """The ranks of a run and what they do together. What is not collective says so.

    Args:
        ranks: this process's place.
        timeout_seconds: how long this rank waits for others that do not move.
        signals: noted since the process began; None: no signal is listened to.

    Raises:
        UserError: the meeting place is taken by another program.
        LostRank: the ranks did not meet in time.
    """

    def __init__(self, ranks: Ranks, timeout_seconds: float = 600.0, signals: StopSignals | None = None):
        self._position, self._last_words = "start", False
        self.rank, self.size, self.local_rank = ranks.rank, ranks.world_size, ranks.local_rank
        self.launcher, self.local_size = ranks.launcher, ranks.local_world_size
        if torch.cuda.is_available():
            self.device = torch.device("cuda", ranks.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
            torch.backends.cuda.enable_cudnn_sdp(False)  # it compiles for every shape, and text has many
        else:
            self.device = torch.device("cpu")
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        ranks.export()  # DeepSpeed reads these even where the group exists already
        self.signals = signals or StopSignals()
        self._watchdog = self._meet(timeout_seconds)
        # Objects and small host-side values always travel over gloo, so that they never wait for a GPU stream.
        self._host = torch_dist.new_group(backend="gloo", timeout=_COLLECTIVE_TIMEOUT)
        cores = tuple(sorted(os.sched_getaffinity(0)))
        places = self.gather((socket.gethostname(), cores))
        self.signals.met()
        self._hosts = [host for host, _ in places]
        if self._watchdog:
            self._watchdog.hosts, self._watchdog.first_elsewhere = self._hosts, self.first_elsewhere
        if self.device.type == "cpu" and ("OMP_NUM_THREADS" not in os.environ or self.size > 1):
            torch.set_num_threads(max(1, len(cores) // places.count(places[self.rank])))

    def _meet(self, timeout_seconds: float) -> Watchdog | None:
        """Makes the process group, and starts the watchdog (None: there are no others to wait for)."""
        watchdog = None
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        backend = "cuda:nccl,cpu:gloo" if self.device.type == "cuda" else "gloo"
        meeting_timeout = timedelta(seconds=timeout_seconds)
        try:
            store, _, _ = next(torch_dist.rendezvous("env://", self.rank, self.size, timeout=meeting_timeout))
            if self.size > 1:
                noted = self.stop_signal
                watchdog = Watchdog(self.rank, self.size, _Board(), timeout_seconds, noted, self._end).start()
                watchdog.at(f"meeting the other ranks at {place}", True)
            store.set_timeout(meeting_timeout)
            torch_dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.size, timeout=_COLLECTIVE_TIMEOUT
            )
        except (torch_dist.DistStoreError, torch_dist.DistNetworkError) as error:
            if "EADDRINUSE" in str(error) or "already in use" in str(error):
                raise UserError(
                    f"MASTER_PORT: {place} is in use by another program; give another port (--master_port of the launcher)"
                ) from error
            raise LostRank(
                f"the {self.size} ranks did not meet at {place} within {timeout_seconds:g} s (run.timeout_seconds); are all "
                "of them started, and is that address reachable from every host?"
            ) from error
        return watchdog

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def one_host(self) -> bool:
        return len(set(self._hosts)) == 1

    @property
    def node_main(self) -> bool:
        return self.local_rank == 0

    # where this rank is, and whether to go on

    def at(self, position: str, loop: bool = True) -> None:
        """Says where this rank is, for the messages of a watchdog. Not collective.

        Args:
            loop: in a loop whose every turn says so, as training does.
        """
        self._position = position
        if self._watchdog:
            self._watchdog.at(position, not loop or self.device.type == "cpu")

    def beat(self) -> None:
        """This rank moves. Not collective."""
        if self._watchdog:
            self._watchdog.beat()

    def stop_signal(self) -> int:
        """The stop signal that this rank has got, 0 for none. Not collective: ranks must agree before they act on it."""
        return self.signals.number

    def stopping(self) -> bool:
        """Whether any rank has got a stop signal, as far as this one knows; a beat. Not collective."""
        self.beat()
        return bool(self.signals.number or (self._watchdog and self._watchdog.peer_stop_signal))

    def stop_here(self, what: str) -> None:
        """Raises Preempted on every rank where any has got a stop signal: a safe point where nothing is left to commit."""
        if self.sum(np.array([self.signals.number]))[0]:
            raise _stopped(what, max(self.gather(self.signals.number)))

    def interrupt(self, what: str) -> None:
        """For long work inside `on_main`, which hands the exception on: raises Preempted where this rank is to stop."""
        if self.stopping():
            raise _stopped(what, self.signals.number or (self._watchdog.peer_stop_signal if self._watchdog else 0))

    # collectives

    def barrier(self) -> None:
        with self._collective():
            torch_dist.barrier(group=self._host)

    @contextmanager
    def _collective(self) -> Iterator[None]:
        self.beat()
        yield
        self.beat()

    def broadcast(self, value: T, source: int = 0) -> T:
        """`value` of the source rank, on every rank."""
        box = [value]
        with self._collective():
            torch_dist.broadcast_object_list(box, src=source, group=self._host)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in rank order, on every rank."""
        out: list[Any] = [None] * self.size
        with self._collective():
            torch_dist.all_gather_object(out, value, group=self._host)
        return out

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0 and returns its value on every rank; an exception is raised on every rank."""
        outcome: tuple[T | None, Exception | None] = (None, None)
        if self.main:
            try:
                outcome = (work(), None)
            except Exception as error:  # handed on to every rank below
                outcome = (None, _portable(error))
        value, failure = self.broadcast(outcome)
        if failure is not None:
            raise _shared(failure)
        return value  # type: ignore[return-value]

    def together(self, work: Callable[[], T]) -> T:
        """Runs `work` on every rank and returns its own value; if one fails, every rank raises the first one's exception."""
        mine: Exception | None = None
        value: T | None = None
        try:
            value = work()
        except Exception as error:
            mine = _portable(error)
        for failure in self.gather(mine):
            if failure is not None:
                raise _shared(failure)
        return value  # type: ignore[return-value]

    def everywhere(self, work: Callable[[], T]) -> list[T]:
        """Like `together`, and returns every rank's value, in rank order, on every rank."""
        return self.gather(self.together(work))

    def sum(self, values: np.ndarray) -> np.ndarray:
        """Elementwise sum over ranks of a small float64 array."""
        total = np.array(values, dtype=np.float64)
        if self.size > 1:
            with self._collective():
                torch_dist.all_reduce(torch.from_numpy(total), group=self._host)
        return total

    def gather_rows(self, rows: np.ndarray, positions: np.ndarray, total: int) -> np.ndarray:
        """Puts every rank's rows at their positions in one array of `total` rows, on every rank.

        Args:
            rows: (n_rank, ...) of this rank.
            positions: (n_rank,) where they belong; over all ranks each of 0..total-1 exactly once.
        """
        out = np.empty((total, *rows.shape[1:]), dtype=rows.dtype)
        seen = np.zeros(total, dtype=bool)
        for part, where in self.gather((rows, positions)):
            assert not seen[where].any(), "an example was scored twice"
            out[where], seen[where] = part, True
        assert seen.all(), "an example was not scored"
        return out

    # the end

    def close(self) -> None:
        """After a good end. (After another one the process just ends: NCCL would wait for ranks that are gone.)"""
        if self._watchdog:
            self._watchdog.stop()
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()

    def agree_on_end(self, error: Exception) -> tuple[str | None, int]:
        """After an exception on this rank: what the user is to read, and the exit status, the same on all ranks.

        An exception that all ranks raise is told by rank 0. One that a single rank raises makes the others lose it; the
        first to claim the word on the board has it.

        Returns:
            The message (None where another rank speaks) and the status.
        """
        status = getattr(error, "exit_status", 1)
        if self.size == 1 or isinstance(error, (DivergedError, Preempted)) or getattr(error, "shared", False):
            return (self._told(error) if self.main else None), status
        board = _Board()
        try:
            board.post(f"left/{self.rank}", "")
            gone = self._gone(board) if isinstance(error, LostRank) else []
            first = board.claim("spoken")
            if first:
                board.post("status", str(status))
            status = int(board.read(["status"]).get("status", status))
        except ConnectionRefusedError:  # rank 0, where the ranks meet, is gone
            return self._about_rank_0(1), 1
        except Exception:  # ... and its host with it
            return self._about_rank_0(self.first_elsewhere), 1
        self._last_words = self.main
        if not first:
            return None, status
        if not isinstance(error, LostRank):
            return self._told(error), status
        named = [f"rank {rank} ({self._hosts[rank]})" for rank in gone]
        more = f" and {len(gone) - 4} more" if len(gone) > 4 else ""
        blame = (
            f"{', '.join(named[:4])}{more} was lost" if gone else f"the ranks lost each other ({_first_line(error)})"
        )
        return f"{self._position}: {blame}{_GOES_ON}", status

    def linger(self) -> None:
        """After the last message: where the board goes with this process, the others first read there that all is said."""
        if self._last_words:
            time.sleep(_LAST_WORDS_SECONDS)

    @property
    def first_elsewhere(self) -> int:
        """The first rank that is not on rank 0's host; 1 where all are."""
        return next((rank for rank, host in enumerate(self._hosts) if host != self._hosts[0]), 1)

    def _about_rank_0(self, speaker: int) -> str | None:
        if self.rank != speaker or (self._watchdog and self._watchdog.spoken):
            return None
        return f"{self._position}: rank 0 ({self._hosts[0]}) was lost{_GOES_ON}"

    def _gone(self, board: _Board) -> list[int]:
        """The ranks that neither say that they leave nor give a sign of life any more."""
        keys = [f"{what}/{rank}" for what in ("left", "life") for rank in range(self.size)]
        before = board.read(keys)
        time.sleep(_LAST_WORDS_SECONDS)
        after = board.read(keys)
        return [
            rank
            for rank in range(self.size)
            if f"left/{rank}" not in after and before.get(f"life/{rank}") == after.get(f"life/{rank}")
        ]

    def _told(self, error: Exception) -> str:
        if hasattr(error, "exit_status"):
            return str(error)
        what = (
            f"{self._position}: a defect of pkd_dist on rank {self.rank}: {type(error).__name__}: {_first_line(error)}"
        )
        if log_file():
            return f"{what}; the traceback is in {log_file()}"
        traceback.print_exception(error)
        return what

    @staticmethod
    def _end(message: str | None) -> None:
        """The watchdog's: the main thread cannot be reached any more."""
        if message:
            print(f"pkd: {message}", file=sys.stderr, flush=True)
        os._exit(LostRank.exit_status)


class _Board:
    """What ranks tell each other outside of collectives: keys in the launcher's TCP store, over connections of its own."""

    def __init__(self) -> None:
        self._store: Any = None
        self._known: set[str] = set()

    def _connected(self) -> Any:
        if self._store is None:
            place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            socket.create_connection(place, _BOARD_SECONDS).close()  # torch would tell the terminal of a failure
            client = torch_dist.TCPStore(
                *place, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_BOARD_SECONDS)
            )  # fmt: skip
            self._store = torch_dist.PrefixStore(f"pkd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", client)
        return self._store

    def post(self, key: str, value: str) -> None:
        self._connected().set(key, value)

    def claim(self, key: str) -> bool:
        """Whether this is the first to claim it."""
        return bool(self._connected().add(key, 1) == 1)

    def read(self, keys: list[str]) -> dict[str, str]:
        """The keys that are there. One message for all that were there before."""
        store = self._connected()
        self._known.update(key for key in keys if key not in self._known and store.check([key]))
        there = [key for key in keys if key in self._known]
        values = store.multi_get(there) if there else []
        return {key: value.decode() for key, value in zip(there, values, strict=True)}


def _stopped(what: str, number: int) -> Preempted:
    return Preempted(f"{what}: stopped by {name_of(number)}{_GOES_ON}", number)


def _portable(error: Exception) -> Exception:
    """An exception as it can travel: itself, or what it says where it cannot be pickled."""
    log.debug("handed on to the other ranks", exc_info=error)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _shared(error: Exception) -> Exception:
    """Marks an exception that every rank raises."""
    error.shared = True  # type: ignore[attr-defined]
    return error


def is_lost(error: Exception) -> bool:
    """Whether an exception of this rank alone says that another rank cannot be reached."""
    if getattr(error, "shared", False):
        return False
    if isinstance(error, (torch_dist.DistNetworkError, torch_dist.DistBackendError, torch_dist.DistStoreError)):
        return True
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
