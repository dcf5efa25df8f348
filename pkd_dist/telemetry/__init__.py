"""What people and machines see of a run: messages, progress bars, metrics.jsonl, Prometheus."""

from __future__ import annotations

from dataclasses import dataclass

from pkd_dist.telemetry.metrics import RunMetrics


@dataclass(frozen=True)
class Telemetry:
    """What a stage reports to. On ranks other than 0 the metrics are kept but nothing is shown."""

    metrics: RunMetrics
    show: bool
