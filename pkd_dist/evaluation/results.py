"""The content of results_eval.json, and what tables and sentences say of it. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from typing_extensions import NotRequired, TypedDict

from pkd_dist.evaluation.calibration import Calibration
from pkd_dist.evaluation.thresholds import MultiLabel
from pkd_dist.metric_names import MAIN_METRIC, METRICS, SHARES, TABLE_METRICS

if TYPE_CHECKING:
    from pkd_dist.data.class_mapping import ClassMapping

SIDES = ("teacher", "student")


class Scores(TypedDict, total=False):
    """Metrics of a model on a split: those of a classification, of a regression, of a multi-label task, or without labels the
    agreement with the teacher.

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
    f1_micro: float
    f1_macro: float
    f1_samples: float
    mAP: float
    subset_accuracy: float
    subset_accuracy_interval_95: list[float]
    agreement: float
    agreement_interval_95: list[float]
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

    `parameters`, `size` and `throughput` say how many times smaller or faster the student is (None where the teacher is a file
    of answers), `retention` is its main metric over the teacher's (None where the teacher has none above 0), `agreement` see
    `metrics.agreement`.
    """

    parameters: float | None
    size: float | None
    throughput: float | None
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
    """results_eval.json. A teacher that is a file of answers has scores alone. The student's metrics, modelSize, samples_per_second and reasoningTime (the same number) are repeated
    at the top level.

    `classes` has one entry for each output, in order: `output` (the teacher's name of it), `label` (the value in the data)
    and `name`. `positive` is the name of the class of precision, recall and F1; null unless there are two classes. A
    regression has neither.

    `ensemble` is there where there are several teachers. The teacher's scores are then those of their mean answer; its size and
    speed are those of the first.

    `calibration` is there with `evaluate.calibrate`, `multilabel` where a text can have several classes, and `options`, their number,
    where each example has options of its own.
    """

    task: str
    split: str
    n: int
    teacher: ModelResults
    student: ModelResults
    compression: Compression
    splits: dict[str, SplitResults]
    ensemble: NotRequired[Ensemble]
    calibration: NotRequired[Calibration]
    multilabel: NotRequired[MultiLabel]
    classes: NotRequired[list[dict[str, str]]]
    positive: NotRequired[str | None]
    options: NotRequired[int]


class ClassFacts(TypedDict):
    """The part of `Results` that says what the outputs mean."""

    classes: list[dict[str, str]]
    positive: str | None


def class_facts(classes: ClassMapping) -> ClassFacts:
    positive = None if classes.positive is None else classes.names[classes.positive]
    return {"classes": classes.as_rows(), "positive": positive}


_STUDENT_ONLY = (
    "parameters",
    "latency_ms_p50",
    "latency_ms_p99",
    "accuracy_interval_95",
    "subset_accuracy_interval_95",
    "agreement_interval_95",
    "spread",
    "threads",
)
"""Keys of the student that are not repeated at the top level."""


def combine(
    task: str, dev: SplitResults, models: Mapping[str, ModelResults], splits: dict[str, SplitResults]
) -> Results:
    """Put results_eval.json together.

    Args:
        models: Side -> what was found of it beside its scores: parameters, modelSize, speed; without a teacher that is a file of
            answers.
        splits: The other labeled splits.
    """
    teacher = cast(ModelResults, {**dev["teacher"], **models.get("teacher", {})})
    student = cast(ModelResults, {**dev["student"], **models["student"]})
    is_model = "teacher" in models
    compression: Compression = {
        "parameters": teacher["parameters"] / student["parameters"] if is_model else None,
        "size": teacher["modelSize"] / student["modelSize"] if is_model else None,
        "throughput": student["reasoningTime"] / teacher["reasoningTime"] if is_model else None,
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


def score_rows(results: Results) -> list[tuple[str, str, str]]:
    """Return (label, teacher, student) rows of the metrics of both models in PyTorch."""
    teacher, student = results["teacher"], results["student"]
    return [(METRICS[key], _score(teacher, key), _score(student, key)) for key in TABLE_METRICS if key in teacher]


def threads(count: object) -> str:
    """Return what a figure of speed is followed by; nothing for a GPU, whose name is shown elsewhere."""
    return f", {count} thread{'s' if count != 1 else ''}" if count else ""


def _score(side: ModelResults, key: str) -> str:
    if key in side.get("undefined", ()):
        return "undefined"
    if key in SHARES:
        low, high = cast(dict[str, list[float]], side)[f"{key}_interval_95"]
        return f"{100 * cast(dict[str, float], side)[key]:.1f}% ({100 * low:.1f} to {100 * high:.1f})"
    return f"{cast(dict[str, float], side)[key]:.3f}"


def agreement_sentence(results: Results) -> str:
    """Say how far the predictions of student and teacher agree."""
    share = results["compression"]["agreement"]
    if "multilabel" in results:
        return f"both give exactly the same classes to {100 * share:.1f}% of the examples"
    if "options" in results:
        return f"both choose the same option in {100 * share:.1f}% of the examples"
    if "pearson" not in results["student"]:
        return f"both predict the same class for {100 * share:.1f}% of the examples"
    return f"the correlation of their predictions is {share:.3f}"


def retention_sentence(results: Results) -> str:
    """Say how much of the teacher's score the student retains, or why nobody can."""
    retention, score = results["compression"]["retention"], results["teacher"]["main_metric"]
    if "agreement" in results["student"]:
        return "no text has a label, so all scores are agreements with the teacher"
    if retention is not None:
        return f"the student retains {100 * retention:.1f}% of the teacher's score"
    if any(MAIN_METRIC in results[side].get("undefined", ()) for side in SIDES):  # type: ignore[literal-required]
        return (
            f"the main metric is undefined on these {results['split']} examples, so it says nothing about either model"
        )
    return f"the teacher scores {score:.3f}, so there is no score for the student to retain"
