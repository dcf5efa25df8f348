"""sweep.html: what was tried and what came out, self-contained. The charts are Plotly's; some are made by Optuna."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import optuna
import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from optuna.trial import FrozenTrial, TrialState
from plotly.offline import get_plotlyjs

from pkd_dist.evaluation.deployment import TEACHER
from pkd_dist.evaluation.intervals import Interval, wilson_interval
from pkd_dist.files import write_atomically
from pkd_dist.metric_names import DIVERGENCE, METRICS, SHARES
from pkd_dist.report.format import duration
from pkd_dist.search import summary
from pkd_dist.search.outcome import Outcome, Point, scores_of
from pkd_dist.search.study import Study

_TEMPLATES = [Path(__file__).parent / "templates", Path(__file__).parents[1] / "report" / "templates"]
_STUDENT, _TEACHER, _BEST, _OTHER, _GRAY = "#1c6e8c", "#b4602a", "#2b7a4b", "#59b8d9", "#8a94a3"
_MAX_ROWS, _MAX_CURVES = 50, 300
_CONFIG = {"displayModeBar": False, "responsive": True}


@dataclass(frozen=True)
class Chart:
    """A chart of the page; `html` is a div and the script that draws it."""

    title: str
    note: str
    html: str
    wide: bool = False


def write(outcome: Outcome, study: Study, path: Path) -> None:
    """Write the page of a sweep that has ended.

    Raises:
        UserError: The disk is full.
    """
    head, body = summary.table(outcome.points, outcome.objective, _MAX_ROWS)
    intervals = [_interval(outcome, point) for point in outcome.points[:_MAX_ROWS]]
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    html = environment.get_template("sweep.html").render(
        outcome=outcome,
        metric=METRICS.get(outcome.objective, outcome.objective),
        value="{:.4f}".format,
        scores_of=scores_of,
        counted=summary.counted(outcome.trials),
        optimism=summary.describe_optimism(outcome),
        cost=duration(outcome.seconds),
        head=head,
        rows=list(zip(body, intervals, strict=True)),
        failures=[trial for trial in outcome.trials if trial.user_attrs.get("reason")],
        charts=list(_charts(outcome, study)),
        plotly=get_plotlyjs(),
    )
    write_atomically(path, lambda tmp: tmp.write_text(html, encoding="utf-8"), len(html))


def _interval(outcome: Outcome, point: Point) -> Interval | None:
    """Return the 95% interval of a point's share of the examples of dev, all seeds together; None for other scores."""
    if outcome.objective not in SHARES:
        return None
    return wilson_interval(point.value, point.trials[0].user_attrs["examples"])  # seeds share the examples


def _charts(outcome: Outcome, study: Study) -> Iterator[Chart]:
    metric = METRICS.get(outcome.objective, outcome.objective)
    for key, title, unit in (
        ("latency_ms", "latency", "ms for one text, int8 file"),
        ("bytes", "size", "MB, int8 file"),
    ):
        note = (
            "Points of the search, each at its mean over the seeds; the line joins those that no other beats in both."
        )
        yield Chart(f"{metric} and {title}", note, _html(_tradeoff(outcome, key, metric, unit)))
    if any(trial.intermediate_values for trial in outcome.trials):
        yield Chart(
            "Learning curves",
            "Dev after each epoch and at the pruner's decisions; gray: pruned. Lower is better for the divergence.",
            _html(_curves(outcome)),
        )
    optuna_study = study.as_optuna()
    searched = [key for key, each in study.space.distributions.items() if not each.single()]
    complete = [trial for trial in outcome.trials if trial.state is TrialState.COMPLETE]
    if len(complete) > 1 and len(searched) > 1:
        yield Chart(
            "Importance of the settings", "By PED-ANOVA: how much the best trials differ from all. Small differences mean nothing in few trials.",
            _html(_importances(optuna_study)),
        )  # fmt: skip
        yield Chart(
            "All settings", "Each line is a complete trial; the darker, the better.", _html(_parallel(optuna_study, metric)), wide=True,
        )  # fmt: skip


def _html(figure: go.Figure) -> str:
    figure.update_layout(
        template="none", paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font={"color": _GRAY, "size": 12}, title=None,
        margin={"l": 56, "r": 16, "t": 24, "b": 48}, height=340, legend={"orientation": "h", "y": -0.25},
    )  # fmt: skip
    figure.update_xaxes(gridcolor="rgba(138,148,163,.25)", zeroline=False, automargin=True)
    figure.update_yaxes(gridcolor="rgba(138,148,163,.25)", zeroline=False, automargin=True)
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG, default_width="100%"))


def _tradeoff(outcome: Outcome, key: str, metric: str, unit: str) -> go.Figure:
    scale = 1e-6 if key == "bytes" else 1.0
    points = [(scale * point.trials[0].user_attrs[key], outcome.score(point), point) for point in outcome.points]
    best = max if outcome.objective != DIVERGENCE else min
    front = [
        (x, y) for x, y, _ in sorted(points, key=lambda each: each[:2]) if y == best(other for at, other, _ in points if at <= x)
    ]  # fmt: skip
    front = [(x, y) for place, (x, y) in enumerate(front) if place == 0 or y != front[place - 1][1]]
    figure = go.Figure()
    figure.add_scatter(
        x=[x for x, _ in front],
        y=[y for _, y in front],
        mode="lines",
        line={"color": _OTHER, "shape": "hv"},
        name="front",
    )
    figure.add_scatter(
        x=[x for x, _, _ in points], y=[y for _, y, _ in points], mode="markers", marker={"color": _STUDENT, "size": 7, "opacity": 0.7},
        text=[f"point {point.number}: {' '.join(point.overrides)}" for _, _, point in points], hovertemplate="%{text}<br>%{y:.4f}, %{x:.3g}<extra></extra>",
        name="points",
    )  # fmt: skip
    x, y, _ = next(each for each in points if each[2] is outcome.winner)
    figure.add_scatter(
        x=[x], y=[y], mode="markers", marker={"color": _BEST, "size": 14, "symbol": "star"}, name="winner"
    )
    for x, y in _teacher(outcome, key, scale):
        figure.add_scatter(
            x=[x],
            y=[y],
            mode="markers",
            marker={"color": _TEACHER, "size": 12, "symbol": "diamond"},
            name="teacher, PyTorch",
        )
    figure.update_xaxes(title=unit, type="log")
    figure.update_yaxes(title=f"{metric} on dev")
    return figure


def _teacher(outcome: Outcome, key: str, scale: float) -> Iterator[tuple[float, float]]:
    """Yield what serving the teacher costs, and its score, where a final run has measured both."""
    final = next(iter(outcome.finals.values()), None)
    deployment = final.manifest.get("deployment") if final else None
    if final is None or deployment is None:
        return
    score = final.results["teacher"].get(outcome.objective)
    row = next((row for row in deployment["rows"] if row["file"] == TEACHER), None)
    if row is None or not isinstance(score, float) or row["bytes"] is None or row["speed"] is None:
        return
    yield scale * (row["bytes"] if key == "bytes" else row["speed"]["latency_ms_p50"]), score


def _curves(outcome: Outcome) -> go.Figure:
    figure, divergence = (
        go.Figure(),
        any("divergence" in trial.user_attrs.get("scores", {}) for trial in outcome.trials),
    )
    shown = [trial for trial in outcome.trials if trial.intermediate_values][-_MAX_CURVES:]
    winners = {trial.number for trial in outcome.winner.trials}
    for trial in sorted(shown, key=lambda trial: (trial.number in winners, trial.state is TrialState.COMPLETE)):
        steps = sorted(trial.intermediate_values)
        pruned, winner = trial.state is not TrialState.COMPLETE, trial.number in winners
        figure.add_scatter(
            x=[step / outcome.looks_per_epoch for step in steps], y=[(-1 if divergence else 1) * trial.intermediate_values[step] for step in steps], mode="lines+markers", showlegend=False,
            line={"color": _GRAY if pruned else _BEST if winner else _OTHER, "width": 2.5 if winner else 1}, marker={"size": 4},
            opacity=0.5 if pruned else 0.9, name=_name(trial), hovertemplate="%{fullData.name}<br>epoch %{x}: %{y:.4g}<extra></extra>",
        )  # fmt: skip
    last = max(max(trial.intermediate_values) for trial in shown) / outcome.looks_per_epoch
    figure.update_xaxes(title="epoch", dtick=1 if last < 12 else None)
    figure.update_yaxes(
        title="divergence from the teacher" if divergence else "score on dev", type="log" if divergence else "linear"
    )
    return figure


def _name(trial: FrozenTrial) -> str:
    return f"trial {trial.number}: {' '.join(f'{key}={value}' for key, value in trial.params.items())}"


def _importances(study: optuna.Study) -> go.Figure:
    found = optuna.importance.get_param_importances(study)
    keys = list(reversed(found))
    return go.Figure(go.Bar(x=[found[key] for key in keys], y=keys, orientation="h", marker_color=_STUDENT))


def _parallel(study: optuna.Study, metric: str) -> go.Figure:
    return optuna.visualization.plot_parallel_coordinate(study, target_name=metric)
