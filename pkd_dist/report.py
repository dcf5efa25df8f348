"""RUN/report.html: a run to look at, one file that needs nothing else.

    config.yaml, stages/*.json, metrics.jsonl -> `Run` -> words, tables and SVG plots -> report_template.html

Plots are inline SVG whose colours are the page's CSS variables, so that one drawing serves light, dark and print.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pkd_dist.config import Config
from pkd_dist.data import tasks
from pkd_dist.export import card
from pkd_dist.files import write_atomically
from pkd_dist.telemetry import records

MOST_CLASSES = 20
"""Classes that a confusion matrix shows; beyond, the most frequent."""
METRICS = {"accuracy": "accuracy", "MCC": "MCC", "f_1": "F1", "pearson_spearman": "Pearson/Spearman mean"}
LOSSES = {
    "loss": "Total loss",
    "loss_ce": "CE, the labels",
    "loss_ds": "DS, the teacher's predictions",
    "loss_pt": "PT, the teacher's layers",
}
COLOURS = {name: f"#fe01{i:02x}" for i, name in enumerate(("ink", "muted", "line", "teacher", "student"))}
"""CSS variable -> the placeholder that stands for it while matplotlib draws."""
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


@dataclass(frozen=True)
class Run:
    """What a run folder says of itself.

    Attributes:
        resolved: what the run was resolved to, beside its settings.
        outputs: stage -> what its marker remembers.
        seconds: stage -> its wall-clock time.
        steps: the training lines of metrics.jsonl.
        main_metric: key of the metric that chose the best epoch.
    """

    config: Config
    resolved: dict[str, Any]
    outputs: dict[str, dict[str, Any]]
    seconds: dict[str, float]
    steps: list[dict[str, Any]]
    main_metric: str

    @property
    def results(self) -> dict[str, Any]:
        return self.outputs["evaluate"]["results"]

    def confusion(self, side: str) -> np.ndarray:
        """(C, C) counts of the dev split, rows the true class."""
        return np.asarray(self.outputs["evaluate"][f"confusion_{side}"])


def write(run: Path) -> dict[str, Any]:
    """Writes `run/report.html` from what the stages before left there. Returns its size in `bytes`."""
    html = _render(_read(run))
    write_atomically(run / "report.html", lambda tmp: tmp.write_text(html, encoding="utf-8"))
    return {"bytes": len(html.encode())}


def _read(run: Path) -> Run:
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    resolved = settings.pop("resolved")
    config = Config.model_validate(settings)
    markers = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (run / "stages").glob("*.json")}
    done = {name: marker for name, marker in markers.items() if marker["done"]}
    outputs = {name: marker["outputs"] for name, marker in done.items()}
    return Run(
        config=config,
        resolved=resolved,
        outputs=outputs,
        seconds={name: marker["seconds"] for name, marker in done.items()},
        steps=[line for line in records.read(run / "metrics.jsonl") if "split" not in line],
        main_metric=tasks.resolve(config.task).main_metric,
    )


def _render(run: Run) -> str:
    environment = Environment(undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"count": "{:,.0f}".format, "percent": _percent, "number": "{:.4g}".format}
    environment.filters |= {"shown": lambda value: _shown(run.main_metric, value), "size": _size}
    template = environment.from_string(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8"))
    return template.render(
        run=run, results=run.results, data=run.outputs["data"], metric=METRICS[run.main_metric], most_classes=MOST_CLASSES,
        warnings=list(_warnings(run)), rows=_comparison(run.results), classes=_per_class(run),
        curves=list(_curves(run)), matrices=list(_matrices(run)), bars=_bar_plots(run),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- words and numbers


def _shown(metric: str, value: float) -> str:
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.3f}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _size(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _warnings(run: Run) -> Iterator[str]:
    """What a careful reader would ask about."""
    data, results, distilled = run.outputs["data"], run.results, run.outputs["distill"]
    lost = 100 * (results["teacher"]["main_metric"] - results["student"]["main_metric"])
    if lost > 3:
        yield f"The student is {lost:.1f} points of {METRICS[run.main_metric]} below its teacher."
    if distilled["best_epoch"] == run.config.train.epochs:
        yield f"The best epoch is the last one ({distilled['best_epoch']}); longer training may help."
    for split in ("train", "dev"):
        if cut := data[split]["truncated"]:
            share = cut / data[split]["examples"]
            yield (
                f"{cut:,} of {data[split]['examples']:,} {split} examples ({share:.1%}) were cut to "
                f"{run.config.task.max_length} tokens; a larger task.max_length would keep their ends."
            )
    names, counts = data["class_names"], data["train"].get("per_class") or [1]
    if max(counts) > 10 * min(counts):
        most, least = int(np.argmax(counts)), int(np.argmin(counts))
        yield (
            f"The classes are unbalanced: {counts[most]:,} training examples of {names[most]}, {counts[least]:,} of "
            f"{names[least]}. Accuracy says little of rare classes; see the F1 of each."
        )
    if "confusion_student" in run.outputs["evaluate"]:
        matrix = run.confusion("student")
        never = [names[i] for i in range(len(names)) if matrix[i].any() and not matrix[:, i].any()]
        if never:
            shown = ", ".join(never[:5]) + (f" and {len(never) - 5} more" if len(never) > 5 else "")
            yield f"The student never predicts {shown}, though {results['split']} has examples of it."
    depth, layers = run.resolved["teacher_layers"], run.resolved["student_layers"]
    if run.config.distill.patience == "skip" and depth and depth % layers:
        pairs = ", ".join(str(teacher) for _, teacher in run.resolved["patience_pairs"])
        yield (
            f"The teacher's {depth} layers do not divide by the student's {layers}, so the patience map was rounded "
            f"(teacher layers {pairs})."
        )


def _comparison(results: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(label, teacher's, student's): the card's rows, precision and recall after the scores."""
    rows = card.figures(results)
    teacher, student = results["teacher"], results["student"]
    more = [(key, f"{teacher[key]:.3f}", f"{student[key]:.3f}") for key in ("precision", "recall") if key in teacher]
    place = [label for label, *_ in rows].index("parameters")
    return rows[:place] + more + rows[place:]


def _per_class(run: Run) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each class as (teacher's, student's), and its examples; nothing for a regression."""
    if "confusion_teacher" not in run.outputs["evaluate"]:
        return []
    sides = []
    for side in ("teacher", "student"):
        matrix = run.confusion(side)
        hits, predicted, true = matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)
        ratios = ((hits, predicted), (hits, true), (2 * hits, predicted + true))
        sides.append([top / np.maximum(bottom, 1) for top, bottom in ratios])
    scores = np.asarray(sides).transpose(2, 1, 0)  # class, measure, side
    support = run.confusion("teacher").sum(axis=1)
    return [
        {"name": name, "support": int(support[i]), "scores": scores[i].tolist()}
        for i, name in enumerate(run.outputs["data"]["class_names"])
    ]


# -------------------------------------------------------------------------------------------------------------- plots

Plot = dict[str, Any]
"""`title`, `svg`, `note`."""


def _plot(title: str, note: str, label: str, draw: Callable[[Axes], None], height: float = 2.5) -> Plot:
    """A drawing as inline SVG, about as wide as a telephone: no identifiers shared with another, no address, no fixed size."""
    with mpl.rc_context(STYLE | {"svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the browser has it
        figure = Figure(figsize=(4.2, height), layout="constrained")
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


def _smooth(values_S: np.ndarray) -> np.ndarray:
    """The centred mean of a 25th of the steps; half of that at both ends."""
    half, at = max(1, len(values_S) // 50), np.arange(len(values_S))
    sums = np.concatenate([[0.0], np.cumsum(values_S)])
    first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values_S))
    return (sums[last] - sums[first]) / (last - first)


def _curves(run: Run) -> Iterator[Plot]:
    """Each loss term that was used, the learning rate, and dev after each epoch."""
    steps = np.asarray([line["step"] for line in run.steps])
    ends = [entry["step"] for entry in run.outputs["distill"]["history"]]
    for key, title in LOSSES.items():
        values = np.asarray([line[key] for line in run.steps], dtype=float)
        if values.any():
            smooth = _smooth(values)
            note = f"{smooth[0]:.3g} at first, {smooth[-1]:.3g} at the end"
            yield _plot(title, note, f"{title} by step: {note}", _over_steps(steps, values, smooth, ends))
    if len(steps):
        rates = np.asarray([line["learning_rate"] for line in run.steps])
        note = f"peak {rates.max():.3g}"
        yield _plot("Learning rate", note, f"Learning rate by step, {note}", _over_steps(steps, rates, rates, ends))
    yield _dev_curve(run)


def _over_steps(
    steps_S: np.ndarray, raw_S: np.ndarray, smooth_S: np.ndarray, epoch_ends: Sequence[int]
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        thin = slice(None, None, max(1, len(steps_S) // 600))
        for end in epoch_ends[:-1] if len(epoch_ends) <= 12 else ():
            axes.axvline(end, color=COLOURS["line"], linewidth=0.8, linestyle=(0, (2, 2)))
        if smooth_S is not raw_S:
            axes.plot(steps_S[thin], raw_S[thin], color=COLOURS["student"], alpha=0.25, linewidth=0.7)
        axes.plot(steps_S[thin], smooth_S[thin], color=COLOURS["student"], linewidth=1.8)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 4))
        axes.yaxis.offsetText.set_color(COLOURS["muted"])
        _scale(axes, "step")

    return draw


def _scale(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y")


def _dev_curve(run: Run) -> Plot:
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
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _shown(run.main_metric, y)))
        _scale(axes, "epoch")

    best, target = (_shown(run.main_metric, value) for value in (kept["main_metric"], final))
    note = f"ring: kept, {best}; dashed: teacher, {target}"
    title = f"{results['split']} {METRICS[run.main_metric]} by epoch"
    return _plot(title, note, f"{title}; {note}", draw)


def _matrices(run: Run) -> Iterator[Plot]:
    """Both confusion matrices; a cell's strength is its share of the true class."""
    if "confusion_teacher" not in run.outputs["evaluate"]:
        return
    names = run.outputs["data"]["class_names"]
    support = run.confusion("teacher").sum(axis=1)
    chosen = np.sort(np.argsort(-support, kind="stable")[:MOST_CLASSES])
    for side in ("teacher", "student"):
        counts = run.confusion(side)[np.ix_(chosen, chosen)]
        shares = counts / np.maximum(support[chosen, None], 1)
        recall = ", ".join(f"{names[i]} {shares[row, row]:.0%}" for row, i in enumerate(chosen))
        label = f"Confusion matrix of the {side}; share of each true class that it gets right: {recall}"
        draw = _matrix(counts, shares, [names[i] for i in chosen], COLOURS[side])
        yield _plot(side.capitalize(), "", label, draw, height=min(2 + 0.4 * len(chosen), 4.4))


def _matrix(counts_CC: np.ndarray, shares_CC: np.ndarray, names: Sequence[str], colour: str) -> Callable[[Axes], None]:
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


def _bar_plots(run: Run) -> dict[str, Plot]:
    """Latency, throughput, and where the time went."""
    sides = ("teacher", "student")
    latency = {f"{side} {p}": (run.results[side][f"latency_ms_{p}"], side) for p in ("p50", "p99") for side in sides}
    rates = {side: (run.results[side]["reasoningTime"], side) for side in sides}
    order = ("data", "teacher", "cache", "init", "distill", "evaluate", "export")
    stages = {name: (run.seconds[name], "muted") for name in order if name in run.seconds}
    note = f"sentences per second in batches of {run.config.evaluate.batch_size}, higher is better"
    total = (
        f"{_duration(sum(value for value, _ in stages.values()))} in all; a resumed stage counts from its last start"
    )
    return {
        "latency": _bars("Latency at batch 1", "ms, lower is better", latency, "{:.2f}".format),
        "throughput": _bars("Throughput", note, rates, "{:,.0f}".format, height=1.1),
        "stages": _bars("Stages", total, stages, _duration),
    }


def _bars(
    title: str, note: str, bars: dict[str, tuple[float, str]], shown: Callable[[float], str], height: float = 1.8
) -> Plot:
    """Horizontal bars, name -> (value, colour), each with its value behind it."""

    def draw(axes: Axes) -> None:
        widths = [value for value, _ in bars.values()]
        axes.barh(list(bars), widths, height=0.62, color=[COLOURS[colour] for _, colour in bars.values()])
        for row, value in enumerate(widths):
            axes.annotate(shown(value), (value, row), (5, 0), textcoords="offset points", va="center")
        axes.set(xlim=(0, 1.28 * max(widths) or 1), ylim=(len(bars) - 0.4, -0.6))
        axes.tick_params(axis="y", labelcolor=COLOURS["ink"])
        axes.xaxis.set_visible(False)
        axes.spines["bottom"].set_visible(False)

    label = f"{title}: " + ", ".join(f"{name} {shown(value)}" for name, (value, _) in bars.items())
    return _plot(title, note, label, draw, height)
