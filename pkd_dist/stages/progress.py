"""What the two training stages share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pkd_dist.stages.context import Context
from pkd_dist.telemetry import records
from pkd_dist.telemetry.log import log
from pkd_dist.training import checkpoint

EpochScores = dict[str, int | float]
"""`epoch`, `step`, and the scores on dev after it."""


def republish_training(
    context: Context, stage: str, lines: Path, checkpoints: Path, history: Sequence[EpochScores]
) -> None:
    """Set the gauges to where an earlier process left a training that is done.

    Args:
        stage: `teacher` or `distill`.
        lines: its metrics file; a warning says where it lacks an evaluation.
        history: its evaluations.
    """
    if not context.world.node_main:
        return
    metrics = context.telemetry.metrics
    found = list(records.read_complete(lines))
    lost = len({entry["step"] for entry in history} - {line["step"] for line in found if "split" in line})
    if lost:
        altered = max(lines.parent.glob(f"{lines.name}.altered.*"), key=lambda path: path.stat().st_mtime, default=None)
        log.warning(
            "%s: %s, and cannot be made again; the model is not affected, but a report made now is incomplete; restore the file "
            "if there is a copy", lines,
            f"lacks {lost} of the {len(history)} evaluations of its training" if lines.exists() or altered is None
            else f"was altered or cut after its training: {altered} is what was found, and which of its lines are true is unknown",
        )  # fmt: skip
    metrics.show_past(stage, found)
    if commits := checkpoint.committed(checkpoints):
        metrics.checkpoint_time.set((commits[-1] / checkpoint.COMMIT).stat().st_mtime)
