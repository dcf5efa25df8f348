"""`pkd serve`: uvicorn around the application, until a signal; what is in the works is answered first."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from pkd_dist.errors import UserError
from pkd_dist.serve.app import Limits, make_app
from pkd_dist.serve.model import ServedModel
from pkd_dist.telemetry.log import log

GRACE_SECONDS = 30
"""After a signal, requests in the works have so long to end."""


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal again at the end, and the status would be the signal's."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def bound(host: str, port: int) -> socket.socket:
    """A socket of the address, not listening yet.

    Raises:
        UserError: there is no such address here, or it is taken.
    """
    if not host:
        raise UserError("--host: is empty; give 127.0.0.1 for this machine alone, or 0.0.0.0 for all that reach it")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.socket(family)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        return made
    except socket.gaierror as error:
        raise UserError(
            f"--host: {host} is not known here ({error.strerror}); give a name or address of this machine"
        ) from None
    except OSError as error:
        raise UserError(
            f"--port: {host}:{port} cannot be listened on ({error.strerror}); choose another, or 0"
        ) from None


def serve(
    folder: Path, host: str, port: int, limits: Limits, format: str | None = None, threads: int | None = None
) -> None:
    """Verifies an export and serves it until SIGTERM or SIGINT.

    Args:
        port: 0: any that is free; it is said which.

    Raises:
        UserError: the export is damaged, or the port is taken.
    """
    with bound(host, port) as listening:
        app = make_app(ServedModel(folder, format, threads), limits)
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, http="h11", ws="none", lifespan="on",
            timeout_graceful_shutdown=GRACE_SECONDS, timeout_keep_alive=30, server_header=False,
        )  # fmt: skip
        listening.listen(config.backlog)  # who reads the line may connect
        log.info("serving %s on http://%s:%d/predict", folder, *listening.getsockname()[:2])
        _Server(config).run(sockets=[listening])
    log.info("serve: stopped; what was in the works is answered")
