"""What each exported file costs and what it scores: score against size, and against latency.

A file is a point with the interval of its score, and a flag on a pole above the axes. Files can lie close together or on top of
each other, so a flag that would meet a pole to its right, or another flag, is raised above all of these.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pkd_dist.evaluation.deployment import TEACHER, Deployment, ModelRow
from pkd_dist.metric_names import METRICS, SHARES
from pkd_dist.report.charts.drawing import COLORS, Plot, plot

_AXES_WIDTH, _AXES_HEIGHT = 2.4, 1.7
"""Of the axes in inches, at least."""
_LETTER, _LINE = 0.075, 0.16
"""Width of a letter, at most, and height of a line of a flag in inches."""


def tradeoffs(table: Deployment) -> Iterator[Plot]:
    """Draw the score against size and latency; nothing for what was not measured."""
    scored = [row for row in table.rows if row.score is not None]
    yield from _tradeoff(table, "size", "MB", [(row, row.bytes / 1e6) for row in scored if row.bytes])
    timed = [(row, row.speed["latency_ms_p50"]) for row in scored if row.speed is not None]
    yield from _tradeoff(table, "latency", "ms at batch 1, p50", timed)


def _tradeoff(table: Deployment, name: str, unit: str, costs: Sequence[tuple[ModelRow, float]]) -> Iterator[Plot]:
    if not costs:
        return
    costs = sorted(costs, key=lambda found: found[1])
    xs = np.asarray([cost for _, cost in costs])
    flags = [_flag(row, cost) for row, cost in costs]
    low, high = np.log(xs.min()), np.log(xs.max())
    margin = 0.08 * max(high - low, 1.0)
    left, right = low - margin, high + margin
    heights = raised((np.log(xs) - left) / (right - left) * _AXES_WIDTH, [_LETTER * len(flag) for flag in flags])

    def draw(axes: Axes) -> None:
        for (row, cost), flag, height in zip(costs, flags, heights, strict=True):
            color = COLORS["teacher" if row.file == TEACHER else "student"]
            assert row.score is not None
            bounds = row.score_interval_95 or (row.score, row.score)
            axes.plot([cost, cost], bounds, color=color, linewidth=1.6)
            axes.plot(cost, row.score, "o", color=color, ms=6.5 if row.file == table.deploy else 4.5)
            top = 1 + (height + 0.35) * _LINE / _AXES_HEIGHT
            pole = axes.get_xaxis_transform()
            axes.plot(
                [cost, cost], [0, top], color=COLORS["line"], linewidth=0.8, transform=pole, clip_on=False, zorder=0
            )
            weight = "bold" if row.file == table.deploy else "normal"
            axes.annotate(flag, (cost, top), (2, 0), xycoords=pole, textcoords="offset points", va="center", fontsize=8,
                          weight=weight, annotation_clip=False)  # fmt: skip
        axes.set_xscale("log")
        axes.set_xlim(float(np.exp(left)), float(np.exp(right)))
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(y=0.1)
        if table.metric in SHARES:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}%"))
        axes.set_xlabel(f"{unit}, lower is better")
        axes.grid(axis="y")

    metric = METRICS[table.metric]
    title = f"{metric[0].upper()}{metric[1:]} and {name}"
    said = "; ".join(f"{flag}, {table.score(row)}" for (row, _), flag in zip(costs, flags, strict=True))
    note = f"on {table.on}, with 95% intervals; bold: the file to deploy"
    yield plot(title, note, f"{title}: {said}", draw, height=_AXES_HEIGHT + 0.6 + _LINE * (1 + max(heights)))


def _flag(row: ModelRow, cost: float) -> str:
    name = "teacher" if row.file == TEACHER else row.title.removeprefix("student, ")
    return f"{name} {cost:.3g}"


def raised(x_F: np.ndarray, widths: Sequence[float]) -> list[int]:
    """Return the line of each flag, 0 the lowest, so that no flag covers another or a pole.

    Args:
        x_F: Where the flags begin, in ascending order.
        widths: Of the flags, in the unit of `x_F`.
    """
    lines = [0] * len(x_F)
    for i in reversed(range(len(x_F))):
        met = [lines[j] for j in range(i + 1, len(x_F)) if x_F[j] < x_F[i] + widths[i]]
        lines[i] = max(met, default=-1) + 1
    return lines
