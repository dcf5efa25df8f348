"""Curves of the training: dev after each epoch, losses and learning rate by step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from pkd_dist.metric_names import LOSS_TERMS, SHARES
from pkd_dist.report.charts.drawing import COLORS, Draw, Plot, count_axis, plot
from pkd_dist.report.run import Run

_MAX_POINTS = 600
_MAX_EPOCH_LINES = 12


def running_mean(values_S: np.ndarray) -> np.ndarray:
    """Return the (S,) centered mean over 1/25 of the steps; the window is shorter at both ends."""
    half, at = max(1, len(values_S) // 50), np.arange(len(values_S))
    sums = np.concatenate([[0.0], np.cumsum(values_S)])
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values_S))
    return (sums[last] - sums[first]) / (last - first)


def curves(run: Run) -> Iterator[Plot]:
    """Draw dev by epoch, each loss term that was used, and the learning rate."""
    yield _dev(run)
    yield from _divergence(run)
    for term, values_S in run.steps.losses.items():
        if values_S.any():
            means_S = running_mean(values_S)
            title = LOSS_TERMS[term]
            note = f"running mean from {means_S[0]:.3g} to {means_S[-1]:.3g}"
            yield plot(title, note, f"{title} by step: {note}", _by_step(run, means_S, values_S))
    rates_S = run.steps.learning_rate_S
    if len(rates_S):
        note = f"peak {rates_S.max():.3g}"
        yield plot("Learning rate", note, f"Learning rate by step, {note}", _by_step(run, rates_S))


def _by_step(run: Run, bold_S: np.ndarray, faint_S: np.ndarray | None = None) -> Draw:
    """Draw values by step, with vertical lines at the ends of epochs."""
    best = run.distillation.best.step
    epoch_ends = [evaluation.step for evaluation in run.distillation.history]
    if len(epoch_ends) > _MAX_EPOCH_LINES:
        epoch_ends = [best]
    every = slice(None, None, max(1, len(bold_S) // _MAX_POINTS))
    steps = run.steps.step_S[every]

    def draw(axes: Axes) -> None:
        for end in epoch_ends:
            if end == best:
                axes.axvline(end, color=COLORS["muted"], linewidth=0.9, linestyle="-")
            else:
                axes.axvline(end, color=COLORS["line"], linewidth=0.9, linestyle=(0, (2, 2)))
        if faint_S is not None:
            axes.plot(steps, faint_S[every], color=COLORS["student"], alpha=0.25, linewidth=0.7)
        axes.plot(steps, bold_S[every], color=COLORS["student"], linewidth=1.8)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
        axes.yaxis.offsetText.set_color(COLORS["muted"])
        count_axis(axes, "step")

    return draw


def _dev(run: Run) -> Plot:
    """Draw the main metric on dev after each epoch of the student and, while fine-tuning, of the teacher."""
    histories = {"teacher": run.teacher_history, "student": run.distillation.history}
    best, teacher = run.distillation.best, run.results.teacher.scores.main_metric

    def draw(axes: Axes) -> None:
        axes.axhline(teacher, color=COLORS["teacher"], linewidth=1.2, linestyle=(0, (5, 3)))
        for side, history in histories.items():
            epochs, values = [e.epoch for e in history], [e.main_metric for e in history]
            axes.plot(epochs, values, color=COLORS[side], linewidth=1.8, marker="o", markersize=4.5)
        axes.plot(best.epoch, best.main_metric, "o", ms=11, mfc="none", mec=COLORS["ink"], mew=1.6)
        axes.margins(y=0.15)
        axes.set_xlim(0.5, max(e.epoch for history in histories.values() for e in history) + 0.5)
        count_axis(axes, "epoch")
        if run.task.main_metric in SHARES:
            low, high = axes.get_ylim()
            form = "{:.0%}" if high - low > 0.08 else "{:.1%}"
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: form.format(y)))

    note = f"ring: best, {run.metric_value(best.main_metric)}; dashed: teacher, {run.metric_value(teacher)}"
    title = f"{run.results.split} {run.metric} by epoch"
    return plot(title[0].upper() + title[1:], note, f"{title}; {note}", draw)


def _divergence(run: Run) -> Iterator[Plot]:
    """Draw how far the student is from the teacher on dev after each epoch."""
    found = [(e.epoch, e.divergence) for e in run.distillation.history if e.divergence is not None]
    best = run.distillation.best
    if not found or best.divergence is None:
        return
    epochs, values = zip(*found, strict=True)
    marked = best.epoch, best.divergence

    def draw(axes: Axes) -> None:
        axes.plot(epochs, values, color=COLORS["student"], linewidth=1.8, marker="o", markersize=4.5)
        axes.plot(*marked, "o", ms=11, mfc="none", mec=COLORS["ink"], mew=1.6)
        axes.margins(y=0.15)
        axes.set_xlim(0.5, max(epochs) + 0.5)
        count_axis(axes, "epoch")

    what = (
        "mean squared difference of the standardized outputs"
        if run.task.regression
        else f"KL(teacher || student), nats{', mean over classes' if run.task.multilabel else ''}"
    )
    title = f"{run.results.split} divergence from the teacher"
    note = f"{what}; ring: best epoch, {best.divergence:.3g}"
    yield plot(title[0].upper() + title[1:], note, f"{title} by epoch; {note}", draw)
