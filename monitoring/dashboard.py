"""Writes the Grafana dashboard, monitoring/grafana/pkd.json, out of the metrics that the code declares.

Every name of a series goes through `series`, which knows what a run exports and what rules/recording.yml records: a panel
cannot name anything else. `make docs` runs this; a test holds the file current.
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


def helps() -> dict[str, str]:
    """What can be shown, and what it is: every exported metric and every recorded series."""
    metrics = RunMetrics()
    exported = {
        metric.name + "_total" * (metric.type == "counter"): metric.documentation  # those of the process too
        for metric in metrics.registry.collect()
    }
    groups = yaml.safe_load((HERE / "rules" / "recording.yml").read_text())["groups"]
    return exported | {rule["record"]: f"Recorded: {rule['expr']}" for group in groups for rule in group["rules"]}


HELPS = helps()


def known(name: str) -> str:
    """The name itself, of a series that there is."""
    if name not in HELPS:
        raise KeyError(f"{name}: nothing of that name is exported or recorded")
    return name


def series(name: str, suffix: str = "") -> str:
    """A selector of the chosen runs; `suffix` of a histogram: `_bucket`, `_sum` or `_count`."""
    return f'{known(name)}{suffix}{{run=~"$run", job!="{PUSHED_JOB}"}}'


@dataclass
class Panel:
    """One graph, or a table of labels: `lines` are (expression, legend); `about` is the metric whose help describes it."""

    title: str
    about: str
    lines: list[tuple[str, str]]
    unit: str = "short"
    options: dict[str, object] = field(default_factory=dict)
    table: bool = False


def gauge(title: str, name: str, unit: str = "short", **options: object) -> Panel:
    """A panel of one metric as it is, a line for each label's value."""
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
    "Where the runs stand": [
        Panel("Stage", "pkd_stage", [(f"{series('pkd_stage')} == 1", "{{instance}} {{stage}}")]),
        gauge("Steps", "pkd_step"),
        gauge("Epochs", "pkd_epoch"),
        Panel("What runs", "pkd_info", [(series("pkd_info"), "")], table=True),
    ],
    "Training": [
        gauge("Loss", "pkd_loss", **LOGARITHMIC),
        gauge("Evaluation", "pkd_eval_metric"),
        gauge("The task's metric on dev, while training", "pkd:dev_metric"),
        gauge("Gradient norm", "pkd_grad_norm", **LOGARITHMIC),
        gauge("Learning rate", "pkd_learning_rate"),
        gauge("Loss scale", "pkd_loss_scale", **LOGARITHMIC),
    ],
    "Speed": [
        gauge("Examples a second", "pkd:samples:rate5m", "cps"),
        Panel("Tokens a second", "pkd_tokens_total", per_second("pkd_tokens_total"), "cps"),
        Panel("Examples so far", "pkd_samples_total", [(series("pkd_samples_total"), "{{instance}}")]),
        Panel("Seconds of a step", "pkd_step_seconds", [quantile(0.5), quantile(0.95), quantile(0.99)], "s"),
        gauge("Mean seconds of a step", "pkd:step_seconds:mean5m", "s"),
        gauge("Share of a step that waits for data", "pkd:data_wait:ratio5m", "percentunit"),
        Panel("Waiting for data", "pkd_data_wait_seconds_total", per_second("pkd_data_wait_seconds_total"), "percentunit"),
    ],
    "Teacher's cache": [
        gauge("Rows a second", "pkd:cache_rows:rate5m", "cps"),
        Panel("Rows to go", "pkd_cache_rows_expected",
              [(f"{series('pkd_cache_rows_expected')} - {series('pkd_cache_rows_total')}", "{{instance}}")]),
    ],
    "Safety": [
        Panel("Since the last checkpoint", "pkd_checkpoint_last_success_timestamp_seconds",
              [(f"time() - ({series('pkd_checkpoint_last_success_timestamp_seconds')} > 0)", "{{instance}}")], "s"),
        gauge("Seconds of the last checkpoint", "pkd_checkpoint_seconds", "s"),
        Panel("Ends", "pkd_preemptions_total",
              [(series("pkd_preemptions_total"), "{{instance}} preempted"), (series("pkd_nonfinite_total"), "{{instance}} not finite")]),
    ],
    "Machine": [
        gauge("GPU memory", "pkd_gpu_memory_bytes", "bytes"),
        gauge("GPU memory that is needed", "pkd:gpu_memory:ratio", "percentunit"),
        Panel("Memory of the process", "process_resident_memory_bytes",
              [(series("process_resident_memory_bytes"), "{{instance}}")], "bytes"),
        Panel("Cores used by the process", "process_cpu_seconds_total", per_second("process_cpu_seconds_total")),
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
            panels.append(_graph(graph, grafana.GridPos(h=HEIGHT, w=WIDTH, x=column * WIDTH, y=y + line * HEIGHT)))
        y += HEIGHT * -(-len(graphs) // (24 // WIDTH))
    return grafana.Dashboard(
        title="Patient Knowledge Distillation",
        uid="pkd-dist",
        schemaVersion=30,  # of Grafana 8: later ones bring it up to date; grafanalib's own would be read as of rows
        tags=["pkd"],
        timezone="browser",
        refresh="30s",
        time=grafana.Time("now-3h", "now"),
        templating=grafana.Templating(
            [
                grafana.Template(name="source", label="Prometheus", type="datasource", query="prometheus"),
                grafana.Template(
                    name="run", label="Run", query=f"label_values({known('pkd_stage')}, run)", dataSource=SOURCE,
                    includeAll=True, multi=True, allValue=".*", default="$__all",
                ),
            ]
        ),
        annotations=grafana.Annotations([]),
        panels=panels,
    ).auto_panel_ids()  # fmt: skip


def _graph(panel: Panel, place: grafana.GridPos) -> grafana.Panel:
    kind, form, look = grafana.TimeSeries, {}, {"legendDisplayMode": "list", "tooltipMode": "multi", "unit": panel.unit}
    if panel.table:
        kind, form, look = grafana.Table, {"format": "table", "instant": True}, {}
    return kind(
        title=panel.title,
        description=HELPS[panel.about],
        dataSource=SOURCE,
        targets=[
            grafana.Target(expr=expression, legendFormat=legend, refId=chr(ord("A") + i), **form)
            for i, (expression, legend) in enumerate(panel.lines)
        ],
        gridPos=place,
        maxDataPoints=None,
        **look,
        **panel.options,
    )


def text() -> str:
    return json.dumps(dashboard().to_json_data(), cls=DashboardEncoder, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
