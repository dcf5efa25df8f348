"""Prometheus metrics: names, counters that survive a process, generated documentation."""

import json
import subprocess

import pytest
import torch
from conftest import ROOT
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from pkd_dist.config import load as config_load
from pkd_dist.config import schema
from pkd_dist.errors import UserError
from pkd_dist.metric_names import LOSS_TERMS
from pkd_dist.stages.base import NAMES as STAGES
from pkd_dist.telemetry.metrics import EVAL_METRICS, STEP_SECONDS_BUCKETS, RunMetrics, reference

SPEC = {
    "pkd_info", "pkd_stage", "pkd_step", "pkd_epoch", "pkd_samples_total", "pkd_tokens_total", "pkd_step_seconds",
    "pkd_loss", "pkd_learning_rate", "pkd_grad_norm", "pkd_loss_scale", "pkd_cache_rows_total",
    "pkd_cache_rows_expected", "pkd_checkpoint_last_success_timestamp_seconds", "pkd_checkpoint_seconds",
    "pkd_eval_metric", "pkd_nonfinite_total", "pkd_preemptions_total", "pkd_gpu_memory_bytes",
    "pkd_data_wait_seconds_total", "pkd_run_end_status", "pkd_steps_total_expected",
    "pkd_expected_end_timestamp_seconds", "pkd_sweep_trials", "pkd_sweep_best_value", "pkd_sweep_workers",
    "pkd_sweep_students_per_step",
}  # fmt: skip


def sample(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, labels)


def test_every_metric_exists_and_passes_promtool(prometheus_programs):
    metrics = RunMetrics()
    metrics.gpu_memory.labels(kind="total").set(1)
    text = generate_latest(metrics.registry)
    types = {line.split()[2]: line.split()[3] for line in text.decode().splitlines() if line.startswith("# TYPE")}
    assert {m.name: m.kind for m in metrics.documented} == {k: v for k, v in types.items() if k.startswith("pkd_")}
    assert {m.name for m in metrics.documented} == SPEC
    assert {"process_resident_memory_bytes", "process_cpu_seconds_total", "python_info"} <= types.keys()
    assert b"_created" not in text
    assert list(text_string_to_metric_families(text.decode()))
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_label_values_are_documented():
    rows = {
        line.split("`")[1]: line
        for line in reference("h", 1, STAGES, LOSS_TERMS).splitlines()
        if line.startswith("| `")
    }
    for name, values in {"pkd_stage": STAGES, "pkd_loss": LOSS_TERMS, "pkd_eval_metric": EVAL_METRICS}.items():
        assert [word for word in rows[name].split("`")[1::2] if word in values] == list(values)


def test_buckets_cover_1_ms_to_10_s():
    assert STEP_SECONDS_BUCKETS[0] == 0.001 and STEP_SECONDS_BUCKETS[-1] == 10
    assert max(b / a for a, b in zip(STEP_SECONDS_BUCKETS, STEP_SECONDS_BUCKETS[1:], strict=False)) <= 2.5


def count(metrics, samples, seconds):
    metrics.samples.inc(samples)
    metrics.step_seconds.observe(seconds)


def test_counters_continue_from_the_last_scrape_of_a_killed_process(tmp_path):
    file = tmp_path / "new/node-0.json"
    first = RunMetrics(file)
    count(first, 64, 0.03)
    first.start_training("distill", 7, 0.5, 10)
    generate_latest(first.registry)  # a scrape
    saved = file.read_bytes()
    generate_latest(first.registry)
    assert file.read_bytes() == saved and [path.name for path in file.parent.iterdir()] == [file.name]
    count(first, 999, 5)  # not scraped: lost with the process
    second = RunMetrics(file)
    assert sample(second, "pkd_samples_total") == second.value("pkd_samples_total") == 64
    assert sample(second, "pkd_step", stage="distill") is None, "gauges are not kept"
    count(second, 36, 0.04)
    assert sample(second, "pkd_samples_total") == 100
    assert sample(second, "pkd_step_seconds_count") == sample(second, "pkd_step_seconds_bucket", le="0.05") == 2
    assert sample(second, "pkd_step_seconds_bucket", le="0.02") == 0
    assert sample(second, "pkd_step_seconds_sum") == pytest.approx(0.07)
    assert sample(RunMetrics(file), "pkd_samples_total") == 100


ALTERED = json.dumps({"pkd_samples_total": 5, "pkd_tokens_total": 60, "checksum": "0123456789abcdef"})


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", json.dumps({"pkd_samples_total": 5}), b"\xff", ALTERED, "[" * 100_000]
)
def test_unusable_counter_file_is_ignored(tmp_path, content):
    file = tmp_path / "node-0.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    metrics = RunMetrics(file)
    assert sample(metrics, "pkd_samples_total") == 0
    count(metrics, 3, 1)
    assert sample(metrics, "pkd_samples_total") == sample(RunMetrics(file), "pkd_samples_total") == 3


def test_counters_that_cannot_be_written_are_still_served(tmp_path):
    (tmp_path / "counters").write_text("in the way")
    metrics = RunMetrics(tmp_path / "counters/node-0.json")
    count(metrics, 5, 1)
    assert sample(metrics, "pkd_samples_total") == 5


def test_evaluation_exports_known_metrics_only():
    metrics = RunMetrics()
    scores = {"epoch": 3, "accuracy": 0.5, "main_metric": 0.5, "accuracy_interval_95": [0, 1]}
    metrics.show_scores("distill", {"dev": scores})
    [family] = [family for family in metrics.registry.collect() if family.name == "pkd_eval_metric"]
    assert {s.labels["metric"]: s.value for s in family.samples} == {"accuracy": 0.5, "main_metric": 0.5}


def test_only_the_terms_of_the_current_training_are_exported():
    """A student without patience after a teacher, both finished."""
    line = {"step": 4, "epoch": 1.0, "loss": 2.0, "loss_ce": 2.0, "learning_rate": 0.1, "grad_norm": 1.0}
    metrics = RunMetrics()
    for stage, more in (("distill", {"loss_ds": 1.0}), ("teacher", {})):
        metrics.show_past(stage, [line | more, {"step": 5, "epoch": 1, "split": "dev", "main_metric": 0.5}])
        metrics.expect_end(stage, 9.0)
        found = {
            (s.name, *s.labels.values()): s.value
            for m in metrics.registry.collect()
            for s in m.samples
            if "stage" in s.labels
        }
        losses = {"total": 2.0, "ce": 2.0} | {key.removeprefix("loss_"): value for key, value in more.items()}
        scalars = {
            "step": 4,
            "steps_total_expected": 5,
            "expected_end_timestamp_seconds": 9,
            "epoch": 1,
            "learning_rate": 0.1,
        }
        assert found == {
            ("pkd_eval_metric", stage, "dev", "main_metric"): 0.5,
            **{("pkd_loss", stage, term): value for term, value in losses.items()},
            **{
                (f"pkd_{name}", stage): value
                for name, value in (scalars | {"grad_norm": 1.0, "loss_scale": 1.0}).items()
            },
        }
    metrics.end_training()
    assert sample(metrics, "pkd_expected_end_timestamp_seconds", stage="teacher") is None


def test_gpu_memory_is_read_at_each_scrape(monkeypatch):
    """Runs without a GPU: checks which function of torch each kind calls."""
    functions = {"memory_allocated": 3, "max_memory_allocated": 5, "memory_reserved": 8}
    for name, value in functions.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    free = [60]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80))
    metrics = RunMetrics()
    assert sample(metrics, "pkd_gpu_memory_bytes", kind="total") is None
    metrics.watch_gpu("cuda:0")
    kinds = {"allocated": 3, "peak": 5, "reserved": 8, "used": 20, "total": 80}
    assert {kind: sample(metrics, "pkd_gpu_memory_bytes", kind=kind) for kind in kinds} == kinds
    free[0] = 10
    assert sample(metrics, "pkd_gpu_memory_bytes", kind="used") == 70


def test_documentation_is_current():
    defaults = schema.Metrics()
    text = reference(defaults.host, defaults.port, STAGES, LOSS_TERMS)
    assert all(f"| `{name}` |" in text for name in SPEC)
    assert (ROOT / "docs/metrics.md").read_text() == text, "run `make docs`"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["tls_cert=a.pem"], "metrics.tls_cert requires metrics.tls_key"),
        (["tls_key=a.pem"], "metrics.tls_key requires metrics.tls_cert"),
        *((["pushgateway=" + url], "must be an HTTP URL without a user, such as http://gateway:9091") for url in
          ("gateway:9091", "ftp://gateway", "http://me:secret@gateway:9091", "http://", "http://gateway:port")),
    ],
)  # fmt: skip
def test_invalid_settings(settings, message):
    with pytest.raises(UserError, match=message) as refused:
        config_load.load(None, ["run.dir=x", *(f"metrics.{setting}" for setting in settings)])
    assert "\n" not in str(refused.value)
