"""The table of a comparison: means over seeds with 95% intervals, as JSON, Markdown and a plot.

results_eval.json of every run -> compare.json -> rows -> compare.md, compare.png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from typing_extensions import TypedDict

from pkd_dist.config.schema import Config
from pkd_dist.data import tasks
from pkd_dist.evaluation.results import Results, Scores
from pkd_dist.metric_names import SHARES
from pkd_dist.telemetry.markup import markdown

RunResults = Mapping[str, Mapping[int, Results]]
"""Method -> seed -> results_eval.json."""
Figures = dict[str, float]
"""The metric by split, `score` and `agreement` over the pooled splits, `parameters` and `modelSize`."""


MIN_SEEDS = 3
"""Seeds from which a mean has an interval: that of two is 18 times the standard error of many, which says nothing."""


class MeanDifference(TypedDict):
    mean: float
    half_interval_95: float | None


class Facts(TypedDict):
    """Layers of a method's student, and its settings."""

    layers: int
    overrides: dict[str, object]


class MethodSummary(Facts, total=False):
    """One method over its seeds.

    `half_interval_95` is half the interval of the mean, None for fewer than `MIN_SEEDS` seeds. A method with the depth of an
    earlier one also has a key `minus FIRST`: its differences to the first such method, by seed; see `set_differences`.
    """

    seeds: dict[str, Figures]
    mean: Figures
    half_interval_95: dict[str, float | None]


class Summary(TypedDict):
    """compare.json. `pooled` names the splits that `score` and `agreement` are over; `of` identifies what all rows have in common."""

    task: str
    metric: str
    splits: list[str]
    pooled: list[str]
    teacher: Figures
    methods: dict[str, MethodSummary]
    of: str


class MeanInterval(NamedTuple):
    mean: float
    half: float | None


def mean_interval(values: Sequence[float]) -> MeanInterval:
    """Return the mean over seeds and half of its 95% interval (Student's t), None for fewer than `MIN_SEEDS`."""
    from scipy.stats import t

    count = len(values)
    if count < MIN_SEEDS:
        return MeanInterval(float(np.mean(values)), None)
    half = float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
    return MeanInterval(float(np.mean(values)), half)


def summarize(config: Config, results: RunResults, facts: Mapping[str, Facts], identity: str) -> Summary:
    """Return the content of compare.json.

    Args:
        results: At least one method with at least one seed.
        facts: Method -> what the table says of it.
        identity: What all rows have in common.
    """
    metric = tasks.resolve(config.task).main_metric
    one = next(iter(next(iter(results.values())).values()))
    splits = ["dev", *one["splits"]]
    pooled = splits if metric in SHARES else ["dev"]  # other metrics of a union are not the mean of its parts
    methods: dict[str, MethodSummary] = {}
    for name, by_seed in results.items():
        seeds = {str(seed): _figures(by_seed[seed], splits, pooled, metric) for seed in sorted(by_seed)}
        keys = list(next(iter(seeds.values())))
        intervals = {key: mean_interval([figures[key] for figures in seeds.values()]) for key in keys}
        methods[name] = {
            "seeds": seeds,
            "mean": {key: interval.mean for key, interval in intervals.items()},
            "half_interval_95": {key: interval.half for key, interval in intervals.items()},
            **facts[name],
        }
    set_differences(methods)
    return {
        "task": one["task"],
        "metric": metric,
        "splits": splits,
        "pooled": pooled,
        "teacher": _figures(one, splits, pooled, metric, teacher=True),
        "methods": methods,
        "of": identity,
    }


def set_differences(methods: Mapping[str, MethodSummary]) -> None:
    """Set the key `minus FIRST` of each method: its difference, seed by seed, to the first method of its depth."""
    for name, method in methods.items():
        first = next(other for other in methods if methods[other]["layers"] == method["layers"])
        seeds = [seed for seed in method["seeds"] if seed in methods[first]["seeds"] and name != first]
        entries = cast("dict[str, object]", method)
        for key in [key for key in entries if key.startswith("minus ")]:
            del entries[key]
        if seeds:
            entries[f"minus {first}"] = {
                key: _difference(method, methods[first], seeds, key) for key in ("score", "agreement")
            }


def _difference(method: MethodSummary, first: MethodSummary, seeds: Sequence[str], key: str) -> MeanDifference:
    mean, half = mean_interval([method["seeds"][seed][key] - first["seeds"][seed][key] for seed in seeds])
    return {"mean": mean, "half_interval_95": half}


def _figures(
    result: Results, splits: Sequence[str], pooled: Sequence[str], metric: str, teacher: bool = False
) -> Figures:
    """Return the figures of one model; each example of the pooled splits counts once."""

    def of(side: Scores, key: str) -> float:
        return float(cast(dict[str, float], side)[key])

    model = result["teacher" if teacher else "student"]
    others = {name: part["teacher" if teacher else "student"] for name, part in result["splits"].items()}
    sizes = {"dev": result["n"], **{name: part["n"] for name, part in result["splits"].items()}}
    agreements = {"dev": result["compression"]["agreement"]}
    agreements |= {name: part["agreement"] for name, part in result["splits"].items()}
    scores = {split: of({"dev": model, **others}[split], metric) for split in splits}
    weights = [sizes[split] for split in pooled]
    return {
        **scores,
        "score": float(np.average([scores[split] for split in pooled], weights=weights)),
        "agreement": float(np.average([1.0 if teacher else float(agreements[s]) for s in pooled], weights=weights)),
        **{key: of(model, key) for key in ("parameters", "modelSize") if key in model},
    }


def one_line(result: Results) -> str:
    """Return the scores and the agreement of one run, for its log line."""
    scores = {"dev": result["student"]["main_metric"]}
    scores |= {split: part["student"]["main_metric"] for split, part in result["splits"].items()}
    shown = ", ".join(f"{split} {value:.4f}" for split, value in scores.items())
    return f"{shown}, agreement {result['compression']['agreement']:.4f}"


def rows(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Return the table as (header, rows of text), scores and agreement in percent."""
    pooled, teacher = summary["pooled"], summary["teacher"]
    scored = [*summary["splits"], *(["score"] if len(pooled) > 1 else []), "agreement"]
    titles = {"score": " + ".join(pooled), "agreement": "agreement with the teacher"}
    header = ["method", "layers", "seeds", *(titles.get(key, key) for key in scored), "parameters, M"]

    def percent(mean: float, half: float | None = None) -> str:
        return f"{100 * mean:.2f}" + ("" if half is None else f" ± {100 * half:.2f}")

    def millions(figures: Figures) -> str:
        return f"{figures['parameters'] / 1e6:.1f}" if "parameters" in figures else "–"

    body = [["teacher", "", "", *(percent(teacher[key]) for key in scored), millions(teacher)]]
    for name, method in summary["methods"].items():
        mean, half = method["mean"], method["half_interval_95"]
        counts = [str(method["layers"]), str(len(method["seeds"]))]
        body.append([name, *counts, *(percent(mean[key], half[key]) for key in scored), millions(mean)])
    return header, body


def as_markdown(summary: Summary) -> str:
    header, body = rows(summary)
    lines = [header, ["---"] * len(header), *([markdown(cell) for cell in row] for row in body)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (
        f"{table}\n\n{summary['metric']} and agreement in percent: means over seeds, ± half of the 95% interval of the mean "
        f"(Student's t) from {MIN_SEEDS} seeds on.\n"
    )


def plot(summary: Summary) -> Figure:
    """Plot scores and agreement: a point per seed, each mean with its 95% interval, the teacher as a line."""
    methods = summary["methods"]
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(methods)), layout="constrained")
    label = summary["metric"] + " on " + " + ".join(summary["pooled"])
    titles = {"score": f"{label}, %", "agreement": "agreement with the teacher, %"}
    for axes, (key, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        if key == "score":  # first, so that the axis reaches it
            axes.axvline(100 * summary["teacher"][key], color="#b5541c", linestyle="--", linewidth=1.2)
            axes.set_title("dashed: the teacher", fontsize=9, loc="right", color="#b5541c")
        _plot_panel(axes, methods, key)
        axes.set_xlabel(title)
    return figure


def _plot_panel(axes: Axes, methods: Mapping[str, MethodSummary], key: str) -> None:
    for place, method in enumerate(methods.values()):
        values = [100 * figures[key] for figures in method["seeds"].values()]
        axes.plot(values, [place] * len(values), "o", color="#8bb0d8", markersize=5, clip_on=False)
        mean, half = 100 * method["mean"][key], method["half_interval_95"][key]
        axes.plot([mean], [place], "D", color="#1f4e8c", markersize=6, clip_on=False)
        if half is not None:
            axes.errorbar([mean], [place], xerr=[100 * half], color="#1f4e8c", capsize=4)
    left, right = axes.get_xlim()
    negative = any(figures[key] < 0 for method in methods.values() for figures in method["seeds"].values())
    axes.set_xlim(max(left, -100.0 if negative else 0.0), min(right, 100.0))
    axes.grid(axis="x", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_yticks(range(len(methods)), list(methods), parse_math=False)
    axes.set_ylim(len(methods) - 0.5, -0.5)
