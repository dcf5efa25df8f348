"""Where the time went: by stage, in the distill stage, and in a training step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pkd_dist.report.charts.drawing import Plot, bars
from pkd_dist.report.format import duration
from pkd_dist.report.run import Run

PARTS = {
    "data": "waiting for data",
    "forward": "forward pass",
    "backward": "backward pass",
    "ranks": "waiting for ranks",
    "optimizer": "optimizer",
    "device": "whole step on the GPU",
}
"""Part of a step, as in metrics.jsonl -> display name."""


def times(run: Run) -> Iterator[Plot]:
    """Draw the charts for which there is data."""
    seconds = {stage.name: stage.seconds for stage in run.stages}
    yield bars("Stages", f"total {duration(sum(seconds.values()))}", seconds, ["muted"] * len(seconds), duration)
    distill = next(stage for stage in run.stages if stage.name == "distill")
    if len(run.steps.seconds) == run.distillation.steps and distill.starts == 1:  # else some of its time is unknown
        yield _distill_stage(run, distill.seconds)
    if run.steps.seconds:
        yield _step(run)


def _distill_stage(run: Run, total: float) -> Plot:
    steps = sum(seconds["step"] for seconds in run.steps.seconds)
    evaluations = run.distillation.evaluation_seconds
    other = max(0.0, total - steps - evaluations)
    values = {"steps": steps, "evaluations": evaluations, "startup, checkpoints": other}
    return bars("Distill stage", f"total {duration(total)}", values, ["student"] * len(values), duration)


def _step(run: Run) -> Plot:
    timed = run.steps.seconds
    means = {part: float(np.mean([seconds.get(part, 0.0) for seconds in timed])) for part in ("step", *PARTS)}
    values = {name: means[part] for part, name in PARTS.items() if means[part]}
    values["other"] = max(0.0, means["step"] - sum(means[part] for part in PARTS))
    median = float(np.median([seconds["step"] for seconds in timed]))
    note = f"mean {duration(means['step'])}, median {duration(median)}, on rank 0; forward includes the teacher outputs"
    return bars(
        "Training step", note, values, ["student"] * len(values),
        lambda value: f"{duration(value)}, {value / max(means['step'], 1e-9):.0%}",
    )  # fmt: skip
