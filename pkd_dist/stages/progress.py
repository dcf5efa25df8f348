"""What the two training stages share."""

from __future__ import annotations

from pathlib import Path

from pkd_dist.stages.context import Context
from pkd_dist.telemetry import records
from pkd_dist.training import checkpoint

EpochScores = dict[str, int | float]
"""`epoch`, `step`, and the scores on dev after it."""


def republish_training(context: Context, lines: Path, checkpoints: Path) -> None:
    """Set the gauges to where an earlier process left a training that is done."""
    if not context.world.node_main:
        return
    metrics = context.telemetry.metrics
    metrics.eval_metric.clear()
    metrics.show_past(records.read_complete(lines))
    if commits := checkpoint.committed(checkpoints):
        metrics.checkpoint_time.set((commits[-1] / checkpoint.COMMIT).stat().st_mtime)
