"""Tells which ranks have come to the board, and which of those on this host are dead.

A killed process cannot say goodbye, and before the ranks are connected nothing else tells the others. Its process ID can be
looked up by the ranks that share its host; those on other hosts learn of it when their peers end.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path

from pkd_dist.distributed.board import RANKS, Board


@dataclass(frozen=True)
class RankProcess:
    """The process of a rank.

    Attributes:
        machine: names the host, its boot and the namespace of the process IDs; empty if unknown.
        started: its start in clock ticks since boot: tells it from a later process with the same ID.
    """

    rank: int
    pid: int
    started: str
    machine: str

    @classmethod
    def of(cls, rank: int, pid: int) -> RankProcess:
        """Return a process of this machine."""
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            machine = f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
            return cls(rank, pid, _state_and_start(pid)[1], machine)
        except (OSError, IndexError):
            return cls(rank, pid, "", "")

    @property
    def dead(self) -> bool:
        """Whether it has ended. For a process on this machine only."""
        try:
            state, started = _state_and_start(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return True
        except (OSError, IndexError):
            return False
        return state in "ZX" or started != self.started


class Roll:
    """The ranks that have signed in on the board."""

    def __init__(self, rank: int, size: int, board: Board):
        self._own, self._size, self._board = RankProcess.of(rank, os.getpid()), size, board
        self._signed = False
        self._found: list[RankProcess] = []

    def call(self) -> None:
        """Sign in, and read who else has, until all have. Raises what the board raises."""
        if not self._signed:
            own = self._own
            self._board.append(RANKS, f"{own.rank} {own.pid} {own.started or '-'} {own.machine or '-'}\n")
            self._signed = True
        if self.missing():
            lines = self._board.read([RANKS]).get(RANKS, "").splitlines()
            self._found = [_parse(line) for line in lines]

    def missing(self) -> list[int]:
        """Return the ranks that have not signed in."""
        return sorted(set(range(self._size)) - {process.rank for process in self._found})

    def dead(self) -> list[int]:
        """Return the other ranks on this machine whose processes have ended."""
        return [process.rank for process in self._neighbours() if process.dead]

    def first_alive(self) -> bool:
        """Return whether this is the lowest living rank on this machine."""
        return all(process.dead for process in self._neighbours() if process.rank < self._own.rank)

    def _neighbours(self) -> list[RankProcess]:
        own = self._own
        return [p for p in self._found if p.machine == own.machine and p.machine and p.rank != own.rank]


def _parse(line: str) -> RankProcess:
    rank, pid, started, machine = line.split(" ", 3)
    return RankProcess(int(rank), int(pid), started.strip("-"), machine.strip("-"))


def _state_and_start(pid: int) -> tuple[str, str]:
    """Return the state letter and the start time of /proc/PID/stat; the name before them may contain anything."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], fields[19]
