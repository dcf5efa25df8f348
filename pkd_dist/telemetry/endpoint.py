"""The HTTP server of a run's metrics. Whoever asks, and however slowly, training does not wait.

What answers is prometheus_client's application. Around it stand: a bounded number of connections, of which the oldest gives
way to the next; a limit on how long each may be silent; answers that are made anew once a second at most; TLS, whose
handshakes are each connection's own affair; and passwords.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import hashlib
import hmac
import os
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer, choose_encoder

from pkd_dist.config.schema import Metrics
from pkd_dist.errors import UserError
from pkd_dist.telemetry.log import log

CONNECTIONS = 16
_SILENT_SECONDS = 5.0
_FRESH_SECONDS = 1.0
_PORTS_TRIED = 50


# ------------------------------------------------------------------------------------------------------- who may ask


@dataclass(frozen=True)
class Access:
    """How the endpoint is guarded.

    Attributes:
        tls: None: plain HTTP.
        logins: sha256 of each `user:password`; none: everybody may ask.
    """

    tls: ssl.SSLContext | None = None
    logins: tuple[bytes, ...] = ()

    def allows(self, authorization: str) -> bool:
        """Whether an Authorization header is of a known user; takes as long for a wrong one as for a right one."""
        if not self.logins:
            return True
        scheme, _, credentials = authorization.partition(" ")
        try:
            given = base64.b64decode(credentials.strip(), validate=True) if scheme.lower() == "basic" else b""
        except (binascii.Error, ValueError):
            given = b""
        digest = hashlib.sha256(given).digest()
        return sum(hmac.compare_digest(digest, login) for login in self.logins) > 0


def load_access(config: Metrics) -> Access:
    """Reads the files that the configuration names.

    Raises:
        UserError: a file cannot be read or used, may be read by every user of the host, or the key is not the certificate's.
    """
    tls = None
    if config.tls_cert and config.tls_key:
        tls = _tls(Path(config.tls_cert), Path(config.tls_key))
    return Access(tls, _logins(Path(config.password_file)) if config.password_file else ())


def _tls(certificate: Path, key: Path) -> ssl.SSLContext:
    _read_bytes(certificate, "metrics.tls_cert")
    _read_bytes(key, "metrics.tls_key", secret=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")  # never asks at the terminal
    except (ssl.SSLError, ValueError) as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise UserError(
                f"metrics.tls_key: {key} is not the key of metrics.tls_cert {certificate}; give the two of one certificate"
            ) from None
        raise UserError(
            f"metrics.tls_cert and metrics.tls_key: {certificate} and {key} cannot be used "
            f"({getattr(error, 'reason', None) or error}); give a certificate and its key in PEM, without a passphrase"
        ) from None
    return context


def _logins(file: Path) -> tuple[bytes, ...]:
    out = []
    for number, line in enumerate(_read_bytes(file, "metrics.password_file", secret=True).splitlines(), start=1):
        if not line.strip():
            continue
        user, colon, password = line.strip().partition(b":")
        if not (user and colon and password):
            raise UserError(f"metrics.password_file: {file}:{number}: not of the form user:password")
        out.append(hashlib.sha256(line.strip()).digest())
    if not out:
        raise UserError(f"metrics.password_file: {file} is empty; give a line user:password for each user")
    return tuple(out)


def _read_bytes(file: Path, key: str, secret: bool = False) -> bytes:
    try:
        content = file.read_bytes()
        mode = file.stat().st_mode
    except OSError as error:
        raise UserError(f"{key}: {file} cannot be read ({error.strerror})") from None
    if secret and mode & 0o004:
        raise UserError(f"{key}: {file} may be read by every user of this host; chmod 600 {file}")
    return content


# ------------------------------------------------------------------------------------------------------- the answers

_StartResponse = Callable[[str, list[tuple[str, str]]], Any]


class _Application:
    """prometheus_client's application for those who may ask; one answer serves all who ask at about the same time."""

    def __init__(self, registry: CollectorRegistry, access: Access):
        self._metrics = make_wsgi_app(registry, disable_compression=True)  # compressing takes longer than sending
        self._access, self._making = access, threading.Lock()
        self._answers: dict[str, tuple[float, str, list[tuple[str, str]], Iterable[bytes]]] = {}

    def __call__(self, environ: dict[str, Any], start_response: _StartResponse) -> Iterable[bytes]:
        if not self._access.allows(environ.get("HTTP_AUTHORIZATION", "")):
            start_response("401 Unauthorized", [("WWW-Authenticate", 'Basic realm="pkd"')])
            return [b"a user and password are needed\n"]
        if environ["REQUEST_METHOD"] != "GET":
            return self._metrics(environ, start_response)
        if environ.get("PATH_INFO") not in ("/", "/metrics"):
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"metrics are at /metrics\n"]
        form = choose_encoder(environ.get("HTTP_ACCEPT", ""))[1]
        environ |= {"QUERY_STRING": ""}
        with self._making:
            made = self._answers.get(form)
            if made is None or time.monotonic() - made[0] > _FRESH_SECONDS:
                head: list[Any] = []
                body = self._metrics(environ, lambda *given: head.extend(given))
                made = self._answers[form] = (time.monotonic(), *head, body)  # type: ignore[assignment]
        _, status, headers, body = made
        start_response(status, list(headers))
        return body


class _Handler(WSGIRequestHandler):
    timeout = _SILENT_SECONDS

    def log_message(self, *_: Any) -> None:
        """Says nothing: the terminal is the run's."""


class _Server(ThreadingWSGIServer):
    request_queue_size = 128

    def __init__(self, host: str, port: int, application: _Application, tls: ssl.SSLContext | None):
        found: Any = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family, *_, address = found
        self._tls, self._lock = tls, threading.Lock()
        self._open: dict[Any, None] = {}
        super().__init__(address, _Handler)
        self.set_app(application)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's would ask the name service for this host's name
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def get_request(self) -> tuple[Any, Any]:
        request, address = self.socket.accept()
        request.settimeout(_SILENT_SECONDS)
        if self._tls:
            request = self._tls.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        return request, address

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._open[request] = None
            oldest = next(iter(self._open)) if len(self._open) > CONNECTIONS else None
            if oldest is not None:
                del self._open[oldest]
        if oldest is not None:
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # its thread wakes up, and closes it
        super().process_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self._tls:
            request.do_handshake()
        super().finish_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("metrics: a connection from %s ended early", client_address, exc_info=True)


class Endpoint:
    """A server at work; `port` is the one it got."""

    def __init__(self, server: _Server):
        self._server, self.port = server, int(server.server_port)
        self._thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def serve(registry: CollectorRegistry, host: str, port: int, access: Access) -> Endpoint | None:
    """Serves a registry at http://host:port/metrics, on the next free port where that one is taken.

    Returns:
        None where no port could be had (the run goes on).
    """
    application = _Application(registry, access)
    candidates = range(port, min(port + _PORTS_TRIED, 65536)) if port else range(1)
    for candidate in candidates:
        try:
            endpoint = Endpoint(_Server(host, candidate, application, access.tls))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                why = error.strerror or os.strerror(error.errno or 0)
                log.warning("metrics: cannot listen on %s:%d (%s); going on without them", host, candidate, why)
                return None
            continue
        if port and endpoint.port != port:
            log.info("metrics: port %d is in use; serving on %d instead", port, endpoint.port)
        return endpoint
    log.warning("metrics: ports %d to %d are all in use; going on without them", port, candidates[-1])
    return None
