"""What people and machines see of a run: messages, progress bars, metrics.jsonl, Prometheus, other trackers."""

from __future__ import annotations

from dataclasses import dataclass, field

from pkd_dist.telemetry.metrics import RunMetrics
from pkd_dist.telemetry.trackers import Trackers


@dataclass(frozen=True)
class Telemetry:
    """What a stage reports to. On ranks other than 0 the metrics are kept but nothing is shown."""

    metrics: RunMetrics
    show: bool
    trackers: Trackers = field(default_factory=Trackers)
