"""Teacher and student on dev: speed, confusion matrices, and the predictions of a regression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pkd_dist.evaluation.results import SIDES, threads
from pkd_dist.report.charts.drawing import COLORS, Draw, Plot, bars, plot
from pkd_dist.report.run import Run

MAX_CLASSES = 20
"""Classes shown in a confusion matrix: the most frequent ones."""
_MAX_DOTS = 1500
_PERCENTILES = (50, 95, 99)


def latency(run: Run) -> Plot:
    """Draw the cumulative distribution of the latency of single-sentence requests."""
    latencies = {side: values for side in SIDES if (values := run.results.models[side].latencies_ms)}
    marks = {side: np.percentile(values, _PERCENTILES) for side, values in latencies.items()}
    shares = np.linspace(0, 1, 401)
    lines = {side: np.percentile(values, 100 * shares) for side, values in latencies.items()}
    longest, shortest = max(values[-3] for values in lines.values()), min(values[0] for values in lines.values())

    def draw(axes: Axes) -> None:
        for side, values in lines.items():
            axes.plot(values, shares, color=COLORS[side], linewidth=1.8)
            axes.plot(marks[side], (0.5, 0.95, 0.99), "o", color=COLORS[side], ms=4.5)
        if longest > 8 * shortest:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.set_xlim(right=1.1 * longest)
        axes.set_yticks((0, 0.25, 0.5, 0.75, 0.95), ("0%", "25%", "50%", "75%", "95%"))
        axes.set(xlabel="ms, lower is better", ylim=(0, 1.02))
        axes.grid(axis="both")

    percentiles = "; ".join(
        f"{side} {', '.join(f'p{p} {value:.2f}' for p, value in zip(_PERCENTILES, values, strict=True))} ms"
        for side, values in marks.items()
    )
    note = (
        f"share of {len(latencies['student'])} single-{_unit(run)} requests answered within the time; dots: p50, p95, p99; "
        f"the slowest 0.5% are not shown{threads(run.results.student.threads)}"
    )
    return plot("Latency at batch 1", note, f"Latency at batch 1: {percentiles}", draw)


def _unit(run: Run) -> str:
    """Return what a request holds one of."""
    return "example" if run.task.multiple_choice else "sentence"


def throughput(run: Run) -> Plot:
    """Draw the sentences per second of both models."""
    rates = {side: rate for side in SIDES if (rate := run.results.models[side].sentences_per_second)}
    passes = {side: run.results.models[side].rates for side in rates}
    note = (
        f"{_unit(run)}s per second in batches of {run.config.evaluate.batch_size}, higher is better; rings: single passes"
        f"{threads(run.results.student.threads)}"
    )
    return bars("Throughput", note, rates, list(rates), "{:,.0f}".format, passes)


def matrices(run: Run) -> Iterator[Plot]:
    """Draw the confusion matrix of each model; the opacity of a cell is its share of the true class."""
    for side, counts_CC in run.confusion.items():
        support_C = counts_CC.sum(axis=1)
        chosen = np.sort(np.argsort(-support_C, kind="stable")[:MAX_CLASSES])
        names = [run.class_names[i] for i in chosen]
        counts = counts_CC[np.ix_(chosen, chosen)]
        shares = counts / np.maximum(support_C[chosen, None], 1)
        recall = ", ".join(f"{name} {share:.0%}" for name, share in zip(names, shares.diagonal(), strict=True))
        label = f"Confusion matrix of the {side}; recall of each class: {recall}"
        draw = _matrix(counts, shares, names, COLORS[side])
        yield plot(side.capitalize(), "", label, draw, height=min(2 + 0.4 * len(chosen), 4.4))


def _matrix(counts_CC: np.ndarray, shares_CC: np.ndarray, names: Sequence[str], color: str) -> Draw:
    few, size = len(names) < 9, 9 if len(names) < 6 else 7
    short = [name if len(name) <= 14 else f"{name[:8]}…{name[-5:]}" for name in names]

    def draw(axes: Axes) -> None:
        for (row, column), share in np.ndenumerate(shares_CC):
            corner = (column - 0.48, row - 0.48)
            axes.add_patch(Rectangle(corner, 0.96, 0.96, facecolor=color, alpha=0.05 + 0.55 * share))
            if few or counts_CC[row, column]:
                text = f"{counts_CC[row, column]:,}" + (f"\n{share:.0%}" if few else "")
                axes.text(column, row, text, ha="center", va="center", fontsize=size if few else 6)
        axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), xlabel="predicted", ylabel="true")
        if len(names) > 3:
            axes.set_xticks(range(len(names)), short, rotation=60, ha="right", rotation_mode="anchor")
        else:
            axes.set_xticks(range(len(names)), short)
        axes.set_yticks(range(len(names)), short)
        axes.tick_params(length=0, labelsize=size)
        axes.spines["bottom"].set_visible(False)

    return draw


def scatters(run: Run) -> Iterator[Plot]:
    """Draw, for a regression, the predictions of each model against the labels and against each other."""
    every = slice(None, None, -(-len(run.dev.labels_N) // _MAX_DOTS))
    labels, predicted = run.dev.labels_N[every], {side: run.predicted(side)[every] for side in SIDES}
    sample = f", {len(labels):,} of {len(run.dev.labels_N):,} examples" if len(labels) < len(run.dev.labels_N) else ""
    for side in SIDES:
        names = ("label", f"prediction of the {side}")
        yield _scatter(side.capitalize(), f"line: equality{sample}", names, labels, predicted[side], side)
    names = ("prediction of the teacher", "prediction of the student")
    note = f"line: equality{sample}"
    yield _scatter("Student and teacher", note, names, predicted["teacher"], predicted["student"], "ink")


def _scatter(title: str, note: str, names: tuple[str, str], x_N: np.ndarray, y_N: np.ndarray, color: str) -> Plot:
    x, y = names

    def draw(axes: Axes) -> None:
        low, high = min(x_N.min(), y_N.min()), max(x_N.max(), y_N.max())
        axes.plot([low, high], [low, high], color=COLORS["muted"], linewidth=0.9, linestyle=(0, (4, 3)))
        axes.scatter(x_N, y_N, s=9, color=COLORS[color], alpha=0.45, linewidths=0)
        axes.set(xlabel=x, ylabel=y)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="both")

    difference = float(np.abs(y_N - x_N).mean())
    return plot(title, note, f"{title}: {y} against {x}, mean absolute difference {difference:.3g}", draw, 3.4)
