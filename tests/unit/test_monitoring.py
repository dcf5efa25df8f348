"""monitoring/: rules that are right, and that with the dashboard name nothing but what the code exports."""

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
    """Every name that a sample of a run can have."""
    metrics = RunMetrics()
    metrics.show_evaluation("dev", {"main_metric": 1.0})
    metrics.loss.labels(term="total").set(1)
    metrics.stage.labels(stage="data").set(1)
    metrics.gpu_memory.labels(kind="used").set(1)
    metrics.info.labels(*"abcdef").set(1)
    return {sample.name for family in metrics.registry.collect() for sample in family.samples}


def named(expression):
    """The series that an expression names; the words of PromQL, labels and their values left out."""
    bare = re.sub(r'"[^"]*"', "", expression)
    return set(re.findall(r"\b(?:pkd|process|python)[_:][a-z_0-9:]*", bare)) | set(re.findall(r"\bup\b(?=\{)", bare))


def test_the_configuration_and_the_rules_are_valid():
    assert "valid prometheus config" in promtool("check", "config", MONITORING / "prometheus.yml")
    for file in (ALERTS, RECORDING):
        assert "SUCCESS" in promtool("check", "rules", file)


def test_the_rules_do_what_their_cases_say():
    assert promtool("test", "rules", CASES).strip().endswith("SUCCESS")


def test_each_alert_has_a_case_that_fires_and_one_that_does_not():
    outcomes = {}
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        for expected in case["alert_rule_test"]:
            outcomes.setdefault(expected["alertname"], set()).add(bool(expected["exp_alerts"]))
    assert outcomes == {rule["alert"]: {True, False} for rule in rules(ALERTS)}


def test_rules_name_what_the_code_exports():
    recorded = {rule["record"] for rule in rules(RECORDING)}
    for rule in rules(RECORDING) + rules(ALERTS):
        known = exported() | {"up"} | (recorded - {rule.get("record")})
        assert named(rule["expr"]) <= known and named(rule["expr"]), rule


def test_a_panel_names_what_the_code_exports_and_every_metric_has_one():
    panels = json.loads(dashboard.FILE.read_text())["panels"]
    recorded = {rule["record"]: rule["expr"] for rule in rules(RECORDING)}
    shown = {name for panel in panels for target in panel.get("targets", []) for name in named(target["expr"])}
    assert shown <= exported() | recorded.keys()
    shown |= {name for record in shown & recorded.keys() for name in named(recorded[record])}
    shown |= {name.removesuffix(suffix) for name in shown for suffix in SUFFIXES}
    assert {metric.name for metric in RunMetrics().documented} - shown == set()


def test_a_panel_cannot_name_what_there_is_not():
    with pytest.raises(KeyError, match="pkd_nothing: nothing of that name"):
        dashboard.series("pkd_nothing")


def test_the_dashboard_is_current():
    assert dashboard.FILE.read_text() == dashboard.text(), "run `make docs`"
    made = json.loads(dashboard.text())
    graphs = [panel for panel in made["panels"] if panel["type"] != "row"]
    assert all(panel["description"] and panel["targets"] for panel in graphs)
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in made["panels"]]
    assert len(set(places)) == len(places) == len({panel["id"] for panel in made["panels"]})


def test_an_expression_of_a_panel_is_promql(tmp_path):
    """Grafana's variables filled in, promtool reads each as a rule."""
    panels = json.loads(dashboard.FILE.read_text())["panels"]
    expressions = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    filled = [text.replace("$__rate_interval", "1m").replace("$run", ".*") for text in expressions]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": [
        {"record": f"panel:{i}", "expr": text} for i, text in enumerate(filled)
    ]}]}))  # fmt: skip
    assert f"SUCCESS: {len(expressions)} rules found" in promtool("check", "rules", file)


def test_what_is_pushed_is_not_taken_for_a_live_run():
    """Every rule about live runs leaves the job of pushed values out, in one selector of those that are matched."""
    for rule in rules(RECORDING) + rules(ALERTS):
        if rule.get("alert") not in ("PkdLossNotFinite", "PkdTargetDown") and not named(rule["expr"]) <= {
            other["record"] for other in rules(RECORDING)
        }:
            assert f'job!="{PUSHED_JOB}"' in rule["expr"], rule
