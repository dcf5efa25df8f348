"""Messages between ranks outside of collectives: keys in the launcher's TCP store, over connections of their own.

The watchdog and the last messages of a run use it, when a collective could hang.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as torch_dist

_TIMEOUT_SECONDS = 5.0

STOP = "stop"
"""A stop signal that some rank has received."""
REPORTED = "reported"
"""Claimed by the rank that reports why the run ends."""
STATUS = "status"
"""The exit status of the run."""
RANKS = "ranks"
"""The processes of the ranks that have started, a line each (`processes.Roll`)."""


def life_of(rank: int) -> str:
    """Key of the posts in which a rank's watchdog shows that it is alive."""
    return f"life/{rank}"


def left_by(rank: int) -> str:
    """Key that a rank sets before it ends."""
    return f"left/{rank}"


class Board:
    """Keys and values that all ranks share. Every method raises or returns within seconds."""

    def __init__(self) -> None:
        self._store: torch_dist.Store | None = None
        self._known: set[str] = set()

    def _connect(self) -> torch_dist.Store:
        if self._store is None:
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            socket.create_connection((host, port), _TIMEOUT_SECONDS).close()  # torch prints a warning if this fails
            timeout = timedelta(seconds=_TIMEOUT_SECONDS)
            client = torch_dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
            self._store = torch_dist.PrefixStore(f"pkd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", client)
        return self._store

    def post(self, key: str, value: str) -> None:
        self._connect().set(key, value)

    def append(self, key: str, value: str) -> None:
        self._connect().append(key, value)  # type: ignore[attr-defined]  # missing in torch's stubs

    def claim(self, key: str) -> bool:
        """Return whether this is the first claim of the key, over all ranks."""
        return bool(self._connect().add(key, 1) == 1)

    def read(self, keys: Sequence[str]) -> dict[str, str]:
        """Return the values of the keys that exist. Keys seen before are read in a single request."""
        store = self._connect()
        self._known.update(key for key in keys if key not in self._known and store.check([key]))
        existing = [key for key in keys if key in self._known]
        values = store.multi_get(existing) if existing else []
        return {key: value.decode() for key, value in zip(existing, values, strict=True)}
