"""Render report.html: tables and examples for the template, next to the charts and notices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pkd_dist.data import text
from pkd_dist.evaluation.calibration import BINS, FITTED_ON
from pkd_dist.evaluation.results import SIDES
from pkd_dist.files import write_atomically
from pkd_dist.report.charts import calibration, deployment, evaluation, models, timing, training
from pkd_dist.report.format import duration, percent, size
from pkd_dist.report.notices import notices
from pkd_dist.report.run import Run

_MAX_EXAMPLES = 12
_MAX_ROWS = 20
"""Rows of the table of classes that are not folded."""
_MIN_CLASSES_FOR_ERRORS = 9
"""With fewer classes the confusion matrix shows all errors legibly."""
_MAX_ERRORS = 10


def write(run: Run, output: Path) -> int:
    """Write the report of a run.

    Returns:
        Size of the file in bytes.

    Raises:
        UserError: the dev data are unreadable, or the disk is full.
    """
    html = _render(run)
    write_atomically(output, lambda tmp: tmp.write_text(html, encoding="utf-8"), len(html))
    return len(html.encode())


def _render(run: Run) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"), undefined=StrictUndefined, autoescape=True,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"count": "{:,.0f}".format, "percent": percent, "number": "{:.4g}".format}
    environment.filters |= {"main_metric": run.metric_value, "size": size, "duration": duration}
    return environment.get_template("report.html").render(
        run=run,
        notices=list(notices(run)),
        deployment=run.deployment,
        tradeoffs=list(deployment.tradeoffs(run.deployment)),
        table=_table(run),
        latencies=_latencies(run),
        classes=_class_rows(run),
        max_matrix_classes=evaluation.MAX_CLASSES,
        max_rows=_MAX_ROWS,
        correct=_correct(run),
        errors=_frequent_errors(run),
        examples=_disagreements(run),
        layers=models.layers(run),
        curves=list(training.curves(run)),
        latency=evaluation.latency(run),
        throughput=evaluation.throughput(run),
        matrices=list(evaluation.matrices(run)),
        calibration=run.calibration,
        bins=BINS,
        fitted_on=FITTED_ON,
        diagrams=list(calibration.diagrams(run.calibration)) if run.calibration else [],
        tables=_set_rows(run),
        scatters=list(evaluation.scatters(run)) if run.task.regression else [],
        times=list(timing.times(run)),
    )


def _table(run: Run) -> list[tuple[str, str, str]]:
    """Return rows (label, teacher, student): the scores of the model card, and more."""
    teacher, student = run.results.teacher.scores, run.results.student.scores
    rows = list(run.results.table)
    if run.task.regression:
        errors = [f"{np.abs(run.predicted(side) - run.dev.labels_N).mean():.3f}" for side in SIDES]
        rows.append(("mean absolute error", errors[0], errors[1]))
    for name, both in (
        ("precision", (teacher.precision, student.precision)),
        ("recall", (teacher.recall, student.recall)),
    ):
        if both[0] is not None and both[1] is not None:
            rows.append((name, f"{both[0]:.3f}", f"{both[1]:.3f}"))
    shown = ["–" if model.parameters is None else f"{model.parameters:,}" for model in run.results.models.values()]
    return [*rows, ("parameters", shown[0], shown[1])]


def _latencies(run: Run) -> list[tuple[str, list[str]]]:
    """Return rows (statistic, [teacher, student] in ms)."""
    latencies = [run.results.models[side].latencies_ms for side in SIDES]
    statistics = {"mean": np.mean} | {f"p{p}": partial(np.percentile, q=p) for p in (50, 90, 95, 99)}
    return [
        (name, [f"{statistic(values):.2f}" if values else "–" for values in latencies])
        for name, statistic in statistics.items()
    ]


@dataclass(frozen=True)
class ClassRow:
    """A row of the table of classes; each score is (teacher, student)."""

    name: str
    support: int
    precision: Sequence[float]
    recall: Sequence[float]
    f1: Sequence[float]
    threshold: Sequence[float] | None = None


def _class_rows(run: Run) -> list[ClassRow]:
    """Return a row for each class, those with the largest drop of F1 first if there are many; none without classes or labels."""
    if run.multilabel is not None:
        return [row for _, rows in _set_rows(run)[:1] for row in rows]
    if len(run.confusion) < len(SIDES):
        return []
    sides = []
    for matrix_CC in run.confusion.values():
        hits, predicted, true = matrix_CC.diagonal(), matrix_CC.sum(axis=0), matrix_CC.sum(axis=1)
        ratios = ((hits, predicted), (hits, true), (2 * hits, predicted + true))
        sides.append([numerator / np.maximum(denominator, 1) for numerator, denominator in ratios])
    scores = np.asarray(sides).transpose(2, 1, 0)  # class, score, side
    support_C = run.confusion["teacher"].sum(axis=1)
    order = np.arange(len(scores))
    if len(order) > _MAX_ROWS:
        order = np.argsort(scores[:, 2, 1] - scores[:, 2, 0], kind="stable")
    return [ClassRow(run.class_names[i], int(support_C[i]), *scores[i].tolist()) for i in order]


def _set_rows(run: Run) -> list[tuple[str, list[ClassRow]]]:
    """Return (split, rows of the table of classes) where a text can have several; empty elsewhere."""
    if run.multilabel is None:
        return []
    thresholds = run.multilabel["thresholds"]
    tables = []
    for split, rows in run.multilabel["splits"].items():
        found = [
            ClassRow(
                row["name"],
                row["support"],
                precision=[row["precision"][side] for side in SIDES],
                recall=[row["recall"][side] for side in SIDES],
                f1=[row["f1"][side] for side in SIDES],
                threshold=[thresholds[side][row["name"]] for side in SIDES],
            )
            for row in rows
        ]
        if len(found) > _MAX_ROWS:
            found.sort(key=lambda row: row.f1[1] - row.f1[0])
        tables.append((split, found))
    return tables


def _correct(run: Run) -> list[tuple[str, int]]:
    """Return by how many dev examples both, one or none of the models are correct; empty for a regression or without labels."""
    if run.task.regression or not run.task.has_labels:
        return []
    predicted = {side: run.predicted(side) for side in SIDES}
    teacher, student = (_equal(predicted[side], run.dev.labels_N) for side in SIDES)
    both_wrong = ~teacher & ~student
    same = int((both_wrong & _equal(predicted["teacher"], predicted["student"])).sum())
    singular, kind = ("option", "options") if run.task.multiple_choice else ("class", "classes")
    rows = [
        ("both correct", int((teacher & student).sum())),
        ("only teacher correct", int((teacher & ~student).sum())),
        ("only student correct", int((~teacher & student).sum())),
        (f"both wrong, same {kind if run.task.multilabel else singular}", same),
    ]
    if len(run.class_names) > 2:
        rows.append((f"both wrong, different {kind}", int(both_wrong.sum()) - same))
    return rows


def _equal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return for which examples two answers are the same class, or exactly the same classes, (N,)."""
    same = np.asarray(a == b)
    return np.asarray(same.all(axis=1)) if same.ndim == 2 else same


def _frequent_errors(run: Run) -> list[tuple[str, str, int, int]]:
    """Return rows (true class, predicted class, student's count, teacher's count); empty with few classes."""
    count = len(run.class_names)
    if count < _MIN_CLASSES_FOR_ERRORS or len(run.confusion) < len(SIDES):
        return []
    student_CC = run.confusion["student"] * (1 - np.eye(count, dtype=int))
    most = np.argsort(-student_CC, axis=None, kind="stable")[:_MAX_ERRORS]
    return [
        (run.class_names[i], run.class_names[j], int(student_CC[i, j]), int(run.confusion["teacher"][i, j]))
        for i, j in (divmod(int(place), count) for place in most)
        if student_CC[i, j] > 1
    ]


@dataclass(frozen=True)
class Answer:
    """Prediction of one model for an example; of a regression only its value, of several classes which are right."""

    text: str
    probability: float = 0.0
    label_probability: float = 0.0
    correct: bool = False


@dataclass(frozen=True)
class Example:
    """A dev example with its text columns, its label and the prediction of each model by side."""

    texts: list[str]
    label: str
    answers: dict[str, Answer]


def _disagreements(run: Run) -> list[Example]:
    """Return the dev examples with the largest total variation distance between the probabilities of both models.

    Where a text can have several classes, it is half the sum of the differences of their scores. For a regression, those with the largest difference of the predicted values.
    """
    dev = run.dev
    if run.task.regression:
        distance_N = np.abs(run.predicted("teacher") - run.predicted("student"))
    else:
        distance_N = np.abs(dev.probabilities["teacher"] - dev.probabilities["student"]).sum(axis=1) / 2
    split = text.read(run.config.task.data, "dev", run.task, run.classes or None)
    place = {int(example): i for i, example in enumerate(split.ids_N)}
    names = ["", ""][: len(run.task.text)] + [f"{name}: " for name in run.classes if run.task.multiple_choice]
    return [
        _example(
            run,
            int(row),
            [f"{name}{column[place[int(dev.ids_N[row])]]}" for name, column in zip(names, split.texts, strict=True)],
        )
        for row in np.argsort(-distance_N, kind="stable")[:_MAX_EXAMPLES]
    ]


def _example(run: Run, row: int, texts: list[str]) -> Example:
    dev = run.dev
    if run.task.regression:
        answers = {side: Answer(f"{run.predicted(side)[row]:.2f}") for side in SIDES}
        return Example(texts, f"{dev.labels_N[row]:.2f}", answers)
    if run.task.multilabel:
        shown = {side: _names(run, run.predicted(side)[row]) for side in SIDES}
        truth = dev.labels_N[row] > 0
        return Example(
            texts,
            _names(run, truth),
            {side: Answer(shown[side], correct=bool((run.predicted(side)[row] == truth).all())) for side in SIDES},
        )
    label = int(dev.labels_N[row])
    answers = {}
    for side in SIDES:
        probability_C, predicted = dev.probabilities[side][row], int(run.predicted(side)[row])
        answers[side] = Answer(
            run.class_names[predicted], float(probability_C[predicted]), float(probability_C[label]), predicted == label
        )
    return Example(texts, run.class_names[label], answers)


def _names(run: Run, has_C: np.ndarray) -> str:
    """Return the names of the classes of a text."""
    return ", ".join(name for name, has in zip(run.class_names, has_C, strict=True) if has) or "none"
