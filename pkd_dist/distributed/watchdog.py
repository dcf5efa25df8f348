"""Ends a rank that would wait for ever, and says which other rank is to blame.

Each rank posts a sign of life on a board (the launcher's TCP store) from a thread of its own: where its main thread is, and
for how long it has not moved. A rank whose own main thread has not moved for `timeout_seconds` looks at the others' posts.
While any of them moves it goes on waiting: rank 0 may be reading a large file. When none does, it ends the process, and the
lowest rank that still answers says what happened.

Moving means a beat (a step, a batch, a collective entered or left), or computing outside of a collective: more than `_BUSY`
of a core. In a loop on a GPU computing does not count, because waiting for NCCL looks the same.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

from pkd_dist.telemetry.log import log

_BUSY = 0.05
_WAITING_IN = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}comm{os.sep}")
_SPEAKER_FIRST_SECONDS = 2.0


Seen = tuple[dict[str, Any], float]
"""A rank's last post, and when it was new."""


class Board(Protocol):
    """What ranks tell each other outside of collectives. Every method raises, or returns within seconds."""

    def post(self, key: str, value: str) -> None: ...
    def read(self, keys: list[str]) -> dict[str, str]: ...


class Watchdog:
    """Watches one rank's main thread.

    Args:
        rank, size: of the run.
        board: see `Board`.
        timeout_seconds: for how long nothing may move.
        stop_signal: -> this rank's stop signal, 0 where none has come; posted for the others.
        end: (message) -> ends the process; not expected to return.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        board: Board,
        timeout_seconds: float,
        stop_signal: Callable[[], int],
        end: Callable[[str | None], None],
    ):
        self._rank, self._size, self._board, self._timeout = rank, size, board, timeout_seconds
        self._stop_signal, self._end = stop_signal, end
        self._interval = min(1.0, timeout_seconds / 10)
        self._main = threading.main_thread().ident
        self._beats, self._position, self._computing_counts = 0, "start", True
        self._idle = 0.0
        self._seen: dict[int, Seen] = {}
        self._reached = time.monotonic()
        self.peer_stop_signal = 0
        self.spoken = False
        self.hosts: list[str] = []
        self.first_elsewhere = 1
        self._over = threading.Event()

    def start(self) -> Watchdog:
        for work in (self._watch, self._exchange):
            threading.Thread(target=work, name=f"watchdog {work.__name__}", daemon=True).start()
        return self

    def stop(self) -> None:
        self._over.set()

    def beat(self) -> None:
        """The main thread moves."""
        self._beats += 1

    def at(self, position: str, computing_counts: bool) -> None:
        """Says where the main thread is; a beat."""
        self._position, self._computing_counts = position, computing_counts
        self._beats += 1

    @property
    def position(self) -> str:
        return self._position

    # one thread: time

    def _watch(self) -> None:
        beats, computed, moved = -1, time.process_time(), time.monotonic()
        while not self._over.wait(self._interval):
            now, spent = time.monotonic(), time.process_time()
            computing = spent - computed > _BUSY * self._interval and self._computing_counts
            if self._beats != beats or (computing and not self._where()[1]):  # gloo, too, may spin
                moved = now
            beats, computed = self._beats, spent
            self._idle = now - moved
            if self._idle > self._timeout:
                self._judge(now)

    def _judge(self, now: float) -> None:
        """Ends the process unless another rank moves."""
        where, waiting = self._where()
        found = verdict(
            self._rank, self._size, self._seen, self._reached, now, self._timeout, where, waiting, self.first_elsewhere
        )  # fmt: skip
        if found is None:
            return
        blame, speaks = found
        blame = re.sub(r"\brank (\d+)", self._with_host, blame)
        message = (
            f"{self._position}: nothing has moved for {self._timeout:g} s (run.timeout_seconds); {blame}; "
            "the same command goes on from what is committed"
        )
        log.debug("%s\nthis rank's main thread:\n%s", message, self._stack())
        if not speaks:
            time.sleep(_SPEAKER_FIRST_SECONDS)  # a launcher ends the others as soon as one has ended
        self._end(message if speaks else None)

    def _with_host(self, rank: re.Match[str]) -> str:
        return f"{rank[0]} ({self.hosts[int(rank[1])]})" if self.hosts else rank[0]

    def _where(self) -> tuple[str, bool]:
        """Where the main thread is, in words, and whether it waits for other ranks there."""
        frame = sys._current_frames().get(self._main or 0)
        own, waiting = "", False
        while frame is not None:
            file = frame.f_code.co_filename
            waiting = waiting or (not own and any(part in file for part in _WAITING_IN))
            if not own and f"{os.sep}pkd_dist{os.sep}" in file and not file.endswith("world.py"):
                own = f"{os.path.basename(file)}, line {frame.f_lineno} ({frame.f_code.co_name})"
            frame = frame.f_back
        return own or "code that is not ours", waiting

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._main or 0)
        return "".join(traceback.format_stack(frame)) if frame else ""

    # another thread: the board, whose calls may take their time

    def _exchange(self) -> None:
        count, asked = 0, float("-inf")
        while not self._over.wait(self._interval):
            count += 1
            post: dict[str, Any] = {"count": count, "idle": self._idle, "at": self._position}
            if self._idle > self._timeout / 2:
                post["where"], post["waiting"] = self._where()
            try:
                self._board.post(f"life/{self._rank}", json.dumps(post))
                if self._stop_signal():
                    self._board.post("stop", str(self._stop_signal()))
                keys = ["stop", "spoken"]
                # every so often: many ranks that read of each other all the time keep the board busy
                if self._idle > self._timeout / 4 and time.monotonic() - asked > self._timeout / 20:
                    asked = time.monotonic()
                    keys += [f"life/{rank}" for rank in range(self._size) if rank != self._rank]
                found = self._board.read(keys)
            except Exception as error:
                log.debug("the board cannot be reached: %s", error)
                continue
            now = self._reached = time.monotonic()
            self.peer_stop_signal = int(found.pop("stop", 0))
            self.spoken = found.pop("spoken", None) is not None
            for key, value in found.items():
                rank, new = int(key.partition("/")[2]), {"where": "", "waiting": True} | json.loads(value)
                if rank not in self._seen or self._seen[rank][0]["count"] != new["count"]:
                    self._seen[rank] = new, now


def verdict(
    rank: int,
    size: int,
    seen: dict[int, Seen],
    reached: float,
    now: float,
    timeout: float,
    where: str,
    waiting: bool,
    first_elsewhere: int = 1,
) -> tuple[str, bool] | None:
    """What a rank concludes that has not moved for `timeout` seconds.

    Args:
        seen: of the other ranks.
        reached: when the board was last reached.
        where, waiting: where this rank's main thread is, and whether that is a collective.
        first_elsewhere: the first rank that is not on rank 0's host; it speaks where rank 0 cannot be reached.

    Returns:
        Who is to blame, and whether this rank is the one to say so; None: another rank moves, so wait.
    """
    patience = timeout / 2
    cut_off = now - reached > patience
    if cut_off and rank:
        return "rank 0, where the ranks meet, does not answer", rank == first_elsewhere
    silent, stuck = [], []
    for other in (other for other in range(size) if other != rank):
        post, new = seen.get(other, ({"at": "start"}, float("-inf")))
        if now - new > patience:
            silent.append(other)
        elif post["idle"] < timeout:
            return None
        elif not post["waiting"]:
            stuck.append((other, post["where"]))
    if not waiting:
        stuck.append((rank, where))
    speaks = rank == min(other for other in range(size) if other not in silent)
    if silent:
        last = seen[silent[0]][0]["at"] if silent[0] in seen else "start"
        return f"{_ranks(silent)} not answer (last seen at: {last})", speaks
    if len(stuck) == size > 1:  # waiting for a GPU's collective looks like this too: the odd one out is to blame
        places = Counter(place for _, place in stuck)
        stuck = [one for one in stuck if places[one[1]] == 1] if len(places) == 2 and size > 2 else []
    if stuck:
        return "rank {} hangs in {}".format(*min(stuck)), speaks
    return "all ranks wait for each other", speaks


def _ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]} does" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:8]))} do"
