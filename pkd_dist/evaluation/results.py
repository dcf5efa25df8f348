"""The content of results_eval.json, and the teacher/student table that is made of it. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from typing_extensions import NotRequired, TypedDict

from pkd_dist.metric_names import MAIN_METRIC, METRICS, TABLE_METRICS

if TYPE_CHECKING:
    from pkd_dist.data.class_mapping import ClassMapping

SIDES = ("teacher", "student")


class Scores(TypedDict, total=False):
    """Metrics of a model on a split: those of a classification, or those of a regression.

    `undefined` names those that these labels or predictions do not define; they count as 0. It is absent if all are defined.
    """

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
    undefined: list[str]


BUSY_SPREAD = 0.25
"""Spread of the passes from which other work on the machine is likely to have changed the figures."""


class Speed(TypedDict):
    """How fast a model was, in the files that a run leaves.

    Latencies are percentiles at batch size 1. `samples_per_second` is that of the median pass over batches; `reasoningTime`
    is the same number under the name that readers of the OneFlow reference look for. `spread` is how far the passes differ,
    as a share of the median; `threads` is 0 on a GPU.
    """

    latency_ms_p50: float
    latency_ms_p99: float
    samples_per_second: float
    reasoningTime: float
    spread: float
    threads: int


class Size(TypedDict):
    """Size of a model; `modelSize` is that of its weights in MB, 10^6 bytes each."""

    parameters: int
    modelSize: float


class ModelResults(Scores, Size, Speed):
    """Scores of a model on dev, its size and its speed."""


class Compression(TypedDict):
    """Ratios of student and teacher.

    `parameters`, `size` and `throughput` say how many times smaller or faster the student is, `retention` is its main
    metric over the teacher's (None where the teacher has none above 0), `agreement` see `metrics.agreement`.
    """

    parameters: float
    size: float
    throughput: float
    retention: float | None
    agreement: float


class SplitResults(TypedDict):
    """Both models on a labeled split; `n` is the number of examples."""

    n: int
    teacher: Scores
    student: Scores
    agreement: float


class Ensemble(TypedDict):
    """Several teachers: their number, and the scores of the first alone, by split."""

    teachers: int
    first: dict[str, Scores]


class Results(TypedDict):
    """results_eval.json. The student's metrics, modelSize, samples_per_second and reasoningTime (the same number) are repeated
    at the top level.

    `classes` has one entry for each output, in order: `output` (the teacher's name of it), `label` (the value in the data)
    and `name`. `positive` is the name of the class of precision, recall and F1; null unless there are two classes. A
    regression has neither.

    `ensemble` is there where there are several teachers. The teacher's scores are then those of their mean answer; its size and
    speed are those of the first.
    """

    task: str
    split: str
    n: int
    teacher: ModelResults
    student: ModelResults
    compression: Compression
    splits: dict[str, SplitResults]
    ensemble: NotRequired[Ensemble]
    classes: NotRequired[list[dict[str, str]]]
    positive: NotRequired[str | None]


class ClassFacts(TypedDict):
    """The part of `Results` that says what the outputs mean."""

    classes: list[dict[str, str]]
    positive: str | None


def class_facts(classes: ClassMapping) -> ClassFacts:
    positive = None if classes.positive is None else classes.names[classes.positive]
    return {"classes": classes.as_rows(), "positive": positive}


_SIZE = (("parameters", "parameters", "{:,}"), ("modelSize", "size, MB (10^6 bytes)", "{:.1f}"))
_SPEED = (
    ("reasoningTime", "sentences per second", "{:.0f}"),
    ("latency_ms_p50", "latency at batch 1, p50, ms", "{:.2f}"),
    ("latency_ms_p99", "latency at batch 1, p99, ms", "{:.2f}"),
)
"""(key, label, format) of what a table shows beside the metrics."""
_STUDENT_ONLY = ("parameters", "latency_ms_p50", "latency_ms_p99", "accuracy_interval_95", "spread", "threads")
"""Keys of the student that are not repeated at the top level."""


def combine(
    task: str, dev: SplitResults, models: Mapping[str, ModelResults], splits: dict[str, SplitResults]
) -> Results:
    """Put results_eval.json together.

    Args:
        models: Side -> what was found of it beside its scores: parameters, modelSize, speed.
        splits: The other labeled splits.
    """
    teacher = cast(ModelResults, {**dev["teacher"], **models["teacher"]})
    student = cast(ModelResults, {**dev["student"], **models["student"]})
    compression: Compression = {
        "parameters": teacher["parameters"] / student["parameters"],
        "size": teacher["modelSize"] / student["modelSize"],
        "throughput": student["reasoningTime"] / teacher["reasoningTime"],
        "retention": _retention(teacher, student),
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


def _retention(teacher: Scores, student: Scores) -> float | None:
    """Return the student's main metric over the teacher's; None where that says nothing."""
    told = all(MAIN_METRIC not in side.get("undefined", ()) for side in (teacher, student))
    return student["main_metric"] / teacher["main_metric"] if told and teacher["main_metric"] > 0 else None


def table_rows(results: Results, speed: bool = True) -> list[tuple[str, str, str]]:
    """Return (label, teacher, student) rows of the metrics, sizes and speeds."""
    teacher, student = results["teacher"], results["student"]
    scores = [key for key in TABLE_METRICS if key in teacher]
    rows = [(METRICS[key], _score(teacher, key), _score(student, key)) for key in scores]
    rows += _figure_rows(_SIZE, teacher, student)
    return rows + (_figure_rows(_SPEED, teacher, student) if speed else [])


def _figure_rows(
    keys: Sequence[tuple[str, str, str]], first: Mapping[str, object], second: Mapping[str, object]
) -> list[tuple[str, str, str]]:
    where = threads(first.get("threads"))
    return [
        (label + (where if keys is _SPEED else ""), form.format(first[key]), form.format(second[key]))
        for key, label, form in keys
    ]


def threads(count: object) -> str:
    """Return what a figure of speed is followed by; nothing for a GPU, whose name is shown elsewhere."""
    return f", {count} thread{'s' if count != 1 else ''}" if count else ""


def _score(side: ModelResults, key: str) -> str:
    if key in side.get("undefined", ()):
        return "undefined"
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


def retention_sentence(results: Results) -> str:
    """Say how much of the teacher's score the student retains, or why nobody can."""
    retention, score = results["compression"]["retention"], results["teacher"]["main_metric"]
    if retention is not None:
        return f"the student retains {100 * retention:.1f}% of the teacher's score"
    if any(MAIN_METRIC in results[side].get("undefined", ()) for side in SIDES):  # type: ignore[literal-required]
        return (
            f"the main metric is undefined on these {results['split']} examples, so it says nothing about either model"
        )
    return f"the teacher scores {score:.3f}, so there is no score for the student to retain"


@dataclass(frozen=True)
class Deployed:
    """The file of an export to deploy.

    Attributes:
        metric, score: Its main metric on dev.
        speed, teacher, student: Its speed and that of both models in PyTorch, measured in turn.
    """

    path: Path
    bytes: int
    metric: str
    score: float
    speed: Speed
    teacher: Speed
    student: Speed

    def line(self) -> str:
        """Say what it is worth."""
        score = f"{100 * self.score:.1f}%" if self.metric == "accuracy" else f"{self.score:.3f}"
        rate, of_teacher = self.speed["reasoningTime"], self.teacher["reasoningTime"]
        return (
            f"deploy {self.path}: {METRICS[self.metric]} {score}, {self.bytes / 1e6:.1f} MB, {rate:,.0f} sentences per second "
            f"({rate / of_teacher:.1f} times the teacher's), p50 {self.speed['latency_ms_p50']:.2f} ms"
            f"{threads(self.speed['threads'])}"
        )


def closing_table(results: Results, export: Path, report: Path, deployed: Deployed | None = None) -> str:
    """Return the plain-text table a run ends with, and the paths of its export and report.

    It leads with the file to deploy, if there is one; then the speeds of the models are those measured in turn with it.
    """
    rows = [("", *SIDES), *table_rows(results, speed=deployed is None)]
    if deployed is not None:
        rows += _figure_rows(_SPEED, deployed.teacher, deployed.student)
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join((row[0].ljust(widths[0]), row[1].rjust(widths[1]), row[2].rjust(widths[2]))) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    lines.append(f"{retention_sentence(results)}; {agreement_sentence(results)} ({results['n']} dev examples)")
    first = [] if deployed is None else [deployed.line(), ""]
    return "\n".join([*first, *lines, "", f"export: {export}", f"report: {report}"])
