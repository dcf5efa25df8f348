"""HTTP server for the metrics of a run. Slow or hanging clients never delay training.

    request -> _Server (bounded connections, TLS) -> _Application (password, 1 s cache) -> prometheus_client.make_wsgi_app

`prometheus_client.start_http_server` is not used because it lacks:

- basic authentication: it serves a fixed application that ignores the Authorization header;
- connection limits and timeouts: every client gets a thread for as long as it keeps its connection open;
- TLS handshakes outside the accept loop: it wraps the listening socket, so one client that sends nothing blocks all others;
- a cache: every scrape renders the registry again;
- startup without DNS: `HTTPServer.server_bind` resolves the host name, which takes seconds on some clusters.

It creates its server class itself, so none of these can be added by subclassing. This module therefore builds on the parts it
exports, `make_wsgi_app` and `ThreadingWSGIServer`.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import hashlib
import hmac
import io
import os
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias, cast
from urllib.parse import parse_qs
from wsgiref.simple_server import WSGIRequestHandler

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer, choose_encoder

from pkd_dist.config.schema import Metrics
from pkd_dist.errors import UserError
from pkd_dist.telemetry.discovery import PARAMETER
from pkd_dist.telemetry.log import log

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

MAX_CONNECTIONS = 16
_IDLE_TIMEOUT_SECONDS = 5.0
_CACHE_SECONDS = 1.0
_PORTS_TRIED = 50


# -------------------------------------------------------------------------------------------------- TLS and passwords


@dataclass(frozen=True)
class Access:
    """TLS and authentication of the endpoint.

    Attributes:
        tls: server context; None for plain HTTP.
        logins: SHA-256 digest of each `user:password`; empty if no password is needed.
    """

    tls: ssl.SSLContext | None = None
    logins: tuple[bytes, ...] = ()

    def allows(self, authorization: str) -> bool:
        """Return whether an Authorization header holds a valid login. Takes constant time."""
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
    """Load the certificate, key and password file of the configuration.

    Raises:
        UserError: a file is unreadable or invalid, a secret is world-readable, or key and certificate do not match.
    """
    tls = None
    if config.tls_cert and config.tls_key:
        tls = _load_tls(Path(config.tls_cert), Path(config.tls_key))
    return Access(tls, _load_logins(Path(config.password_file)) if config.password_file else ())


def _load_tls(certificate: Path, key: Path) -> ssl.SSLContext:
    _read_bytes(certificate, "metrics.tls_cert")
    _read_bytes(key, "metrics.tls_key", secret=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")  # otherwise OpenSSL prompts on the terminal
    except (ssl.SSLError, ValueError) as error:
        if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
            raise UserError(
                f"metrics.tls_key: {key} is not the key of metrics.tls_cert {certificate}; give a matching pair"
            ) from None
        raise UserError(
            f"metrics.tls_cert and metrics.tls_key: cannot use {certificate} and {key} "
            f"({getattr(error, 'reason', None) or error}); give a certificate and its key in PEM, without a passphrase"
        ) from None
    return context


def _load_logins(file: Path) -> tuple[bytes, ...]:
    logins = []
    for number, line in enumerate(_read_bytes(file, "metrics.password_file", secret=True).splitlines(), start=1):
        if not line.strip():
            continue
        user, colon, password = line.strip().partition(b":")
        if not (user and colon and password):
            raise UserError(f"metrics.password_file: {file}:{number}: not of the form user:password")
        logins.append(hashlib.sha256(line.strip()).digest())
    if not logins:
        raise UserError(f"metrics.password_file: {file} is empty; add one line user:password for each user")
    return tuple(logins)


def _read_bytes(file: Path, key: str, secret: bool = False) -> bytes:
    try:
        content = file.read_bytes()
        mode = file.stat().st_mode
    except OSError as error:
        raise UserError(f"{key}: {file} cannot be read ({error.strerror})") from None
    if secret and mode & 0o004:
        raise UserError(f"{key}: {file} is readable by every user of this host; run chmod 600 {file}")
    return content


# ------------------------------------------------------------------------------------------------------------ server


@dataclass(frozen=True)
class _Response:
    created: float
    headers: list[tuple[str, str]]
    body: list[bytes]


class _Application:
    """The WSGI application of prometheus_client behind a password check and a cache."""

    def __init__(self, registry: CollectorRegistry, access: Access, target: str):
        self._metrics = make_wsgi_app(registry, disable_compression=True)  # compressing takes longer than sending
        self._access, self._target, self._lock = access, target, threading.Lock()
        self._cache: dict[str, _Response] = {}

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        if not self._access.allows(environ.get("HTTP_AUTHORIZATION", "")):
            start_response("401 Unauthorized", [("WWW-Authenticate", 'Basic realm="pkd"')])
            return [b"user and password required\n"]
        if environ["REQUEST_METHOD"] != "GET":
            response: Iterable[bytes] = self._metrics(environ, start_response)
            return response
        if environ.get("PATH_INFO") not in ("/", "/metrics"):
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"metrics are at /metrics\n"]
        if {self._target} != set(parse_qs(environ.get("QUERY_STRING", "")).get(PARAMETER, [self._target])):
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"the run that was here has ended; another one uses its address\n"]
        accept = _accepted(environ.get("HTTP_ACCEPT", ""))
        with self._lock:
            cached = self._cache.get(accept)
            if cached is None or time.monotonic() - cached.created > _CACHE_SECONDS:
                cached = self._cache[accept] = self._render(environ | {"QUERY_STRING": "", "HTTP_ACCEPT": accept})
        start_response("200 OK", list(cached.headers))
        return cached.body

    def _render(self, environ: WSGIEnvironment) -> _Response:
        created, headers = time.monotonic(), list[tuple[str, str]]()
        body = self._metrics(environ, lambda _, given: headers.extend(given))
        return _Response(created, headers, body)


def _accepted(header: str) -> str:
    """Return one of three Accept headers for that of a client, which must not be a key: clients would fill the memory."""
    try:
        content_type = choose_encoder(header)[1]
    except (TypeError, ValueError):  # version=x
        return "text/plain"
    if content_type.startswith("application/openmetrics-text"):
        return "application/openmetrics-text;version=1.0.0"
    return "text/plain" if "version=0.0.4" in content_type else "text/plain;version=1.0.0"


class _Handler(WSGIRequestHandler):
    timeout = _IDLE_TIMEOUT_SECONDS

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the terminal belongs to the run."""

    def get_stderr(self) -> IO[str]:  # type: ignore[override]
        """Return where wsgiref writes the traceback of a request: nowhere."""
        return io.StringIO()


_Address: TypeAlias = tuple[str, int]
_Request: TypeAlias = socket.socket | tuple[bytes, socket.socket]


class _Server(ThreadingWSGIServer):
    """One thread per connection, at most `MAX_CONNECTIONS`; a new connection closes the oldest."""

    request_queue_size = 128

    def __init__(self, host: str, port: int, application: _Application, tls: ssl.SSLContext | None):
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = family
        self._tls, self._lock = tls, threading.Lock()
        self._connections: dict[socket.socket, None] = {}  # ordered by age
        super().__init__(cast(_Address, address), _Handler)  # of IPv6 also the scope
        self.set_app(application)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer.server_bind would query DNS for the name of this host
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, _Address]:
        connection, address = self.socket.accept()
        connection.settimeout(_IDLE_TIMEOUT_SECONDS)
        if self._tls:
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def process_request(self, request: _Request, client_address: _Address) -> None:
        assert isinstance(request, socket.socket)
        with self._lock:
            self._connections[request] = None
            oldest = next(iter(self._connections)) if len(self._connections) > MAX_CONNECTIONS else None
            if oldest is not None:
                del self._connections[oldest]
        if oldest is not None:
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)  # wakes its thread, which closes it
        super().process_request(request, client_address)

    def finish_request(self, request: _Request, client_address: _Address) -> None:
        if isinstance(request, ssl.SSLSocket):
            request.do_handshake()  # here in the thread of the connection, not in the accept loop
        super().finish_request(request, client_address)

    def shutdown_request(self, request: _Request) -> None:
        assert isinstance(request, socket.socket)
        with self._lock:
            self._connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: _Request, client_address: _Address) -> None:
        log.debug("metrics: connection from %s failed", client_address, exc_info=True)


class Endpoint:
    """A running server; `port` is the port it listens on."""

    def __init__(self, server: _Server):
        self._server, self.port = server, server.server_port
        threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def serve(registry: CollectorRegistry, host: str, port: int, access: Access, target: str = "") -> Endpoint | None:
    """Serve a registry at http://host:port/metrics, or on the next free port if `port` is in use.

    Args:
        target: name of the target file; scrapes that name another one are rejected.

    Returns:
        The server; None, after a warning, if no port is available.
    """
    application = _Application(registry, access, target)
    candidates = range(port, min(port + _PORTS_TRIED, 65536)) if port else range(1)
    for candidate in candidates:
        try:
            endpoint = Endpoint(_Server(host, candidate, application, access.tls))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                reason = error.strerror or os.strerror(error.errno or 0)
                log.warning("metrics: cannot listen on %s:%d (%s); continuing without metrics", host, candidate, reason)
                return None
            continue
        if port and endpoint.port != port:
            log.info("metrics: port %d is in use; serving on %d instead", port, endpoint.port)
        return endpoint
    log.warning("metrics: ports %d to %d are in use; continuing without metrics", port, candidates[-1])
    return None
