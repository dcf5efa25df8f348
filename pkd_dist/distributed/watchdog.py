"""Ends a rank that would otherwise wait forever, and reports which rank is to blame.

A thread of each rank posts on the board where the main thread is and how long it has been idle. A rank whose main thread has
been idle for `timeout_seconds` reads the posts of the others. While any of them makes progress it keeps waiting: rank 0 may
be reading a large file. Otherwise it ends its process, and the lowest rank that still responds reports the reason.

A rank that was killed is found sooner. Where its connections are open, they close. Before, while the ranks meet and while
DeepSpeed starts, the ranks on its host see that its process is gone (`processes.Roll`).

Progress is a beat (a step, a batch, a collective entered or left) or computation outside of a collective: more than `_BUSY`
of a core. In a loop on a GPU computation does not count, because waiting for NCCL looks the same.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from pkd_dist.distributed.board import REPORTED, STOP, Board, left_by, life_of
from pkd_dist.distributed.processes import Roll
from pkd_dist.telemetry.log import log

_BUSY = 0.05
_WAITING_IN = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}comm{os.sep}")
_REPORTER_FIRST_SECONDS = 2.0
_DEAD_SECONDS = 3.0
"""Time without progress after another rank has died: a closed connection tells the main thread sooner, and it reports better."""
LATE_SECONDS = 5.0
"""Ranks that have not started after this time are named."""


@dataclass(frozen=True)
class Post:
    """What a rank posts about its main thread.

    Attributes:
        count: of posts so far; a new count is a sign of life.
        idle_seconds: time without progress.
        position: what the rank is doing, as given to `Watchdog.at`.
        location: file, line and function; empty while the rank is not idle.
        waiting: whether that is a collective.
    """

    count: int
    idle_seconds: float
    position: str
    location: str = ""
    waiting: bool = True


@dataclass(frozen=True)
class View:
    """What a rank knows when it decides who is to blame.

    Attributes:
        rank, size: this rank and the number of ranks.
        location, waiting: where this rank's main thread is, and whether that is a collective.
        posts: the last post of each other rank heard of, and when it was new (monotonic seconds).
        board_seconds: when the board was last reached (monotonic seconds).
        hosts: the host of each rank; empty until the ranks have met.
    """

    rank: int
    size: int
    location: str
    waiting: bool
    posts: Mapping[int, tuple[Post, float]]
    board_seconds: float
    hosts: Sequence[str] = ()

    def name(self, rank: int) -> str:
        return f"rank {rank} ({self.hosts[rank]})" if self.hosts else f"rank {rank}"


@dataclass(frozen=True)
class Verdict:
    """Why nothing moves, and whether this rank is the one to report it."""

    reason: str
    reports: bool


class Watchdog:
    """Watches the main thread of a rank.

    Args:
        rank, size: this rank and the number of ranks.
        board: shared with the other ranks.
        timeout_seconds: longest time without progress.
        stop_signal: returns this rank's stop signal, 0 if none; posted for the others.
        end: ends the process with a message, or without one if another rank reports; not expected to return.

    Attributes:
        peer_stop_signal: a stop signal that any rank has posted, 0 if none.
        reported: whether a rank has reported why the run ends.
        hosts: the host of each rank; set once the ranks have met.
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
        self._main_thread = threading.main_thread().ident
        self._beats, self._position, self._computing_counts = 0, "start", True
        self._idle_seconds = 0.0
        self._posts: dict[int, tuple[Post, float]] = {}
        self._board_seconds = time.monotonic()
        self.peer_stop_signal = 0
        self.reported = False
        self.hosts: Sequence[str] = ()
        self._over = threading.Event()
        self._roll = Roll(rank, size, board)
        self._named_late = False
        self._death: tuple[list[int], int, float] = [], 0, 0.0  # dead ranks, beats, since when (monotonic seconds)

    def start(self) -> Watchdog:
        for work in (self._watch, self._exchange):
            threading.Thread(target=work, name=f"watchdog {work.__name__}", daemon=True).start()
        return self

    def stop(self) -> None:
        self._over.set()

    def beat(self) -> None:
        """Note progress of the main thread."""
        self._beats += 1

    def at(self, position: str, computing_counts: bool) -> None:
        """Note what the main thread does next, and whether computation counts as progress; a beat."""
        self._position, self._computing_counts = position, computing_counts
        self._beats += 1

    # The first thread measures how long the main thread has been idle.

    def _watch(self) -> None:
        beats, computed, moved = -1, time.process_time(), time.monotonic()
        while not self._over.wait(self._interval):
            now, spent = time.monotonic(), time.process_time()
            computing = spent - computed > _BUSY * self._interval and self._computing_counts
            if self._beats != beats or (computing and not self._locate()[1]):  # gloo may spin while it waits
                moved = now
            beats, computed = self._beats, spent
            self._idle_seconds = now - moved
            if self._idle_seconds > self._timeout:
                self._judge(now)

    def _judge(self, now: float) -> None:
        """End the process unless another rank makes progress."""
        location, waiting = self._locate()
        view = View(self._rank, self._size, location, waiting, dict(self._posts), self._board_seconds, self.hosts)
        found = verdict(view, now, self._timeout)
        if found is None:
            return
        message = (
            f"{self._position}: no progress for {self._timeout:g} s (run.timeout_seconds): {found.reason}; "
            "rerun the same command to resume"
        )
        log.debug("%s\nthis rank's main thread:\n%s", message, self._stack())
        if not found.reports:
            time.sleep(_REPORTER_FIRST_SECONDS)  # a launcher ends all ranks as soon as one has ended
        self._end(message if found.reports else None)

    def _locate(self) -> tuple[str, bool]:
        """Return where in this package the main thread is, and whether it waits for other ranks there."""
        frame = sys._current_frames().get(self._main_thread or 0)
        location, waiting = "", False
        while frame is not None and not location:
            file = frame.f_code.co_filename
            waiting = waiting or any(part in file for part in _WAITING_IN)
            if f"{os.sep}pkd_dist{os.sep}" in file and not file.endswith("world.py"):
                location = f"{os.path.basename(file)}, line {frame.f_lineno} ({frame.f_code.co_name})"
            frame = frame.f_back
        return location or "code outside of pkd_dist", waiting

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._main_thread or 0)
        return "".join(traceback.format_stack(frame)) if frame else ""

    # The second thread uses the board, whose calls may take seconds.

    def _exchange(self) -> None:
        count, asked, began = 0, float("-inf"), time.monotonic()
        while not self._over.wait(self._interval):
            count += 1
            self._look_for_dead(time.monotonic())
            where = self._locate() if self._idle_seconds > self._timeout / 2 else ("", True)
            post = Post(count, self._idle_seconds, self._position, *where)
            peers: dict[str, int] = {}
            # Only an idle rank reads the others' posts, and rarely: many ranks that do so would overload the store.
            if self._idle_seconds > self._timeout / 4 and time.monotonic() - asked > self._timeout / 20:
                asked = time.monotonic()
                peers = {life_of(rank): rank for rank in range(self._size) if rank != self._rank}
            try:
                self._board.post(life_of(self._rank), json.dumps(asdict(post)))
                if self._stop_signal():
                    self._board.post(STOP, str(self._stop_signal()))
                self._roll.call()
                found = self._board.read([STOP, REPORTED, *peers])
            except Exception as error:
                log.debug("the board cannot be reached: %s", error)
                continue
            now = self._board_seconds = time.monotonic()
            self._name_late(now - began)
            self.peer_stop_signal = int(found.get(STOP, 0))
            self.reported = REPORTED in found
            for key, rank in peers.items():
                if key not in found:
                    continue
                new = Post(**json.loads(found[key]))
                if rank not in self._posts or self._posts[rank][0].count != new.count:
                    self._posts[rank] = new, now

    def _name_late(self, seconds: float) -> None:
        """Say once which ranks the others wait for; rank 0 alone prints it."""
        late = self._roll.missing()
        if late and seconds > LATE_SECONDS and not self._named_late:
            self._named_late = True
            log.info("%s: waiting for %s to start", self._position, _ranks(late))

    def _look_for_dead(self, now: float) -> None:
        """End the process where the main thread waits for ranks of which one has died on this host."""
        dead = self._roll.dead()
        if not dead or not self._locate()[1] or (dead, self._beats) != self._death[:2]:
            self._death = dead, self._beats, now
        elif now - self._death[2] > _DEAD_SECONDS:
            self._end(self.last_words())

    def last_words(self) -> str | None:
        """Return the message about lost ranks; None if another rank reports, or has reported why it ends."""
        dead = self._roll.dead()
        try:
            if not self._board.claim(REPORTED):
                time.sleep(_REPORTER_FIRST_SECONDS)
                return None
            left = self._board.read([left_by(rank) for rank in dead])
            dead = [rank for rank in dead if left_by(rank) not in left] or dead
        except Exception:  # rank 0, which hosts the board, is lost
            dead = sorted({0, *dead})
            if not self._roll.first_alive():
                return None
        lost = f"{_ranks(dead)} {'was' if len(dead) == 1 else 'were'} lost" if dead else "the ranks lost each other"
        return f"{self._position}: {lost}; rerun the same command to resume"


def verdict(view: View, now: float, timeout_seconds: float) -> Verdict | None:
    """Decide why nothing moves, on a rank that has been idle for `timeout_seconds`.

    Args:
        now: monotonic seconds.

    Returns:
        None if another rank makes progress and this one has to wait.
    """
    patience = timeout_seconds / 2
    if now - view.board_seconds > patience and view.rank:
        reason = f"{view.name(0)}, which hosts the rendezvous, does not respond"
        return Verdict(reason, view.rank == first_remote_rank(view.hosts))
    silent, hanging = [], {}
    for other in (other for other in range(view.size) if other != view.rank):
        post, seen = view.posts.get(other, (None, float("-inf")))
        if post is None or now - seen > patience:
            silent.append(other)
        elif post.idle_seconds < timeout_seconds:
            return None
        elif not post.waiting:
            hanging[other] = post.location
    if not view.waiting:
        hanging[view.rank] = view.location
    reports = view.rank == min(set(range(view.size)) - set(silent))
    if silent:
        last = view.posts[silent[0]][0].position if silent[0] in view.posts else "start"
        return Verdict(f"{_name_silent(view, silent)} not respond (last seen at: {last})", reports)
    if len(hanging) == view.size > 1:
        # On a GPU, waiting for a collective looks like hanging: blame the one rank that is elsewhere.
        places = Counter(hanging.values())
        elsewhere = {rank: place for rank, place in hanging.items() if places[place] == 1}
        hanging = elsewhere if len(places) == 2 and view.size > 2 else {}
    if hanging:
        rank = min(hanging)
        return Verdict(f"{view.name(rank)} hangs in {hanging[rank]}", reports)
    return Verdict("all ranks wait for each other", reports)


def first_remote_rank(hosts: Sequence[str]) -> int:
    """Return the first rank on another host than rank 0, or 1 if there is none. It reports if rank 0 is unreachable."""
    return next((rank for rank, host in enumerate(hosts) if host != hosts[0]), 1)


def _name_silent(view: View, ranks: Sequence[int]) -> str:
    return f"{view.name(ranks[0])} does" if len(ranks) == 1 else f"{_ranks(ranks)} do"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks[:8]))}"
