"""The pages: RUN/report.html of one run, and one of several side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pkd_dist.data import text
from pkd_dist.errors import UserError
from pkd_dist.evaluation.predictions import Predictions
from pkd_dist.evaluation.results import SIDES, Results, table_rows
from pkd_dist.files import write_atomically
from pkd_dist.metric_names import METRICS, TABLE_METRICS
from pkd_dist.report import charts
from pkd_dist.report.notices import notices
from pkd_dist.report.runs import Run, duration, percent, read, size

EXAMPLES = 12
"""Examples shown on which student and teacher differ most."""
MOST_ROWS = 20
"""Rows of the table of classes that are always open."""
MARK = '<meta name="generator" content="pkd_dist">'


def write(folder: Path) -> dict[str, Any]:
    """Writes `folder/report.html` from what the stages before left there. Returns its size in `bytes`."""
    run = read(folder)
    results = run.results
    html = _render(
        "run.html", run,
        results=results, data=run.outputs["data"], most_classes=charts.MOST_CLASSES, most_rows=MOST_ROWS,
        notices=list(notices(run)), rows=_comparison(run), classes=_per_class(run), right=_right(run), mistakes=_mistakes(run),
        examples=_differing(run), layers=charts.layers(run), curves=list(charts.curves(run)),
        matrices=list(charts.matrices(run)), scatters=list(charts.scatters(run)) if run.task.regression else [],
        latency=charts.latency(run), latencies=_latencies(run), files=_files(run), throughput=charts.throughput(run),
        times=[plot for plot in (charts.stages(run), charts.training_time(run), charts.step_time(run)) if plot],
    )  # fmt: skip
    _save(folder / "report.html", html)
    return {"bytes": len(html.encode())}


def write_comparison(folders: Sequence[Path], output: Path) -> None:
    """Writes a page of several runs side by side.

    Raises:
        UserError: one is no run or not finished, they cannot be compared, or `output` is something else.
    """
    if len(folders) < 2:
        raise UserError("pkd report --compare: give at least two run folders")
    if len(folders) > charts.MOST_RUNS:
        raise UserError(
            f"pkd report --compare: {len(folders)} runs are more than the {charts.MOST_RUNS} that a page can tell apart; "
            "`pkd compare` makes a table of many"
        )
    whole = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, whole, strict=True):
        if whole.count(path) > 1:
            raise UserError(f"pkd report --compare: {folder} is named twice; name each run once")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output: no such folder: {output.absolute().parent}")
    if output.is_dir() or (output.exists() and MARK not in output.read_text(encoding="utf-8", errors="replace")[:2000]):
        raise UserError(f"--output: {output} is there, and is not a report; choose another name")
    runs = [read(folder) for folder in folders]
    for other in runs[1:]:
        _require_comparable(runs[0], other)
    common = Path(os.path.commonpath(whole))
    names = [str(path.relative_to(common)) for path in whole]
    html = _render(
        "compare.html", runs[0],
        runs=runs, names=names, settings=_settings(runs), results=list(_results(runs)),
        curves=list(charts.curves_of(runs, names)), plots=list(_scores(runs, names)),
    )  # fmt: skip
    _save(output, html)


def _save(path: Path, html: str) -> None:
    write_atomically(path, lambda tmp: tmp.write_text(html, encoding="utf-8"), len(html))


def _render(template: str, run: Run, **words: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"count": "{:,.0f}".format, "percent": percent, "number": "{:.4g}".format}
    environment.filters |= {"shown": run.shown, "size": size, "duration": duration}
    return environment.get_template(template).render(run=run, metric=run.metric, **words)


# ----------------------------------------------------------------------------------------------------------- one run


def _comparison(run: Run) -> list[tuple[str, str, str]]:
    """(label, teacher's, student's): the card's rows, with what else tells the two apart after the scores."""
    rows = table_rows(cast(Results, run.results))
    teacher, student = run.results["teacher"], run.results["student"]
    more = [(key, f"{teacher[key]:.3f}", f"{student[key]:.3f}") for key in ("precision", "recall") if key in teacher]
    if run.task.regression:
        dev = run.answers["dev"]
        errors = [float(np.abs(dev.predicted[side] - dev.labels_N).mean()) for side in SIDES]
        more = [("mean absolute error", f"{errors[0]:.3f}", f"{errors[1]:.3f}")]
    place = [label for label, *_ in rows].index("parameters")
    return rows[:place] + more + rows[place:]


def _latencies(run: Run) -> list[tuple[str, list[str]]]:
    """(percentile, teacher's and student's ms)."""
    taken = [run.outputs["evaluate"]["latencies_ms"][side] for side in SIDES]
    marks = {"mean": None, "p50": 50, "p90": 90, "p95": 95, "p99": 99}
    return [
        (name, [f"{np.mean(values) if mark is None else np.percentile(values, mark):.2f}" for values in taken])
        for name, mark in marks.items()
    ]


def _files(run: Run) -> list[tuple[str, list[str]]]:
    """(file to serve, what the export found of it); nothing where there is no export yet."""
    return [
        (
            name,
            [
                f"{file['bytes'] / 1e6:.1f}", run.shown(file["main_metric"]), f"{file['agreement']:.1%}",
                f"{file['latency_ms_p50']:.2f}", f"{file['latency_ms_p99']:.2f}", f"{file['reasoningTime']:,.0f}",
            ],
        )
        for name, file in run.export.get("files_on_dev", {}).items()
    ]  # fmt: skip


def _per_class(run: Run) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each class as (teacher's, student's), and its examples; nothing for a regression.
    Many classes: those first whose F1 lost most."""
    if not run.confusion:
        return []
    sides = []
    for matrix in run.confusion.values():
        hits, predicted, true = matrix.diagonal(), matrix.sum(axis=0), matrix.sum(axis=1)
        ratios = ((hits, predicted), (hits, true), (2 * hits, predicted + true))
        sides.append([top / np.maximum(bottom, 1) for top, bottom in ratios])
    scores = np.asarray(sides).transpose(2, 1, 0)  # class, measure, side
    support = run.confusion["teacher"].sum(axis=1)
    order = np.arange(len(scores))
    if len(order) > MOST_ROWS:
        order = np.argsort(scores[:, 2, 1] - scores[:, 2, 0], kind="stable")
    return [{"name": run.class_names[i], "support": int(support[i]), "scores": scores[i].tolist()} for i in order]


def _right(run: Run) -> list[tuple[str, int]]:
    """Who is right on how many dev examples; nothing for a regression."""
    if run.task.regression:
        return []
    dev = run.answers["dev"]
    teacher, student = (dev.predicted[side] == dev.labels_N for side in SIDES)
    same = int((~teacher & ~student & (dev.predicted["teacher"] == dev.predicted["student"])).sum())
    return [
        ("both right", int((teacher & student).sum())),
        ("teacher alone", int((teacher & ~student).sum())),
        ("student alone", int((~teacher & student).sum())),
        ("both wrong, same answer", same),
        *([("both wrong, two answers", int((~teacher & ~student).sum()) - same)] if len(run.class_names) > 2 else []),
    ]


def _mistakes(run: Run) -> list[tuple[str, str, int, int]]:
    """(true, predicted, student's count, teacher's) of the student's most frequent mistakes, where there are many classes."""
    if len(run.class_names) < 9:
        return []
    student = run.confusion["student"] * (1 - np.eye(len(run.class_names), dtype=int))
    most = np.argsort(-student, axis=None, kind="stable")[:10]
    places = [divmod(int(place), len(student)) for place in most]
    names = run.class_names
    return [
        (names[i], names[j], int(student[i, j]), int(run.confusion["teacher"][i, j]))
        for i, j in places
        if student[i, j] > 1
    ]


def _differing(run: Run) -> list[dict[str, Any]]:
    """The dev examples on which student and teacher differ most: by half the sum of the differences of their
    probabilities, or the difference of their values."""
    dev = run.answers["dev"]
    if run.task.regression:
        distance_N = np.abs(dev.predicted["teacher"] - dev.predicted["student"])
    else:
        distance_N = np.abs(dev.probabilities["teacher"] - dev.probabilities["student"]).sum(axis=1) / 2
    split = text.read(run.config.task.data, "dev", run.task, run.outputs["data"]["classes"] or None)
    place = {int(example): row for row, example in enumerate(split.ids_N)}
    out = []
    for row in np.argsort(-distance_N, kind="stable")[:EXAMPLES]:
        words = [column[place[int(dev.ids_N[row])]] for column in split.texts]
        out.append({"texts": words, "distance": float(distance_N[row]), **_said(run, dev, int(row))})
    return out


def _said(run: Run, dev: Predictions, row: int) -> dict[str, Any]:
    """The label and what each side says of it: its answer, that answer's probability, and the label's."""
    if run.task.regression:
        return {
            "label": f"{dev.labels_N[row]:.2f}",
            **{side: {"answer": f"{dev.predicted[side][row]:.2f}"} for side in SIDES},
        }
    names, true = run.class_names, int(dev.labels_N[row])
    out: dict[str, Any] = {"label": names[true]}
    for side in SIDES:
        probabilities, said = dev.probabilities[side][row], int(dev.predicted[side][row])
        out[side] = {
            "answer": names[said], "share": float(probabilities[said]), "true": float(probabilities[true]), "right": said == true,
        }  # fmt: skip
    return out


# ---------------------------------------------------------------------------------------------------- several runs


def _require_comparable(first: Run, other: Run) -> None:
    def refuse(what: str, theirs: Any, ours: Any) -> UserError:
        return UserError(
            f"pkd report --compare: {first.folder} and {other.folder} cannot be compared: {what} ({theirs} and {ours})"
        )

    if first.config.task.name != other.config.task.name:
        raise refuse("they are of different tasks", first.config.task.name, other.config.task.name)
    if first.metric != other.metric:
        raise refuse("different metrics chose their epochs", first.metric, other.metric)
    if sorted(first.class_names) != sorted(other.class_names):
        raise refuse("their classes differ", len(first.class_names), len(other.class_names))
    labels = [_labels_by_id(run) for run in (first, other)]
    if labels[0] != labels[1]:
        raise refuse("they were scored on different dev data", *map(len, labels))


def _labels_by_id(run: Run) -> dict[int, Any]:
    dev, names = run.answers["dev"], run.class_names
    labels = [names[i] for i in dev.labels_N] if names else dev.labels_N.tolist()
    return dict(zip(dev.ids_N.tolist(), labels, strict=True))


def _right_by_id(run: Run) -> np.ndarray:
    """(N,) whether the student is right, 1.0 or 0.0, in the order of the example ids."""
    dev = run.answers["dev"]
    return (dev.predicted["student"] == dev.labels_N)[np.argsort(dev.ids_N)].astype(float)


def _minus_first(first: Run, run: Run) -> tuple[float, float]:
    """The difference of two students' accuracies on the same examples, and half of its 95% interval."""
    differences = _right_by_id(run) - _right_by_id(first)
    return float(differences.mean()), float(1.959964 * differences.std(ddof=1) / np.sqrt(len(differences)))


def _results(runs: Sequence[Run]) -> Iterator[tuple[str, list[str]]]:
    """(measure, each run's)."""
    first, results = runs[0], [run.results for run in runs]
    regression = first.task.regression

    def shown(key: str, form: str, of: str = "student") -> list[str]:
        return [form.format(result[of][key]) for result in results]

    if not regression:
        low_high = [result["student"]["accuracy_interval_95"] for result in results]
        each = zip(results, low_high, strict=True)
        yield "accuracy (95% interval)", [f"{r['accuracy']:.1%} ({a:.1%} to {b:.1%})" for r, (a, b) in each]
        apart = [_minus_first(first, run) for run in runs[1:]]
        yield "minus the first (95%)", ["", *(f"{100 * mean:+.1f} ± {100 * half:.1f} points" for mean, half in apart)]
    for key in TABLE_METRICS:
        if key != "accuracy" and key in results[0]["student"]:
            yield METRICS[key], shown(key, "{:.3f}")
    for split in dict.fromkeys(name for result in results for name in result["splits"]):
        there = [result["splits"].get(split) for result in results]
        yield (
            f"{split.replace('_', ' ')} {first.metric}",
            [run.shown(part["student"]["main_metric"]) if part else "" for run, part in zip(runs, there, strict=True)],
        )
    kept = [result["compression"] for result in results]
    agreement = "correlation with its teacher" if regression else "agreement with its teacher"
    yield agreement, [f"{k['agreement']:.3f}" if regression else percent(k["agreement"]) for k in kept]
    yield f"its teacher's {first.metric}", [first.shown(result["teacher"]["main_metric"]) for result in results]
    yield "kept of that", [percent(k["retention"]) for k in kept]
    yield "layers", [str(run.resolved["student_layers"]) for run in runs]
    yield "parameters", shown("parameters", "{:,}")
    yield "size, MB", shown("modelSize", "{:.1f}")
    yield "sentences per second", shown("reasoningTime", "{:,.0f}")
    yield "times its teacher's", [f"{k['throughput']:.2f}×" for k in kept]
    yield "latency at batch 1, p50, ms", shown("latency_ms_p50", "{:.2f}")
    yield "latency at batch 1, p99, ms", shown("latency_ms_p99", "{:.2f}")
    yield "best epoch", [f"{run.outputs['distill']['best_epoch']} of {run.config.train.epochs}" for run in runs]
    yield "time to distil", [duration(run.markers["distill"]["seconds"]) for run in runs]


def _scores(runs: Sequence[Run], names: Sequence[str]) -> Iterator[charts.Plot]:
    first, results = runs[0], [run.results for run in runs]
    intervals = [
        result["student"].get("accuracy_interval_95") if first.metric == "accuracy" else None for result in results
    ]
    rows = [(name, r["main_metric"], i) for name, r, i in zip(names, results, intervals, strict=True)]
    note = "with 95% intervals of each by itself (Wilson)" if intervals[0] else ""
    yield charts.scores(rows, f"Dev {first.metric}", note, first)


def _settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(key, each run's value) of what is not the same in all runs."""
    flat = []
    for run in runs:
        settings = run.config.model_dump(mode="json", exclude={"run": {"dir"}, "metrics": True, "trackers": True})
        known = ("beta_mean", "beta_sum", "launcher")
        resolved = {key: value for key, value in run.resolved.items() if key not in known}
        resolved["git_revision"] = (resolved["git_revision"] or "none")[:12]
        flat.append(dict(_flattened(settings)) | dict(_flattened(resolved)))
    keys = dict.fromkeys(key for values in flat for key in values)
    return [
        (key, values)
        for key in keys
        if len(set(values := [_value(each.get(key)) for each in flat])) > 1
    ]  # fmt: skip


def _flattened(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _value(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)
