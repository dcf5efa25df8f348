"""Prometheus metrics: served over HTTP under documented names, on the next port where one is taken."""

import socket
import urllib.error
import urllib.request

import pytest

from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.metrics import RunMetrics

NAMES = {
    "pkd_info", "pkd_stage", "pkd_step", "pkd_epoch", "pkd_samples_total", "pkd_tokens_total",
    "pkd_step_seconds_bucket", "pkd_loss", "pkd_learning_rate", "pkd_grad_norm", "pkd_loss_scale",
    "pkd_cache_rows_total", "pkd_cache_rows_expected", "pkd_checkpoint_last_success_timestamp_seconds",
    "pkd_checkpoint_seconds", "pkd_eval_metric", "pkd_nonfinite_total", "pkd_preemptions_total",
    "pkd_data_wait_seconds_total", "process_resident_memory_bytes", "python_info",
}  # fmt: skip


@pytest.fixture
def serve():
    """Starts a server as a run does; ends it after the test."""
    servers = []

    def start(metrics, port, host="127.0.0.1"):
        served = metrics.serve(host, port)
        servers.extend([served[0]] if served else [])
        return served and served[1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def said(caplog, monkeypatch):
    """-> the messages so far."""
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", "pkd")
    return lambda: caplog.messages


def scrape(port):
    """Sample lines by name and labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/plain")
        lines = answer.read().decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


def test_a_scrape_holds_every_metric_and_its_value(serve, said):
    metrics = RunMetrics()
    metrics.info.labels("1.0", "runs/x", "sst2", "2", "float32").set(1)
    metrics.stage.labels(stage="distill").set(1)
    metrics.loss.labels(term="pt").set(0.25)
    metrics.eval_metric.labels(split="dev", metric="accuracy").set(0.9)
    metrics.samples.inc(64)
    metrics.step_seconds.observe(0.03)
    port = serve(metrics, 0)
    assert port > 0 and not said(), "any port was asked for: nothing to say"
    found = scrape(port)
    assert {key.partition("{")[0] for key in found} >= NAMES
    assert found['pkd_info{precision="float32",run="runs/x",task="sst2",version="1.0",world_size="2"}'] == 1
    assert found['pkd_loss{term="pt"}'] == 0.25
    assert found['pkd_eval_metric{metric="accuracy",split="dev"}'] == 0.9
    assert found['pkd_step_seconds_bucket{le="0.02"}'] == 0 and found['pkd_step_seconds_bucket{le="0.05"}'] == 1
    metrics.samples.inc(36)
    assert scrape(port)["pkd_samples_total"] == 100, "live"


def test_two_runs_have_a_registry_each(serve):
    first, second = RunMetrics(), RunMetrics()
    first.step.set(7)
    assert scrape(serve(first, 0))["pkd_step"] == 7
    assert scrape(serve(second, 0))["pkd_step"] == 0


def test_a_port_in_use_is_left_for_the_next(serve, said):
    first = serve(RunMetrics(), 0)
    metrics = RunMetrics()
    metrics.step.set(5)
    second = serve(metrics, first)
    assert first < second < first + 50
    assert said() == [f"metrics: port {first} is in use; serving on {second} instead"]
    assert scrape(second)["pkd_step"] == 5
    assert scrape(first)["pkd_step"] == 0


def test_without_a_port_the_run_goes_on(serve, said):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 65535))
        taken.listen()
        assert serve(RunMetrics(), 65535) is None
    [message] = said()
    assert message.endswith("in use; going on without them")


def test_an_address_that_is_not_ours(serve, said):
    assert serve(RunMetrics(), 0, host="192.0.2.1") is None  # reserved for documentation
    [message] = said()
    assert message.startswith("metrics: cannot listen on 192.0.2.1:0 (") and "going on without them" in message


def test_a_server_that_was_shut_down_is_gone():
    server, port = RunMetrics().serve("127.0.0.1", 0)
    scrape(port)
    server.shutdown()
    server.server_close()
    with pytest.raises(urllib.error.URLError):
        scrape(port)
