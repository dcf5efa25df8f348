"""What people and machines see of a run: log messages, progress bars, metrics.jsonl, Prometheus, other trackers."""

from __future__ import annotations

from dataclasses import dataclass, field

from pkd_dist.telemetry.metrics import RunMetrics
from pkd_dist.telemetry.trackers import Trackers


@dataclass(frozen=True)
class Telemetry:
    """Where a stage reports to.

    Attributes:
        metrics: Prometheus metrics; every rank updates its own.
        show: whether this rank shows progress bars.
        trackers: TensorBoard and Weights & Biases.
    """

    metrics: RunMetrics
    show: bool
    trackers: Trackers = field(default_factory=Trackers)
