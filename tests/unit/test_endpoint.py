"""The HTTP server of the metrics: ports, passwords, TLS, hanging connections."""

import base64
import contextlib
import http.client
import os
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request

import pytest
from certificates import make_certificate

from pkd_dist.config.load import load
from pkd_dist.errors import UserError
from pkd_dist.telemetry import endpoint
from pkd_dist.telemetry.endpoint import MAX_CONNECTIONS, Access, load_access
from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.metrics import RunMetrics


@pytest.fixture
def serve():
    """Start a server and return its port; stop it after the test."""
    with contextlib.ExitStack() as stack:

        def start(metrics, port=0, host="127.0.0.1", access=Access()):  # noqa: B008 - frozen
            served = endpoint.serve(metrics.registry, host, port, access)
            if served is None:
                return None
            stack.callback(served.close)
            return served.port

        yield start


@pytest.fixture
def messages(caplog, monkeypatch):
    """Return the messages so far."""
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", "pkd")
    return lambda: caplog.messages


def scrape(port, scheme="http", headers=None, context=None, query="", path="/metrics"):
    """Return the samples by name and labels."""
    request = urllib.request.Request(f"{scheme}://127.0.0.1:{port}{path}{query}", headers=headers or {})
    with urllib.request.urlopen(request, timeout=10, context=context) as answer:
        assert answer.status == 200 and answer.headers["Content-Type"].startswith(
            ("text/plain", "application/openmetrics-text")
        )
        lines = answer.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def until(happens, what):
    deadline = time.monotonic() + 30
    while not happens():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_scrape_has_labels_and_recent_values(serve, messages):
    metrics = RunMetrics()
    metrics.info.labels("1.0", "/runs/x", "sst2", "n7", "2", "float32", "17").set(1)
    metrics.stage.labels(stage="distill").set(1)
    metrics.show_losses("distill", {"pt": 0.25})
    metrics.samples.inc(64)
    metrics.step_seconds.observe(0.03)
    port = serve(metrics)
    assert port > 0 and not messages(), "any port was asked for: no message"
    found = scrape(port)
    assert (
        found[
            'pkd_info{host="n7",precision="float32",run="/runs/x",slurm_job="17",task="sst2",version="1.0",world_size="2"}'
        ]
        == 1
    )
    assert found['pkd_loss{stage="distill",term="pt"}'] == 0.25
    assert found['pkd_step_seconds_bucket{le="0.02"}'] == 0 and found['pkd_step_seconds_bucket{le="0.05"}'] == 1
    metrics.samples.inc(36)
    until(lambda: scrape(port)["pkd_samples_total"] == 100, "the change")


def test_responses_are_rendered_at_most_once_per_second(serve, monkeypatch):
    monkeypatch.setattr(endpoint, "_CACHE_SECONDS", 1000)
    metrics = RunMetrics()
    port = serve(metrics)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        scrape(port, path="/favicon.ico")
    assert scrape(port)["pkd_samples_total"] == 0, "the response of another path is not cached as the metrics"
    metrics.samples.inc()
    for number in range(3):
        found = scrape(port, query=f"?x={number}", headers={"Accept": f"text/plain;q=0.{number + 1}"})
        assert found["pkd_samples_total"] == 0


def test_scrapes_of_another_run_are_rejected(serve):
    """The file of a crashed run may still name the address that this run uses now."""
    served = endpoint.serve(RunMetrics().registry, "127.0.0.1", 0, Access(), "pkd-mine-0")
    for query in ("", "?target=pkd-mine-0", "?x=1"):
        assert scrape(served.port, query=query)["pkd_samples_total"] == 0
    for query in ("?target=pkd-other-0", "?target=pkd-mine-1", "?target=pkd-mine-0&target=x"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            scrape(served.port, query=query)
    served.close()


def test_concurrent_scrapes_share_a_response(serve, monkeypatch):
    monkeypatch.setattr(endpoint, "_CACHE_SECONDS", 1000)
    metrics = RunMetrics()
    port = serve(metrics)
    assert scrape(port)["pkd_samples_total"] == 0
    metrics.samples.inc()
    assert scrape(port)["pkd_samples_total"] == 0
    assert scrape(port, headers={"Accept": "application/openmetrics-text"})["pkd_samples_total"] == 1, "another format"


def test_any_accept_header_gets_one_of_three_renderings(serve, monkeypatch, capfd):
    rendered = []
    render = endpoint._Application._render
    monkeypatch.setattr(endpoint, "_CACHE_SECONDS", 1000)
    monkeypatch.setattr(endpoint._Application, "_render", lambda self, e: rendered.append(1) or render(self, e))
    port = serve(RunMetrics())
    kinds = ("application/openmetrics-text;version=1.{}", "text/plain;version=1.{}", "text/plain;version=x{}", "{}")
    for number in range(10):
        for kind in kinds:
            assert scrape(port, headers={"Accept": kind.format(number)})["pkd_samples_total"] == 0
    assert len(rendered) == 3 and capfd.readouterr().err == ""


def test_two_runs_have_separate_registries(serve):
    first, second = RunMetrics(), RunMetrics()
    first.samples.inc(7)
    assert scrape(serve(first))["pkd_samples_total"] == 7
    assert scrape(serve(second))["pkd_samples_total"] == 0


def test_next_free_port(serve, messages):
    first = serve(RunMetrics())
    metrics = RunMetrics()
    metrics.samples.inc(5)
    second = serve(metrics, first)
    assert first < second < first + 50
    assert messages() == [f"metrics: port {first} is in use; serving on {second} instead"]
    assert scrape(second)["pkd_samples_total"] == 5
    assert scrape(first)["pkd_samples_total"] == 0


def test_without_a_free_port_the_run_continues(serve, messages):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 65535))
        taken.listen()
        assert serve(RunMetrics(), 65535) is None
    [message] = messages()
    assert message.endswith("in use; continuing without metrics")


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])  # reserved for documentation
def test_foreign_address(serve, messages, host):
    assert serve(RunMetrics(), 0, host=host) is None
    [message] = messages()
    assert message.startswith(f"metrics: cannot listen on {host}:0 (") and "continuing without metrics" in message


def test_closed_server():
    served = endpoint.serve(RunMetrics().registry, "127.0.0.1", 0, Access())
    scrape(served.port)
    served.close()
    with pytest.raises(urllib.error.URLError):
        scrape(served.port)


# ------------------------------------------------------------------------------------------------ hanging connections


def hang(port, sent=b""):
    connection = socket.create_connection(("127.0.0.1", port), timeout=30)
    connection.sendall(sent)
    return connection


def was_closed(connection):
    """Return whether the server has closed the connection, without reading from it."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


@pytest.fixture
def patient(monkeypatch):
    """Disable the idle timeout."""
    monkeypatch.setattr(endpoint, "_IDLE_TIMEOUT_SECONDS", 1000)
    monkeypatch.setattr(endpoint._Handler, "timeout", 1000)


@pytest.mark.parametrize(
    ("tls", "sent"),
    [(False, b""), (False, b"GET /met"), (True, b""), (True, b"\x16\x03\x01\x02\x00")],
    ids=["silent", "half a request", "silent, TLS", "half a handshake"],
)
def test_50_hanging_connections_are_bounded_and_block_nobody(serve, patient, certificate, tls, sent):
    """The oldest are closed: the endpoint responds, and its connections and threads are bounded."""
    access = Access(tls=context_of(certificate)) if tls else Access()
    threads = threading.active_count()
    port = serve(RunMetrics(), access=access)
    hanging = [hang(port, sent) for _ in range(50)]
    try:
        for _ in range(20):
            scrape(port, "https", context=trusting(certificate)) if tls else scrape(port)
        until(lambda: sum(map(was_closed, hanging)) >= 50 - MAX_CONNECTIONS, "the others are closed")
        assert not was_closed(hanging[-1]), "the newest stay open"
        until(lambda: threading.active_count() <= threads + 1 + MAX_CONNECTIONS, "one thread each, and the server's")
    finally:
        for connection in hanging:
            connection.close()


def test_responses_that_nobody_reads(serve, patient):
    """They fill the socket buffers; the endpoint keeps responding."""
    port = serve(RunMetrics())
    hanging = []
    for _ in range(50):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        hanging.append(connection)
    for _ in range(20):
        assert "pkd_samples_total" in scrape(port)
    for connection in hanging:
        connection.close()


def test_idle_connection_is_closed(serve, monkeypatch):
    monkeypatch.setattr(endpoint._Handler, "timeout", 0.2)
    hanging = hang(serve(RunMetrics()))
    assert hanging.recv(1) == b""
    hanging.close()


def test_invalid_and_aborted_requests_print_nothing(serve, certificate, capfd):
    plain, tls = serve(RunMetrics()), serve(RunMetrics(), access=Access(tls=context_of(certificate)))
    for port in (plain, tls):
        for sent in (b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"A" * 100_000):
            with contextlib.suppress(ConnectionError):
                hang(port, sent).close()
    assert scrape(plain) and scrape(tls, "https", context=trusting(certificate))
    connection = http.client.HTTPConnection("127.0.0.1", plain, timeout=10)
    connection.request("POST", "/metrics", body="x")
    assert connection.getresponse().status == 405
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------ TLS and passwords


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Return (certificate, key) for 127.0.0.1."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


def context_of(certificate):
    return access_of(tls_cert=certificate[0], tls_key=certificate[1]).tls


def trusting(certificate):
    return ssl.create_default_context(cafile=certificate[0])


def access_of(**settings):
    return load_access(
        load(None, ["run.dir=x", *(f"metrics.{key}={value}" for key, value in settings.items())]).metrics
    )


def passwords(folder, text="scraper:öffne dich\n\nold: with : colons \n"):
    file = folder / "passwords"
    file.write_text(text, encoding="utf-8")
    file.chmod(0o600)
    return file


def login(text):
    return {"Authorization": "Basic " + base64.b64encode(text.encode()).decode()}


def test_https_and_passwords(serve, certificate, tmp_path):
    access = access_of(tls_cert=certificate[0], tls_key=certificate[1], password_file=passwords(tmp_path))
    port = serve(RunMetrics(), access=access)
    trust = trusting(certificate)
    for known in ("scraper:öffne dich", "old: with : colons"):
        assert "pkd_samples_total" in scrape(port, "https", login(known), trust)
    wrong = [{}, login("scraper:"), login("scraper:wrong"), login("scraper"), login(""), login("other:öffne dich")]
    wrong += [{"Authorization": value} for value in ("Basic", "Basic !!", "Bearer x", "basic " + "A" * 3000)]
    for headers in wrong:
        with pytest.raises(urllib.error.HTTPError) as refused:
            scrape(port, "https", headers, trust)
        assert refused.value.code == 401 and refused.value.headers["WWW-Authenticate"] == 'Basic realm="pkd"'
        assert b"pkd_samples_total" not in refused.value.read()
    with pytest.raises(OSError):
        scrape(port, "http", login("scraper:öffne dich"))
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    with pytest.warns(DeprecationWarning):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(urllib.error.URLError):
        scrape(port, "https", login("scraper:öffne dich"), old)


def test_without_files_access_is_open():
    assert load_access(load(None, ["run.dir=x"]).metrics) == Access(None, ())
    assert Access().allows("")


def refusal(**settings):
    with pytest.raises(UserError) as refused:
        access_of(**settings)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_invalid_files(certificate, tmp_path):
    cert, key = certificate
    other = make_certificate(tmp_path)
    gone = tmp_path / "gone"
    assert refusal(tls_cert=gone, tls_key=key) == f"metrics.tls_cert: {gone} cannot be read (No such file or directory)"
    assert refusal(tls_cert=cert, tls_key=gone) == f"metrics.tls_key: {gone} cannot be read (No such file or directory)"
    assert refusal(tls_cert=tmp_path, tls_key=key) == f"metrics.tls_cert: {tmp_path} cannot be read (Is a directory)"
    assert refusal(password_file=gone) == f"metrics.password_file: {gone} cannot be read (No such file or directory)"
    assert f"metrics.tls_key: {other[1]} is not the key of metrics.tls_cert {cert}" in refusal(
        tls_cert=cert, tls_key=other[1]
    )
    nonsense = passwords(tmp_path, "nonsense\n")
    assert "give a certificate and its key in PEM, without a passphrase" in refusal(tls_cert=nonsense, tls_key=key)
    assert "give a certificate and its key in PEM, without a passphrase" in refusal(tls_cert=cert, tls_key=nonsense)
    assert f"{nonsense}:1: not of the form user:password" in refusal(password_file=nonsense)
    assert f"{nonsense}:2: not of the form" in refusal(password_file=passwords(tmp_path, "a:b\n:c\n"))
    assert f"{nonsense} is empty; add one line user:password" in refusal(password_file=passwords(tmp_path, " \n\n"))
    locked = tmp_path / "locked"
    locked.mkdir()
    cert, key = make_certificate(locked, "-passout", "pass:secret")
    assert "without a passphrase" in refusal(tls_cert=cert, tls_key=key)


def test_world_readable_secrets_are_rejected(certificate, tmp_path):
    file = passwords(tmp_path)
    file.chmod(0o644)
    assert refusal(password_file=file) == (
        f"metrics.password_file: {file} is readable by every user of this host; run chmod 600 {file}"
    )
    os.chmod(file, 0o640)
    assert access_of(password_file=file).logins
    key = tmp_path / "key.pem"
    key.write_bytes(certificate[1].read_bytes())
    key.chmod(0o604)
    assert f"chmod 600 {key}" in refusal(tls_cert=certificate[0], tls_key=key)
