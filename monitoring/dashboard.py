"""Generate the Grafana dashboard, monitoring/grafana/pkd.json, from the metrics that the code declares.

All series go through `series`, which rejects names that are neither exported by a run nor recorded by rules/recording.yml.
`make docs` runs this module; a test checks that the file is current.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from grafanalib import core as grafana
from grafanalib._gen import DashboardEncoder

from pkd_dist.telemetry.metrics import RunMetrics
from pkd_dist.telemetry.publish import PUSHED_JOB

HERE = Path(__file__).parent
FILE = HERE / "grafana" / "pkd.json"
SOURCE = "${source}"
WIDTH, HEIGHT = 8, 8  # of 24 columns


def descriptions() -> dict[str, str]:
    """Return the description of every exported metric, including those of the process, and every recorded series."""
    exported = {
        metric.name + "_total" * (metric.type == "counter"): metric.documentation
        for metric in RunMetrics().registry.collect()
    }
    groups = yaml.safe_load((HERE / "rules" / "recording.yml").read_text())["groups"]
    return exported | {rule["record"]: f"Recorded: {rule['expr']}" for group in groups for rule in group["rules"]}


DESCRIPTIONS = descriptions()


def checked(name: str) -> str:
    """Return `name`, or raise KeyError if no such series exists."""
    if name not in DESCRIPTIONS:
        raise KeyError(f"{name}: no exported metric or recorded series has this name")
    return name


def series(name: str, suffix: str = "") -> str:
    """Return a selector for the chosen runs. `suffix` is `_bucket`, `_sum` or `_count` for a histogram."""
    return f'{checked(name)}{suffix}{{run=~"$run", job!="{PUSHED_JOB}"}}'


@dataclass
class Panel:
    """A graph, or a table of labels. `lines` are (expression, legend); `metric` is the series that describes the panel."""

    title: str
    metric: str
    lines: list[tuple[str, str]]
    unit: str = "short"
    options: dict[str, object] = field(default_factory=dict)
    table: bool = False


def gauge(title: str, name: str, unit: str = "short", **options: object) -> Panel:
    """Return a panel of one metric with a line for each combination of label values."""
    labels = {metric.name: metric.labels for metric in RunMetrics().documented}.get(name, {})
    legend = " ".join(f"{{{{{label}}}}}" for label in ("instance", *labels))
    return Panel(title, name, [(series(name), legend)], unit, options)


def quantile(share: float) -> tuple[str, str]:
    buckets = f"rate({series('pkd_step_seconds', '_bucket')}[$__rate_interval])"
    return f"histogram_quantile({share}, sum by (instance, le) ({buckets}))", f"{{{{instance}}}} p{share * 100:g}"


def per_second(name: str) -> list[tuple[str, str]]:
    return [(f"rate({series(name)}[$__rate_interval])", "{{instance}}")]


LOGARITHMIC = {"scaleDistributionType": "log", "scaleDistributionLog": 10}

ROWS: dict[str, list[Panel]] = {
    "Runs": [
        Panel("Stage", "pkd_stage", [(f"{series('pkd_stage')} == 1", "{{instance}} {{stage}}")]),
        Panel("Steps", "pkd_step", [(series("pkd_step"), "{{instance}} {{stage}}"), (series("pkd_steps_total_expected"), "{{instance}} {{stage}} end")]),
        Panel("Remaining time of this training", "pkd_expected_end_timestamp_seconds",
              [(f"{series('pkd_expected_end_timestamp_seconds')} - time()", "{{instance}} {{stage}}")], "s"),
        gauge("Epochs", "pkd_epoch"),
        Panel("Run details", "pkd_info", [(series("pkd_info"), "")], table=True),
    ],
    "Training": [
        gauge("Loss", "pkd_loss", **LOGARITHMIC),
        gauge("Evaluation", "pkd_eval_metric"),
        gauge("Main metric on dev during training", "pkd:dev_metric"),
        gauge("Gradient norm", "pkd_grad_norm", **LOGARITHMIC),
        gauge("Learning rate", "pkd_learning_rate"),
        gauge("Loss scale", "pkd_loss_scale", **LOGARITHMIC),
    ],
    "Speed": [
        gauge("Examples per second", "pkd:samples:rate5m", "cps"),
        Panel("Tokens per second", "pkd_tokens_total", per_second("pkd_tokens_total"), "cps"),
        Panel("Total examples", "pkd_samples_total", [(series("pkd_samples_total"), "{{instance}}")]),
        Panel("Step duration", "pkd_step_seconds", [quantile(0.5), quantile(0.95), quantile(0.99)], "s"),
        gauge("Mean step duration", "pkd:step_seconds:mean5m", "s"),
        gauge("Share of step time spent waiting for data", "pkd:data_wait:ratio5m", "percentunit"),
        Panel("Waiting for data", "pkd_data_wait_seconds_total", per_second("pkd_data_wait_seconds_total"), "percentunit"),
    ],
    "Teacher's cache": [
        gauge("Examples per second", "pkd:cache_rows:rate5m", "cps"),
        Panel("Remaining examples", "pkd_cache_rows_expected",
              [(f"{series('pkd_cache_rows_expected')} - {series('pkd_cache_rows_total')}", "{{instance}}")]),
    ],
    "Sweeps": [
        gauge("Trials", "pkd_sweep_trials"),
        gauge("Best score", "pkd_sweep_best_value"),
        gauge("Workers", "pkd_sweep_workers"),
        gauge("Students per step", "pkd_sweep_students_per_step"),
    ],
    "Reliability": [
        Panel("Time since the last checkpoint", "pkd_checkpoint_last_success_timestamp_seconds",
              [(f"time() - ({series('pkd_checkpoint_last_success_timestamp_seconds')} > 0)", "{{instance}}")], "s"),
        gauge("Duration of the last checkpoint", "pkd_checkpoint_seconds", "s"),
        Panel("Early ends", "pkd_preemptions_total",
              [(series("pkd_preemptions_total"), "{{instance}} preempted"), (series("pkd_nonfinite_total"), "{{instance}} non-finite")]),
        Panel("Exit status (pushed)", "pkd_run_end_status",
              [(f'{checked("pkd_run_end_status")}{{run=~"$run"}}', "{{instance}} {{stage}} {{host}}")]),
    ],
    "Machine": [
        gauge("GPU memory", "pkd_gpu_memory_bytes", "bytes"),
        gauge("Required share of GPU memory", "pkd:gpu_memory:ratio", "percentunit"),
        Panel("Process memory", "process_resident_memory_bytes",
              [(series("process_resident_memory_bytes"), "{{instance}}")], "bytes"),
        Panel("Process CPU cores", "process_cpu_seconds_total", per_second("process_cpu_seconds_total")),
    ],
}  # fmt: skip


def dashboard() -> grafana.Dashboard:
    panels: list[object] = []
    y = 0
    for row, graphs in ROWS.items():
        panels.append(grafana.RowPanel(title=row, gridPos=grafana.GridPos(h=1, w=24, x=0, y=y)))
        y += 1
        for number, graph in enumerate(graphs):
            line, column = divmod(number, 24 // WIDTH)
            panels.append(_render(graph, grafana.GridPos(h=HEIGHT, w=WIDTH, x=column * WIDTH, y=y + line * HEIGHT)))
        y += HEIGHT * -(-len(graphs) // (24 // WIDTH))
    return grafana.Dashboard(
        title="Patient Knowledge Distillation",
        uid="pkd-dist",
        schemaVersion=30,  # Grafana 8; newer versions migrate it. The default of grafanalib, 12, ignores gridPos
        tags=["pkd"],
        timezone="browser",
        refresh="30s",
        time=grafana.Time("now-3h", "now"),
        templating=grafana.Templating(
            [
                grafana.Template(name="source", label="Prometheus", type="datasource", query="prometheus"),
                grafana.Template(
                    name="run", label="Run", query=f"label_values({checked('pkd_stage')}, run)", dataSource=SOURCE,
                    includeAll=True, multi=True, allValue=".*", default="$__all",
                ),
            ]
        ),
        annotations=grafana.Annotations([]),
        panels=panels,
    ).auto_panel_ids()  # fmt: skip


def _render(panel: Panel, position: grafana.GridPos) -> grafana.Panel:
    kind, target, style = (
        grafana.TimeSeries,
        {},
        {"legendDisplayMode": "list", "tooltipMode": "multi", "unit": panel.unit},
    )
    if panel.table:
        kind, target, style = grafana.Table, {"format": "table", "instant": True}, {}
    return kind(
        title=panel.title,
        description=DESCRIPTIONS[panel.metric],
        dataSource=SOURCE,
        targets=[
            grafana.Target(expr=expression, legendFormat=legend, refId=chr(ord("A") + i), **target)
            for i, (expression, legend) in enumerate(panel.lines)
        ],
        gridPos=position,
        maxDataPoints=None,
        **style,
        **panel.options,
    )


def text() -> str:
    return json.dumps(dashboard().to_json_data(), cls=DashboardEncoder, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
