"""Charts of runs as inline SVG, whose colours are the page's CSS variables, so that one drawing serves light, dark and
print."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from pkd_dist.evaluation.results import SIDES
from pkd_dist.report.runs import Run, duration

MOST_CLASSES = 20
"""Classes that a confusion matrix shows; beyond, the most frequent."""
MOST_RUNS = 8
"""Runs that a page has colours for."""
MOST_DOTS = 1500
LOSSES = {
    "loss": "Total loss",
    "loss_ce": "CE, the labels",
    "loss_ds": "DS, the teacher's predictions",
    "loss_pt": "PT, the teacher's layers",
}
NAMES = ("ink", "muted", "line", "teacher", "student", *(f"run-{i}" for i in range(1, MOST_RUNS + 1)))
COLOURS = {name: f"#fe01{i:02x}" for i, name in enumerate(NAMES)}
"""CSS variable -> the placeholder that stands for it while matplotlib draws."""
DASHES: Sequence[Any] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["line"],
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.7,
    "ytick.major.size": 0,
    **{f"axes.spines.{side}": False for side in ("top", "right", "left")},
    **{f"{axis}tick.color": COLOURS["line"] for axis in "xy"},
    **{f"{axis}tick.labelcolor": COLOURS["muted"] for axis in "xy"},
}

Plot = dict[str, Any]
"""`title`, `svg`, `note`."""
Draw = Callable[[Axes], None]


def _plot(title: str, note: str, label: str, draw: Draw, height: float = 2.5, width: float = 4.2) -> Plot:
    """A drawing as inline SVG, about as wide as a telephone: no identifiers shared with another, no address, no fixed size."""
    with mpl.rc_context(STYLE | {"svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has it
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = re.sub(r"<defs>\s*<style.*?</defs>", "", buffer.getvalue(), count=1, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box, "matplotlib writes one"
    svg = f'<svg {box[0]} role="img" aria-label="{escape(label)}">' + svg[svg.index(">") + 1 :]
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return {"title": title, "note": note, "svg": Markup(svg)}


def _scale(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y")


def _bars(
    title: str,
    note: str,
    bars: dict[str, tuple[float, str]],
    shown: Callable[[float], str],
    dots: dict[str, list[float]] | None = None,
) -> Plot:
    """Horizontal bars, name -> (value, colour), each with its value behind it; dots: what the values are medians of."""

    def draw(axes: Axes) -> None:
        widths = [value for value, _ in bars.values()]
        axes.barh(list(bars), widths, height=0.62, color=[COLOURS[colour] for _, colour in bars.values()])
        ends = list(widths)
        for row, name in enumerate(bars):
            each = (dots or {}).get(name, [])
            axes.plot(each, [row] * len(each), "o", ms=3.5, mfc="none", mec=COLOURS["ink"], mew=0.9)
            ends[row] = max([widths[row], *each])
        for row, value in enumerate(widths):
            axes.annotate(shown(value), (ends[row], row), (6, 0), textcoords="offset points", va="center")
        axes.set(xlim=(0, 1.32 * max(ends) or 1), ylim=(len(bars) - 0.4, -0.6))
        axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)

    label = f"{title}: " + ", ".join(f"{name} {shown(value)}" for name, (value, _) in bars.items())
    return _plot(title, note, label, draw, 0.5 + 0.26 * len(bars))


# ----------------------------------------------------------------------------------------------------- what was run


def layers(run: Run) -> Plot:
    """Both models as stacks of layers, with what the student copies and what it learns from."""
    teacher, student = run.resolved["teacher_layers"], run.resolved["student_layers"]
    made_of = re.fullmatch(r"teacher layers \[([\d, ]+)\] \(from 0\)", run.outputs["init"]["made_of"])
    copied = [int(layer) + 1 for layer in made_of[1].split(",")] if made_of else []
    pairs = [tuple(pair) for pair in run.resolved["patience_pairs"]]
    distill = run.config.distill
    steps = {"teacher": 1.0, "student": max(1.0, teacher / student)}

    def draw(axes: Axes) -> None:
        top = max(teacher, student) + 1.0

        def height(side: str, layer: int) -> float:
            return top if layer > {"teacher": teacher, "student": student}[side] else layer * steps[side]

        def box(side: str, layer: int, text: str, soft: bool) -> None:
            x, y = {"teacher": 0.0, "student": 2.1}[side], height(side, layer)
            shape = FancyBboxPatch((x, y - 0.33), 1.3, 0.66, boxstyle="round,pad=0,rounding_size=0.12")
            shape.set(facecolor=COLOURS[side], alpha=0.1 if soft else 0.3, edgecolor="none")
            axes.add_patch(shape)
            axes.text(x + 0.65, y, text, ha="center", va="center", fontsize=8)

        def link(theirs: float, mine: float, text: str, bold: bool) -> None:
            style: dict[str, Any] = {"color": COLOURS["ink"], "linewidth": 1.3}
            if not bold:
                style = {"color": COLOURS["muted"], "linewidth": 1, "linestyle": (0, (2, 2))}
            axes.plot([1.3, 2.1], [theirs, mine], **style)
            if text:
                axes.text(1.7, (theirs + mine) / 2 + 0.12, text, ha="center", va="bottom", fontsize=7)

        paired = {theirs for _, theirs in pairs}
        for side, count in (("teacher", teacher), ("student", student)):
            box(side, 0, "embeddings", True)
            for layer in range(1, count + 1):
                used = layer in paired or layer in copied if side == "teacher" else True
                box(side, layer, f"layer {layer}", not used)
            box(side, count + 1, "classifier", False)
            axes.text(
                {"teacher": 0.65, "student": 2.75}[side], top + 0.75, side.capitalize(), ha="center", weight="bold"
            )
        for mine, theirs in enumerate(copied, start=1):
            if (mine, theirs) not in pairs:
                link(height("teacher", theirs), height("student", mine), "", False)
        for mine, theirs in pairs:
            link(height("teacher", theirs), height("student", mine), "PT", True)
        if distill.alpha:
            link(top, top, "DS", True)
        axes.set(xlim=(-0.1, 3.5), ylim=(-0.5, top + 1.1))
        axes.axis("off")

    words = [f"student {mine} learns from teacher {theirs}" for mine, theirs in pairs]
    words += [f"student {mine} starts as teacher {theirs}" for mine, theirs in enumerate(copied, start=1)]
    note = "solid: what the student learns from" + ("; dotted: what it starts as" if copied else "")
    return _plot("Layers", note, "Layers: " + ", ".join(words), draw, 1.2 + 0.24 * max(teacher, student))


# ----------------------------------------------------------------------------------------------------- training


def smooth(values_S: np.ndarray) -> np.ndarray:
    """The centred mean of a 25th of the steps; half of that at both ends."""
    half, at = max(1, len(values_S) // 50), np.arange(len(values_S))
    sums = np.concatenate([[0.0], np.cumsum(values_S)])
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values_S))
    return (sums[last] - sums[first]) / (last - first)


def _thin(count: int) -> slice:
    return slice(None, None, max(1, count // 600))


def curves(run: Run) -> Iterator[Plot]:
    """Each loss term that was used, the learning rate, and dev after each epoch."""
    yield dev_curve(run)
    steps = np.asarray([line["step"] for line in run.steps])
    ends = [entry["step"] for entry in run.outputs["distill"]["history"]]
    kept = next(
        e["step"] for e in run.outputs["distill"]["history"] if e["epoch"] == run.outputs["distill"]["best_epoch"]
    )
    for key, title in LOSSES.items():
        values = np.asarray([line[key] for line in run.steps], dtype=float)
        if values.any():
            means = smooth(values)
            note = f"running mean: {means[0]:.3g} at first, {means[-1]:.3g} at the end"
            yield _plot(title, note, f"{title} by step: {note}", _over_steps(steps, values, means, ends, kept))
    if len(steps):
        rates = np.asarray([line["learning_rate"] for line in run.steps])
        note = f"peak {rates.max():.3g}"
        yield _plot(
            "Learning rate", note, f"Learning rate by step, {note}", _over_steps(steps, rates, rates, ends, kept)
        )


def _over_steps(
    steps_S: np.ndarray, raw_S: np.ndarray, smooth_S: np.ndarray, epoch_ends: Sequence[int], kept: int
) -> Draw:
    def draw(axes: Axes) -> None:
        thin = _thin(len(steps_S))
        for end in epoch_ends if len(epoch_ends) <= 12 else (kept,):
            bold = end == kept
            colour, style = COLOURS["muted" if bold else "line"], "-" if bold else (0, (2, 2))
            axes.axvline(end, color=colour, linewidth=0.9, linestyle=style)
        if smooth_S is not raw_S:
            axes.plot(steps_S[thin], raw_S[thin], color=COLOURS["student"], alpha=0.25, linewidth=0.7)
        axes.plot(steps_S[thin], smooth_S[thin], color=COLOURS["student"], linewidth=1.8)
        _small_numbers(axes)
        _scale(axes, "step")

    return draw


def _small_numbers(axes: Axes) -> None:
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
    axes.yaxis.offsetText.set_color(COLOURS["muted"])


def dev_curve(run: Run) -> Plot:
    results, distilled = run.results, run.outputs["distill"]
    histories = {"teacher": run.outputs["teacher"].get("history") or [], "student": distilled["history"]}
    kept = next(entry for entry in distilled["history"] if entry["epoch"] == distilled["best_epoch"])
    final = results["teacher"]["main_metric"]

    def draw(axes: Axes) -> None:
        axes.axhline(final, color=COLOURS["teacher"], linewidth=1.2, linestyle=(0, (5, 3)))
        for side, history in histories.items():
            epochs, values = [e["epoch"] for e in history], [e["main_metric"] for e in history]
            axes.plot(epochs, values, color=COLOURS[side], linewidth=1.8, marker="o", markersize=4.5)
        axes.plot(kept["epoch"], kept["main_metric"], "o", ms=11, mfc="none", mec=COLOURS["ink"], mew=1.6)
        axes.margins(y=0.15)
        axes.set_xlim(0.5, max(e["epoch"] for history in histories.values() for e in history) + 0.5)
        _scale(axes, "epoch")
        _metric_axis(axes, run)

    best, target = (run.shown(value) for value in (kept["main_metric"], final))
    note = f"ring: kept, {best}; dashed: teacher, {target}"
    title = f"{results['split']} {run.metric} by epoch"
    return _plot(title[0].upper() + title[1:], note, f"{title}; {note}", draw)


def _metric_axis(axes: Axes, run: Run) -> None:
    """Ticks of the metric as the page writes it, with as many digits as they need."""
    low, high = axes.get_ylim()
    form = "{:.0%}" if high - low > 0.08 else "{:.1%}"
    if run.task.main_metric == "accuracy":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: form.format(y)))


# ------------------------------------------------------------------------------------------ teacher against student


def latency(run: Run) -> Plot:
    """The share of single-sentence requests that were answered within so many milliseconds."""
    taken = {side: run.outputs["evaluate"]["latencies_ms"][side] for side in SIDES}
    marks = {side: np.percentile(values, (50, 95, 99)) for side, values in taken.items()}
    shares = np.linspace(0, 1, 401)
    lines = {side: np.percentile(values, 100 * shares) for side, values in taken.items()}
    ends = max(values[-3] for values in lines.values()), min(values[0] for values in lines.values())

    def draw(axes: Axes) -> None:
        for side, values in lines.items():
            axes.plot(values, shares, color=COLOURS[side], linewidth=1.8)
            axes.plot(marks[side], (0.5, 0.95, 0.99), "o", color=COLOURS[side], ms=4.5)
        if ends[0] > 8 * ends[1]:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.set_xlim(right=1.1 * ends[0])
        axes.set_yticks((0, 0.25, 0.5, 0.75, 0.95), ("0%", "25%", "50%", "75%", "95%"))
        axes.set(xlabel="ms, lower is better", ylim=(0, 1.02))
        axes.grid(axis="both")

    words = "; ".join(
        f"{side} {', '.join(f'p{p} {value:.2f}' for p, value in zip((50, 95, 99), values, strict=True))} ms"
        for side, values in marks.items()
    )
    note = f"share of {len(taken['student'])} single sentences answered within so long; dots: p50, p95, p99; cut where half a percent is left"
    return _plot("Latency at batch 1", note, f"Latency at batch 1: {words}", draw)


def throughput(run: Run) -> Plot:
    rates = {side: (run.results[side]["reasoningTime"], side) for side in SIDES}
    note = f"sentences per second in batches of {run.config.evaluate.batch_size}, higher is better; rings: each pass"
    return _bars("Throughput", note, rates, "{:,.0f}".format, run.outputs["evaluate"]["rates"])


def matrices(run: Run) -> Iterator[Plot]:
    """Both confusion matrices; a cell's strength is its share of the true class."""
    names = run.class_names
    for side, whole in run.confusion.items():
        support = whole.sum(axis=1)
        chosen = np.sort(np.argsort(-support, kind="stable")[:MOST_CLASSES])
        counts = whole[np.ix_(chosen, chosen)]
        shares = counts / np.maximum(support[chosen, None], 1)
        recall = ", ".join(f"{names[i]} {shares[row, row]:.0%}" for row, i in enumerate(chosen))
        label = f"Confusion matrix of the {side}; share of each true class that it gets right: {recall}"
        draw = _matrix(counts, shares, [names[i] for i in chosen], COLOURS[side])
        yield _plot(side.capitalize(), "", label, draw, height=min(2 + 0.4 * len(chosen), 4.4))


def _matrix(counts_CC: np.ndarray, shares_CC: np.ndarray, names: Sequence[str], colour: str) -> Draw:
    few, size = len(names) < 9, 9 if len(names) < 6 else 7
    short = [name if len(name) <= 14 else f"{name[:8]}…{name[-5:]}" for name in names]
    slant: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"} if len(names) > 3 else {}

    def draw(axes: Axes) -> None:
        for (row, column), share in np.ndenumerate(shares_CC):
            corner = (column - 0.48, row - 0.48)
            axes.add_patch(Rectangle(corner, 0.96, 0.96, facecolor=colour, alpha=0.05 + 0.55 * share))
            if few or counts_CC[row, column]:
                text = f"{counts_CC[row, column]:,}" + (f"\n{share:.0%}" if few else "")
                axes.text(column, row, text, ha="center", va="center", fontsize=size if few else 6)
        axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), xlabel="predicted", ylabel="true")
        axes.set_xticks(range(len(names)), short, **slant)
        axes.set_yticks(range(len(names)), short)
        axes.tick_params(length=0, labelsize=size)
        axes.spines["bottom"].set_visible(False)

    return draw


def scatters(run: Run) -> Iterator[Plot]:
    """Of a regression: what each model predicts against the labels, and the student against its teacher."""
    dev = run.answers["dev"]
    thin = slice(None, None, -(-len(dev.labels_N) // MOST_DOTS))
    labels, said = dev.labels_N[thin], {side: values[thin] for side, values in dev.predicted.items()}
    some = f", {len(labels):,} of {len(dev.labels_N):,} examples" if len(labels) < len(dev.labels_N) else ""
    for side in SIDES:
        note = f"predicted against label; line: equal{some}"
        yield _scatter(side.capitalize(), note, "label", f"{side}'s value", labels, said[side], side)
    note = f"student's against teacher's value{some}"
    yield _scatter(
        "Student and teacher", note, "teacher's value", "student's value", said["teacher"], said["student"], "ink"
    )


def _scatter(title: str, note: str, x: str, y: str, x_N: np.ndarray, y_N: np.ndarray, colour: str) -> Plot:
    def draw(axes: Axes) -> None:
        low, high = min(x_N.min(), y_N.min()), max(x_N.max(), y_N.max())
        axes.plot([low, high], [low, high], color=COLOURS["muted"], linewidth=0.9, linestyle=(0, (4, 3)))
        axes.scatter(x_N, y_N, s=9, color=COLOURS[colour], alpha=0.45, linewidths=0)
        axes.set(xlabel=x, ylabel=y)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.grid(axis="both")

    close = float(np.abs(y_N - x_N).mean())
    return _plot(title, note, f"{title}: {y} against {x}, {close:.3g} apart on average", draw, 3.4)


# ----------------------------------------------------------------------------------------------------------- time


def stages(run: Run) -> Plot:
    order = ("data", "teacher", "cache", "init", "distill", "evaluate", "export")
    took = {name: (run.markers[name]["seconds"], "muted") for name in order if name in run.markers}
    return _bars("Stages", f"{duration(sum(value for value, _ in took.values()))} in all", took, duration)


PARTS = {
    "data": "waiting for data",
    "forward": "forward pass",
    "backward": "backward pass",
    "ranks": "waiting for ranks",
    "optimizer": "optimizer",
    "device": "all of it on the GPU",
}


def step_time(run: Run) -> Plot | None:
    """Where the time of a training step goes, a mean over the logged ones; None where no line says so."""
    timed = [line["seconds"] for line in run.steps if "seconds" in line]
    if not timed:
        return None
    means = {part: float(np.mean([line.get(part, 0.0) for line in timed])) for part in ("step", *PARTS)}
    rest = means["step"] - sum(means[part] for part in PARTS)
    parts = {name: (means[part], "student") for part, name in PARTS.items() if means[part]}
    parts |= {"the rest": (max(0.0, rest), "student")}
    median = float(np.median([line["step"] for line in timed]))
    note = (
        f"{duration(means['step'])} on average, median {duration(median)}; rank 0, forward with the teacher's answers"
    )
    return _bars(
        "A training step", note, parts, lambda value: f"{duration(value)}, {value / max(means['step'], 1e-9):.0%}"
    )


def training_time(run: Run) -> Plot | None:
    """What the stage distill did with its time; None where not every step is logged, or not in one go."""
    timed = [line["seconds"]["step"] for line in run.steps if "seconds" in line]
    whole = run.markers["distill"]
    if len(timed) != run.outputs["distill"]["steps"] or whole.get("starts", 1) > 1:
        return None
    steps, scored = sum(timed), sum(line["seconds"]["evaluation"] for line in run.evaluations)
    parts = {"steps": steps, "evaluations": scored, "start, checkpoints": max(0.0, whole["seconds"] - steps - scored)}
    bars = {name: (value, "student") for name, value in parts.items()}
    return _bars("The stage distill", f"{duration(whole['seconds'])} in all", bars, duration)


# ------------------------------------------------------------------------------------------------- runs side by side


def _line(index: int) -> dict[str, Any]:
    return {"color": COLOURS[f"run-{index + 1}"], "linestyle": DASHES[index % len(DASHES)], "linewidth": 1.8}


def curves_of(runs: Sequence[Run], names: Sequence[str]) -> Iterator[Plot]:
    """Dev after each epoch, and each loss term that any run used, all runs over each other."""

    def dev(axes: Axes) -> None:
        for i, run in enumerate(runs):
            made = run.outputs["distill"]
            history = made["history"]
            axes.plot([e["epoch"] for e in history], [e["main_metric"] for e in history], marker="o", ms=4, **_line(i))
            kept = next(entry for entry in history if entry["epoch"] == made["best_epoch"])
            axes.plot(kept["epoch"], kept["main_metric"], "o", ms=11, mfc="none", mec=COLOURS["ink"], mew=1.2)
        axes.margins(y=0.15)
        _scale(axes, "epoch")
        _metric_axis(axes, runs[0])

    title = f"Dev {runs[0].metric} by epoch"
    best = ", ".join(
        f"{name} {run.shown(run.outputs['distill']['best_metric'])}" for name, run in zip(names, runs, strict=True)
    )
    yield _plot(title, "rings: kept", f"{title}: kept {best}", dev)
    for key, title in LOSSES.items():
        lines = {
            i: (np.asarray([line["step"] for line in run.steps]), values)
            for i, run in enumerate(runs)
            if (values := np.asarray([line[key] for line in run.steps], dtype=float)).any()
        }

        def loss(axes: Axes, lines: dict[int, tuple[np.ndarray, np.ndarray]] = lines) -> None:
            for i, (steps, values) in lines.items():
                thin = _thin(len(steps))
                axes.plot(steps[thin], smooth(values)[thin], **_line(i))
            _small_numbers(axes)
            _scale(axes, "step")

        if lines:
            ends = ", ".join(f"{names[i]} {smooth(values)[-1]:.3g}" for i, (_, values) in lines.items())
            yield _plot(title, "running means", f"{title} by step, at the end: {ends}", loss)


def scores(rows: Sequence[tuple[str, float, tuple[float, float] | None]], title: str, note: str, run: Run) -> Plot:
    """Points with their intervals, a row a run: (name, value, interval)."""

    def draw(axes: Axes) -> None:
        for i, (_, value, interval) in enumerate(rows):
            colour = COLOURS[f"run-{i + 1}"]
            if interval:
                axes.plot(interval, [i, i], color=colour, linewidth=2)
            axes.plot(value, i, "D", color=colour, ms=7)
        axes.set(ylim=(len(rows) - 0.4, -0.6))
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
        axes.xaxis.set_major_locator(MaxNLocator(5))
        if run.task.main_metric == "accuracy":
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.1%}"))
        axes.grid(axis="x")
        axes.margins(x=0.08)

    words = ", ".join(f"{name} {run.shown(value)}" for name, value, _ in rows)
    return _plot(title, note, f"{title}: {words}", draw, 0.8 + 0.26 * len(rows))
