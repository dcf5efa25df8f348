"""`pkd serve`: run uvicorn around the application until a signal; requests in progress are answered first."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from pkd_dist.errors import UserError
from pkd_dist.network import host_and_port
from pkd_dist.serve import connections
from pkd_dist.serve.app import make_app
from pkd_dist.serve.model import ServedModel
from pkd_dist.serve.requests import Limits
from pkd_dist.telemetry.log import log

GRACE_SECONDS = 30
"""Time that requests in progress have to finish after a signal."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals without raising them again at the end, as uvicorn does: the exit status would not be 0."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address but does not listen yet.

    Raises:
        UserError: This machine has no such address, or the port is in use.
    """
    if not host:
        raise UserError("--host: is empty; give 127.0.0.1 for this machine alone, or 0.0.0.0 for all interfaces")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        return made
    except socket.gaierror as error:
        raise UserError(
            f"--host: {host} cannot be resolved ({error.strerror}); give a name or address of this machine"
        ) from None
    except OSError as error:
        raise UserError(f"--port: cannot listen on {host}:{port} ({error.strerror}); choose another, or 0") from None


def serve(
    folder: Path, host: str, port: int, limits: Limits, format: str | None = None, threads: int | None = None
) -> None:
    """Verify an export and serve it until SIGTERM or SIGINT.

    Args:
        folder: The export.
        host: Address to listen on.
        port: Port to listen on; 0: any free one, which is printed.
        limits: Limits of requests.
        format: See `ServedModel`.
        threads: See `ServedModel`.

    Raises:
        UserError: The export is damaged, or the address cannot be used.
    """
    with bound(host, port) as listening:
        app = make_app(ServedModel(folder, format, threads), limits)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, http=connections.bounded(connections.limit()), ws="none",
            lifespan="on", backlog=connections.BACKLOG,
            timeout_graceful_shutdown=GRACE_SECONDS, timeout_keep_alive=30, server_header=False,
        )  # fmt: skip
        listening.listen(config.backlog)  # before the line below: a script connects as soon as it reads it
        log.info("serving %s on http://%s/predict", folder, host_and_port(*listening.getsockname()[:2]))
        _Server(config).run(sockets=[listening])
    cut_off = app.state.service.cut_off
    log.info(
        "serve: stopped; %s", f"{cut_off} request(s) were cut off" if cut_off else "all accepted requests were answered"
    )
