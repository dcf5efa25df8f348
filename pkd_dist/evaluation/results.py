"""The content of results_eval.json, and the teacher/student table that is made of it. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from typing_extensions import NotRequired, TypedDict

from pkd_dist.metric_names import METRICS, TABLE_METRICS

if TYPE_CHECKING:
    from pkd_dist.data.class_mapping import ClassMapping

SIDES = ("teacher", "student")


class Scores(TypedDict, total=False):
    """Metrics of a model on a split: those of a classification, or those of a regression."""

    accuracy: float
    accuracy_interval_95: list[float]
    MCC: float
    precision: float
    recall: float
    f_1: float
    pearson: float
    spearman: float
    pearson_spearman: float
    main_metric: float


class ModelResults(Scores, total=False):
    """Scores of a model on dev, its size (MB of its weights) and its speed (see `Timing.figures`)."""

    parameters: int
    modelSize: float
    latency_ms_p50: float
    latency_ms_p99: float
    reasoningTime: float


class Compression(TypedDict):
    """Ratios of student and teacher.

    `parameters`, `size` and `throughput` say how many times smaller or faster the student is, `retention` is its main
    metric over the teacher's, `agreement` see `metrics.agreement`.
    """

    parameters: float
    size: float
    throughput: float
    retention: float
    agreement: float


class SplitResults(TypedDict):
    """Both models on a labelled split; `n` is the number of examples."""

    n: int
    teacher: Scores
    student: Scores
    agreement: float


class Results(TypedDict):
    """results_eval.json. The student's metrics, modelSize and reasoningTime are repeated at the top level.

    `classes` has one entry for each output, in order: `output` (the teacher's name of it), `label` (the value in the data)
    and `name`. `positive` is the name of the class of precision, recall and F1; null unless there are two classes. A
    regression has neither.
    """

    task: str
    split: str
    n: int
    teacher: ModelResults
    student: ModelResults
    compression: Compression
    splits: dict[str, SplitResults]
    classes: NotRequired[list[dict[str, str]]]
    positive: NotRequired[str | None]


class ClassFacts(TypedDict):
    """The part of `Results` that says what the outputs mean."""

    classes: list[dict[str, str]]
    positive: str | None


def class_facts(classes: ClassMapping) -> ClassFacts:
    positive = None if classes.positive is None else classes.names[classes.positive]
    return {"classes": classes.as_rows(), "positive": positive}


_SIZE_AND_SPEED = (
    ("parameters", "parameters", "{:,}"),
    ("modelSize", "size, MB", "{:.1f}"),
    ("reasoningTime", "sentences per second", "{:.0f}"),
    ("latency_ms_p50", "latency at batch 1, p50, ms", "{:.2f}"),
    ("latency_ms_p99", "latency at batch 1, p99, ms", "{:.2f}"),
)
"""(key, label, format) of what a table shows beside the metrics."""
_STUDENT_ONLY = ("parameters", "latency_ms_p50", "latency_ms_p99", "accuracy_interval_95")
"""Keys of the student that are not repeated at the top level."""


def combine(
    task: str, dev: SplitResults, models: Mapping[str, ModelResults], splits: dict[str, SplitResults]
) -> Results:
    """Put results_eval.json together.

    Args:
        models: Side -> what was found of it beside its scores: parameters, modelSize, speed.
        splits: The other labelled splits.
    """
    teacher = cast(ModelResults, {**dev["teacher"], **models["teacher"]})
    student = cast(ModelResults, {**dev["student"], **models["student"]})
    retained = teacher["main_metric"]
    compression: Compression = {
        "parameters": teacher["parameters"] / student["parameters"],
        "size": teacher["modelSize"] / student["modelSize"],
        "throughput": student["reasoningTime"] / teacher["reasoningTime"],
        "retention": student["main_metric"] / retained if retained else 0.0,
        "agreement": dev["agreement"],
    }
    results = {
        "task": task,
        "split": "dev",
        "n": dev["n"],
        **{key: value for key, value in student.items() if key not in _STUDENT_ONLY},
        "teacher": teacher,
        "student": student,
        "compression": compression,
        "splits": splits,
    }
    return cast(Results, results)


def table_rows(results: Results) -> list[tuple[str, str, str]]:
    """Return (label, teacher, student) rows of the metrics, sizes and speeds."""
    teacher, student = dict(results["teacher"]), dict(results["student"])
    scores = [key for key in TABLE_METRICS if key in teacher]
    rows = [(METRICS[key], _score(results["teacher"], key), _score(results["student"], key)) for key in scores]
    rows += [(label, form.format(teacher[key]), form.format(student[key])) for key, label, form in _SIZE_AND_SPEED]
    return rows


def _score(side: ModelResults, key: str) -> str:
    if key == "accuracy":
        low, high = side["accuracy_interval_95"]
        return f"{100 * side['accuracy']:.1f}% ({100 * low:.1f} to {100 * high:.1f})"
    return f"{cast(dict[str, float], side)[key]:.3f}"


def agreement_sentence(results: Results) -> str:
    """Say how far the predictions of student and teacher agree."""
    share = results["compression"]["agreement"]
    if "accuracy" in results["student"]:
        return f"both predict the same class for {100 * share:.1f}% of the examples"
    return f"the correlation of their predictions is {share:.3f}"


def closing_table(results: Results, export: Path, report: Path) -> str:
    """Return the plain-text table a run ends with, and the paths of its export and report."""
    rows = [("", *SIDES), *table_rows(results)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join((row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]))) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    retention = results["compression"]["retention"]
    lines.append(
        f"the student retains {100 * retention:.1f}% of the teacher's score; {agreement_sentence(results)} "
        f"({results['n']} dev examples)"
    )
    return "\n".join([*lines, "", f"export: {export}", f"report: {report}"])
