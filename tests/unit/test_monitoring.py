"""monitoring/: rules are correct, and rules and dashboard use only exported series."""

import json
import re
import subprocess

import pytest
import yaml
from conftest import ROOT

from monitoring import dashboard
from pkd_dist.telemetry.metrics import RunMetrics
from pkd_dist.telemetry.publish import PUSHED_JOB

pytestmark = pytest.mark.usefixtures("prometheus_programs")

MONITORING = ROOT / "monitoring"
ALERTS, RECORDING = MONITORING / "rules/alerts.yml", MONITORING / "rules/recording.yml"
CASES = MONITORING / "tests/alerts.yml"
SUFFIXES = ("_bucket", "_sum", "_count")


def rules(file):
    return [rule for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


def promtool(*arguments):
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def exported():
    """Return the names of all samples that a run can export."""
    metrics = RunMetrics()
    metrics.show_past("distill", [
        {"step": 1, "epoch": 1, "loss": 1.0, "learning_rate": 0.1, "grad_norm": 1.0},
        {"step": 1, "epoch": 1, "split": "dev", "main_metric": 1.0},
    ])  # fmt: skip
    metrics.expect_end("distill", 1.0)
    metrics.stage.labels(stage="data").set(1)
    metrics.gpu_memory.labels(kind="used").set(1)
    metrics.info.labels(*"abcdefg").set(1)
    metrics.show_sweep({"complete": 1}, 2, 4, "accuracy", 0.5)
    metrics.show_end(0)
    return {sample.name for family in metrics.registry.collect() for sample in family.samples}


def named(expression):
    """Return the series in an expression, without PromQL keywords, labels and their values."""
    bare = re.sub(r'"[^"]*"', "", expression)
    return set(re.findall(r"\b(?:pkd|process|python)[_:][a-z_0-9:]*", bare)) | set(re.findall(r"\bup\b(?=\{)", bare))


def test_configuration_and_rules_are_valid():
    assert "valid prometheus config" in promtool("check", "config", MONITORING / "prometheus.yml")
    for file in (ALERTS, RECORDING):
        assert "SUCCESS" in promtool("check", "rules", file)


def test_rules_pass_their_cases():
    assert promtool("test", "rules", CASES).strip().endswith("SUCCESS")


def test_each_alert_has_a_firing_and_a_silent_case():
    outcomes = {}
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        for expected in case["alert_rule_test"]:
            outcomes.setdefault(expected["alertname"], set()).add(bool(expected["exp_alerts"]))
    assert outcomes == {rule["alert"]: {True, False} for rule in rules(ALERTS)}


def test_rules_use_exported_series():
    recorded = {rule["record"] for rule in rules(RECORDING)}
    for rule in rules(RECORDING) + rules(ALERTS):
        known = exported() | {"up"} | (recorded - {rule.get("record")})
        assert named(rule["expr"]) <= known and named(rule["expr"]), rule


def test_panels_use_exported_series_and_cover_all_metrics():
    panels = json.loads(dashboard.FILE.read_text())["panels"]
    recorded = {rule["record"]: rule["expr"] for rule in rules(RECORDING)}
    shown = {name for panel in panels for target in panel.get("targets", []) for name in named(target["expr"])}
    assert shown <= exported() | recorded.keys()
    shown |= {name for record in shown & recorded.keys() for name in named(recorded[record])}
    shown |= {name.removesuffix(suffix) for name in shown for suffix in SUFFIXES}
    assert {metric.name for metric in RunMetrics().documented} - shown == set()


def test_unknown_series_is_rejected():
    with pytest.raises(KeyError, match="pkd_nothing: no exported metric or recorded series has this name"):
        dashboard.series("pkd_nothing")


def test_dashboard_is_current():
    assert dashboard.FILE.read_text() == dashboard.text(), "run `make docs`"
    made = json.loads(dashboard.text())
    graphs = [panel for panel in made["panels"] if panel["type"] != "row"]
    assert all(panel["description"] and panel["targets"] for panel in graphs)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in made["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in made["panels"]})


def test_panel_expressions_are_valid_promql(tmp_path):
    """promtool reads each expression as a rule, with the variables of Grafana filled in."""
    panels = json.loads(dashboard.FILE.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    filled = [text.replace("$__rate_interval", "1m").replace("$run", ".*") for text in expressions]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": [
        {"record": f"panel:{i}", "expr": text} for i, text in enumerate(filled)
    ]}]}))  # fmt: skip
    assert f"SUCCESS: {len(expressions)} rules found" in promtool("check", "rules", file)


def test_rules_for_live_runs_exclude_pushed_values():
    """One of the matched selectors excludes the job of pushed values."""
    for rule in rules(RECORDING) + rules(ALERTS):
        if rule.get("alert") not in (
            "PkdLossNotFinite",
            "PkdRunFailed",
            "PkdRunCrashed",
            "PkdTargetDown",
        ) and not named(rule["expr"]) <= {other["record"] for other in rules(RECORDING)}:
            assert f'job!="{PUSHED_JOB}"' in rule["expr"], rule
