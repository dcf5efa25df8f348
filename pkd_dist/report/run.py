"""A finished run as the report shows it.

The stage `report` builds a `Run`; notices, charts and pages take it. Array suffixes: N dev examples, C classes, S logged steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pkd_dist.config.schema import Config
from pkd_dist.data.prepare import TokenSetSummary
from pkd_dist.data.tasks import Task
from pkd_dist.environment import Environment
from pkd_dist.evaluation.calibration import Calibration
from pkd_dist.evaluation.deployment import Deployment
from pkd_dist.evaluation.predictions import Predictions
from pkd_dist.evaluation.results import SIDES
from pkd_dist.evaluation.thresholds import MultiLabel
from pkd_dist.metric_names import METRICS, SHARES
from pkd_dist.report.format import percent


@dataclass(frozen=True)
class StageTime:
    """Duration of a finished stage.

    Attributes:
        seconds: over all attempts except those that were killed or failed.
        starts: number of attempts.
        stopped: number of attempts ended by a stop signal.
    """

    name: str
    seconds: float
    starts: int
    stopped: int


@dataclass(frozen=True)
class EpochScore:
    """Evaluation on dev at the end of an epoch, counted from 1; `divergence` is that of a student from its teacher."""

    epoch: int
    step: int
    main_metric: float
    divergence: float | None = None


@dataclass(frozen=True)
class Steps:
    """The logged steps, by column.

    Attributes:
        step_S: int64 step numbers.
        losses: term -> (S,) float64; `total` first.
        learning_rate_S, grad_norm_S: float64.
        seconds: part of a step -> its seconds, for each timed step; `step` is the whole step.
    """

    step_S: np.ndarray
    losses: Mapping[str, np.ndarray]
    learning_rate_S: np.ndarray
    grad_norm_S: np.ndarray
    seconds: tuple[Mapping[str, float], ...]


@dataclass(frozen=True)
class Scores:
    """Scores of a model on a split. All but `main_metric` are None if the task does not have them."""

    main_metric: float
    accuracy: float | None
    share_interval: tuple[float, float] | None
    """95%, Wilson."""
    precision: float | None
    recall: float | None
    undefined: tuple[str, ...] = ()
    """Keys of the metrics that these examples or predictions do not define."""


@dataclass(frozen=True)
class ModelResult:
    """Scores on dev, size and speed of a model. A teacher that is a file of answers has scores alone.

    Attributes:
        rates: sentences per second of each pass; `sentences_per_second` is their median.
        latencies_ms: of single-sentence requests.
        threads: of the CPU; 0: unknown, or a GPU.
    """

    scores: Scores
    parameters: int | None
    sentences_per_second: float | None
    rates: tuple[float, ...]
    latencies_ms: tuple[float, ...]
    threads: int


@dataclass(frozen=True)
class SplitResult:
    """Scores of both models on a split other than dev."""

    name: str
    examples: int
    teacher: Scores
    student: Scores
    agreement: float


@dataclass(frozen=True)
class Compression:
    """Teacher over student (`parameters`), or student over teacher (`throughput`, `retention` of the main metric, if any)."""

    parameters: float | None
    throughput: float | None
    retention: float | None
    agreement: float


@dataclass(frozen=True)
class Results:
    """Outcome of the evaluate stage.

    Attributes:
        task: name of the task.
        split: name of the split that `models` were scored on.
        models: by side, teacher and student.
        table: rows (label, teacher, student) of the scores in the model card.
    """

    task: str
    split: str
    examples: int
    models: Mapping[str, ModelResult]
    splits: tuple[SplitResult, ...]
    compression: Compression
    table: tuple[tuple[str, str, str], ...]

    @property
    def teacher(self) -> ModelResult:
        return self.models["teacher"]

    @property
    def student(self) -> ModelResult:
        return self.models["student"]


@dataclass(frozen=True)
class Distillation:
    """Outcome of the distill stage; `best_metric` is the main metric on dev after `best_epoch`."""

    best_epoch: int
    best_metric: float
    history: tuple[EpochScore, ...]
    steps: int
    samples: int
    tokens: int
    evaluation_seconds: float

    @property
    def best(self) -> EpochScore:
        return next(evaluation for evaluation in self.history if evaluation.epoch == self.best_epoch)


@dataclass(frozen=True)
class Run:
    """A run that has finished its export.

    Attributes:
        stages: finished stages in the order of the run.
        classes: values of the label column in class order; empty for a regression. Of multiple choice, what labels call the options.
        class_names: display names of the classes.
        data: token sets by name; has `train` and `dev`.
        student_data: the same in the student's tokens; None: it reads as its teacher does.
        teacher_history: evaluations during fine-tuning; empty if the teacher was given.
        initialized_from: description of the weights the student starts from.
        steps: logged steps of the distillation.
        dev: predictions of both models on dev.
        deployment: the exported files beside the teacher.
        largest_difference: of a logit, between the exported and the trained student.
        calibration: of the student's probabilities; None: it is not calibrated.
        multilabel: thresholds and scores of each class; None: a text has one class.
    """

    config: Config
    task: Task
    environment: Environment
    stages: tuple[StageTime, ...]
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    data: Mapping[str, TokenSetSummary]
    student_data: Mapping[str, TokenSetSummary] | None
    teacher_history: tuple[EpochScore, ...]
    initialized_from: str
    distillation: Distillation
    steps: Steps
    results: Results
    dev: Predictions
    deployment: Deployment
    largest_difference: float
    calibration: Calibration | None
    multilabel: MultiLabel | None = None

    @property
    def metric(self) -> str:
        """Display name of the main metric."""
        return METRICS[self.task.main_metric]

    def metric_value(self, value: float) -> str:
        """Format a value of the main metric."""
        return percent(value) if self.task.main_metric in SHARES else f"{value:.3f}"

    def predicted(self, side: str) -> np.ndarray:
        """Return the (N,) predictions on dev: class indices, or the values of a regression; for multi-label (N, C) booleans."""
        return self.dev.predicted[side]

    @cached_property
    def confusion(self) -> dict[str, np.ndarray]:
        """(C, C) counts on dev by side, rows are true classes; empty for a regression, for multi-label and for multiple choice.

        Without labels the rows are the teacher's classes, and there are counts of the student alone.
        """
        if not (self.task.has_single_classes and self.task.has_named_classes):
            return {}
        return {side: self.dev.confusion(side) for side in (SIDES if self.task.has_labels else ("student",))}
