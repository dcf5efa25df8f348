"""A bound on the connections of `pkd serve`, so that idle clients cannot use up its file descriptors."""

from __future__ import annotations

import asyncio
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol

BACKLOG = 64
"""Connections that wait to be accepted; asyncio accepts all of them before the server sees the first."""
_RESERVED = 64
"""File descriptors for everything else: the model, the log, the event loop."""
_MOST = 1024


def limit() -> int:
    """Return the number of connections for which this process has file descriptors, at most 1024."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return max(1, min(_MOST, (_MOST if allowed == resource.RLIM_INFINITY else allowed) - BACKLOG - _RESERVED))


def bounded(most: int) -> type[H11Protocol]:
    """Return uvicorn's protocol with at most this many connections.

    A new connection closes the oldest one without a request in progress; if there is none, it is closed itself.
    """
    opened: dict[H11Protocol, None] = {}  # in the order of their arrival

    class Bounded(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(opened) >= most:
                idle = next((other for other in opened if other.cycle is None or other.cycle.response_complete), self)
                opened.pop(idle, None)
                idle.transport.abort()
                if idle is self:
                    return
            opened[self] = None

        def connection_lost(self, exc: Exception | None) -> None:
            opened.pop(self, None)
            super().connection_lost(exc)

    return Bounded
