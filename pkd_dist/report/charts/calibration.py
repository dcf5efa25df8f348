"""Reliability diagrams: how often the student is right, against how sure it is, before and after calibration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from pkd_dist.evaluation.calibration import FITTED_ON, Bin, Calibration
from pkd_dist.evaluation.intervals import wilson_interval
from pkd_dist.report.charts.drawing import COLORS, Plot, plot

_MIN_EXAMPLES = 5
"""Bins with fewer are not drawn: their accuracy says nothing."""


def diagrams(found: Calibration) -> Iterator[Plot]:
    """Draw the reliability of the student on each split."""
    for split, each in found["splits"].items():
        before, after = ([b for b in each[when]["bins"] if b["n"] >= _MIN_EXAMPLES] for when in ("before", "after"))
        errors = f"ECE {each['before']['ece']:.3f} before, {each['after']['ece']:.3f} after"
        title = f"Reliability on {split.replace('_', ' ')}"
        note = (
            f"{each['n']:,} examples{', on which the temperature was fitted' if split == FITTED_ON else ''}; {errors}"
        )
        points = "; ".join(f"confidence {b['confidence']:.0%}, accuracy {b['accuracy']:.0%}" for b in after)
        yield plot(title, note, f"{title}: {errors}; after: {points}", _Diagram(before, after), 3.2)


class _Diagram:
    def __init__(self, before: Sequence[Bin], after: Sequence[Bin]):
        self._before, self._after = before, after
        self._low = min([0.95, *(min(b["confidence"], b["accuracy"]) for b in (*before, *after))])

    def __call__(self, axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=COLORS["muted"], linewidth=0.9, linestyle=(0, (4, 3)))
        _draw(axes, self._before, "muted", "before", filled=False)
        _draw(axes, self._after, "student", "after", filled=True)
        low = max(0.0, self._low - 0.04)
        axes.set(xlim=(low, 1.005), ylim=(max(0.0, low - 0.1), 1.01), xlabel="mean confidence", ylabel="accuracy")
        axes.xaxis.set_major_formatter(PercentFormatter(1, 0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, 0))
        axes.grid(axis="both")
        axes.legend(loc="upper left", frameon=False, fontsize=8)


def _draw(axes: Axes, bins: Sequence[Bin], color: str, name: str, filled: bool) -> None:
    """Draw bins with the Wilson interval of their accuracy; the area of a dot grows with the bin's examples."""
    x, y = np.asarray([b["confidence"] for b in bins]), np.asarray([b["accuracy"] for b in bins])
    counts = np.asarray([b["n"] for b in bins])
    for place, each in zip(x, bins, strict=True):
        axes.plot([place, place], wilson_interval(each["accuracy"], each["n"]), color=COLORS[color], linewidth=1.1)
    axes.plot(x, y, color=COLORS[color], linewidth=1.2, linestyle="-" if filled else (0, (1, 1.5)))
    face = COLORS[color] if filled else "none"
    sizes = 10 + 60 * counts / max(1, counts.sum())
    axes.scatter(x, y, s=sizes, facecolors=face, edgecolors=COLORS[color], linewidths=1.1, label=name, zorder=3)
