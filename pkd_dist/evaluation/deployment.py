"""The table that a user takes home: the files to deploy beside the teacher, on the same examples and in the same session.

answers of every model, sizes, speeds -> `beside_teacher` -> Deployment -> manifest.json, terminal, model card, report

Needs no PyTorch.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pkd_dist.data.tasks import Task
from pkd_dist.evaluation.intervals import Interval, percentile_interval, resampled_scores, wilson_interval
from pkd_dist.evaluation.metrics import agreement, score, undefined
from pkd_dist.evaluation.results import BUSY_SPREAD, Speed, threads
from pkd_dist.metric_names import AGREEMENT, MAIN_METRIC, METRICS, MULTILABEL_METRICS, SHARES

TEACHER, TEACHER_TITLE, ANSWERS_TITLE = "teacher", "teacher, PyTorch", "teacher, answers"
_WIDTH = 110


@dataclass(frozen=True)
class Measured:
    """A model in the form in which it runs, and what it answered.

    Attributes:
        file: Path within the export; `TEACHER` for the teacher.
        title: What tables call it.
        parameters, bytes, speed: None of a teacher that is a file of answers.
        bytes: Size on disk; of the teacher that of its weights in float32, as PyTorch runs it.
        logits_NC: On the examples of all splits, in their order.
    """

    file: str
    title: str
    parameters: int | None
    bytes: int | None
    logits_NC: np.ndarray
    speed: Speed | None


@dataclass(frozen=True)
class ModelRow:
    """A row of the table; what nobody can tell is None.

    Attributes:
        file, title, parameters, bytes: See `Measured`.
        score: The main metric; None where labels or answers do not define it.
        score_interval_95: Wilson's for an accuracy, else the bootstrap's.
        agreement: With the teacher, see `metrics.agreement`.
        kept: Its score as a share of the teacher's; None where the teacher has none above 0, or its own is below 0.
        kept_interval_95: From resamples on which both models are scored (paired bootstrap).
        speed: Of all rows in turn in one session.
    """

    file: str
    title: str
    parameters: int | None
    bytes: int | None
    score: float | None
    score_interval_95: Interval | None
    agreement: float | None
    kept: float | None
    kept_interval_95: Interval | None
    speed: Speed | None


@dataclass(frozen=True)
class Deployment:
    """The files of an export beside the teacher.

    Attributes:
        metric: Key of the main metric in `METRICS`.
        splits, examples: What the scores and agreements are on.
        rows: The teacher first.
        deploy: `file` of the row to deploy.
        batch_size: Of the throughput; None: unknown.
        processor: What the speeds were measured on.
    """

    metric: str
    splits: tuple[str, ...]
    examples: int
    rows: tuple[ModelRow, ...]
    deploy: str
    batch_size: int | None
    processor: str

    @property
    def teacher(self) -> ModelRow:
        return self.rows[0]

    @property
    def best(self) -> ModelRow:
        """The row to deploy."""
        return next(row for row in self.rows if row.file == self.deploy)

    @property
    def on(self) -> str:
        """The splits of the scores."""
        return " + ".join(self.splits)

    @property
    def spread(self) -> float:
        """The largest difference of passes over the same batches, as a share of the median."""
        return max((row.speed["spread"] for row in self.rows if row.speed), default=0.0)

    @property
    def threads(self) -> int:
        return next((row.speed["threads"] for row in self.rows if row.speed), 0)

    def smaller(self, row: ModelRow) -> float | None:
        """Return how many times smaller a file is than the teacher; None where the teacher is a file of answers."""
        return self.teacher.bytes / row.bytes if self.teacher.bytes and row.bytes else None

    def faster(self, row: ModelRow) -> float | None:
        """Return how many times faster one sentence is answered than by the teacher (p50); None: not measured."""
        if self.teacher.speed is None or row.speed is None:
            return None
        return self.teacher.speed["latency_ms_p50"] / row.speed["latency_ms_p50"]

    def headline(self) -> str:
        """Say in one line what the file to deploy is worth beside the teacher."""
        smaller, faster = self.smaller(self.best), self.faster(self.best)
        said = []
        if smaller is not None:
            said.append(_ratio(smaller, "smaller", "larger", "as large as the teacher"))
        if faster is not None:
            said.append(_ratio(faster, "faster at batch 1", "slower at batch 1", "as fast at batch 1"))
        return ", ".join([*said, self._kept(self.best)])

    def _kept(self, row: ModelRow) -> str:
        metric = METRICS[self.metric]
        if self.metric == AGREEMENT and row.score is not None:
            return f"gives the teacher's answer to {self.share(row.score, row.score_interval_95)} ({self.on})"
        if row.kept is not None:
            return f"keeps {self.share(row.kept, row.kept_interval_95)} of the teacher's {metric} ({self.on})"
        if row.score is None or self.teacher.score is None:
            return f"what it keeps of the teacher's {metric} cannot be told: {metric} is undefined on {self.on}"
        return (
            f"what it keeps of the teacher's {metric} cannot be told: the teacher scores {self.teacher.score:.3f} on "
            f"{self.on}, and it {row.score:.3f}"
        )

    @staticmethod
    def share(value: float, interval: Interval | None) -> str:
        """Format a share with its interval."""
        limits = f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""
        return f"{100 * value:.1f}%{limits}"

    def score(self, row: ModelRow) -> str:
        """Format the score of a row."""
        if row.score is None:
            return "undefined"
        if self.metric in SHARES:
            return self.share(row.score, row.score_interval_95)
        low_high = row.score_interval_95
        return f"{row.score:.3f}" + (f" ({low_high[0]:.3f} to {low_high[1]:.3f})" if low_high else "")

    def head(self) -> tuple[str, ...]:
        """Return the titles of the columns; the first is that of the models."""
        metric = METRICS[self.metric]
        scores = (f"{metric} (95%)",) if self.metric == AGREEMENT else (f"{metric} (95%)", "agreement")
        return "", "parameters", "MB", *scores, "p50, ms", "p99, ms", "per second"

    def cells(self) -> list[tuple[str, ...]]:
        """Return the texts of each row."""
        return [(row.title, *self._cells(row)) for row in self.rows]

    def _cells(self, row: ModelRow) -> tuple[str, ...]:
        regression, agrees, speed = self.metric == "pearson_spearman", row.agreement, row.speed
        agreement = "–" if agrees is None else f"{agrees:.3f}" if regression else f"{100 * agrees:.1f}%"
        speeds = ("–",) * 3
        if speed is not None:
            latencies = (f"{speed['latency_ms_p50']:.2f}", f"{speed['latency_ms_p99']:.2f}")
            speeds = (*latencies, f"{speed['reasoningTime']:,.0f}")
        size = (
            "–" if row.parameters is None else f"{row.parameters:,}",
            "–" if row.bytes is None else f"{row.bytes / 1e6:.1f}",
        )
        scores = (self.score(row),) if self.metric == AGREEMENT else (self.score(row), agreement)
        return *size, *scores, *speeds

    def note(self, multiple_choice: bool = False) -> str:
        """Say what was measured, on what.

        Args:
            multiple_choice: Each example has options of its own.
        """
        return " ".join(
            [*self._on_scores(multiple_choice), *self._on_speed("example" if multiple_choice else "sentence")]
        )

    def _on_scores(self, multiple_choice: bool) -> Iterator[str]:
        scores = f"Scores: {METRICS[self.metric]} on {self.examples:,} examples ({self.on})"
        if any(row.score_interval_95 for row in self.rows):
            scores += f" with {'Wilson' if self.metric in SHARES else 'the bootstrap'}'s 95% interval"
        if self.metric == AGREEMENT:
            scores += "; no text has a label, so this says nothing about how often the teacher is right"
        elif self.best.kept_interval_95:
            scores += "; the interval of the share that is kept is the paired bootstrap's"
        yield scores + "."
        if self.metric == "pearson_spearman":
            yield "Agreement: correlation with the teacher's predictions."
        elif self.metric in MULTILABEL_METRICS:
            yield "Agreement: share of these examples on which the classes are exactly the teacher's."
        else:
            yield f"Agreement: share of these examples on which the {'option' if multiple_choice else 'class'} is the teacher's."
        yield "MB: 10^6 bytes on disk" + (
            "." if self.teacher.bytes is None else "; of the teacher, its weights in float32."
        )

    def _on_speed(self, unit: str) -> Iterator[str]:
        if not any(row.speed for row in self.rows):
            return
        where = f"{threads(self.threads).removeprefix(', ')} of {self.processor}" if self.threads else self.processor
        yield (
            f"Speed: all rows in turn, 20 {unit}s each, in one session on {where}, PyTorch in float32: single {unit}s (p50, p99), batches"
            f"{f' of {self.batch_size}' if self.batch_size else ''} (per second)."
        )
        if self.spread > BUSY_SPREAD:
            yield (
                f"Passes over the same batches differed by up to {100 * self.spread:.0f}%: other work on the machine is likely "
                "to have changed these speeds."
            )


def _ratio(value: float, more: str, less: str, same: str) -> str:
    """Say how many times `more` or `less` something is."""
    if 0.95 < value < 1.05:
        return same
    times = max(value, 1 / value)
    return f"{times:.{0 if times >= 9.95 else 1}f}x {more if value > 1 else less}"


def beside_teacher(
    task: Task,
    labels: Mapping[str, np.ndarray],
    models: Sequence[Measured],
    deploy: str,
    batch_size: int,
    processor: str,
) -> Deployment:
    """Make the rows of the table.

    Args:
        labels: Split -> (N,), in the order of the logits.
        models: The teacher first.
        deploy, batch_size, processor: See `Deployment`.
    """
    labels_N = np.concatenate(list(labels.values()))
    resampled = resampled_scores(labels_N, {model.file: model.logits_NC for model in models}, task)
    teacher = _row(task, labels_N, models[0], resampled)
    rows = []
    for model in models[1:]:
        row = _row(task, labels_N, model, resampled)
        kept, interval = _kept(teacher, row, resampled)
        agrees = agreement(model.logits_NC, models[0].logits_NC, task.multilabel)
        rows.append(dataclasses.replace(row, agreement=agrees, kept=kept, kept_interval_95=interval))
    return Deployment(task.main_metric, tuple(labels), len(labels_N), (teacher, *rows), deploy, batch_size, processor)


def _row(task: Task, labels_N: np.ndarray, model: Measured, resampled: Mapping[str, np.ndarray]) -> ModelRow:
    """Return the row of a model without what sets it beside the teacher."""
    value, interval = None, None
    if MAIN_METRIC not in undefined(model.logits_NC, labels_N, task):
        value = score(model.logits_NC, labels_N, task)[MAIN_METRIC]
        wilson = task.main_metric in SHARES
        interval = wilson_interval(value, len(labels_N)) if wilson else percentile_interval(resampled[model.file])
    return ModelRow(
        model.file, model.title, model.parameters, model.bytes, value, interval, None, None, None, model.speed
    )


def _kept(
    teacher: ModelRow, row: ModelRow, resampled: Mapping[str, np.ndarray]
) -> tuple[float | None, Interval | None]:
    """Return the share of the teacher's score that a model keeps, and its interval."""
    if teacher.score is None or teacher.score <= 0 or row.score is None or row.score < 0:
        return None, None
    teachers_R = resampled[teacher.file]
    told = bool((teachers_R > 0).all())
    return row.score / teacher.score, percentile_interval(resampled[row.file] / teachers_R) if told else None


def closing_table(table: Deployment, export: Path, report: Path, multiple_choice: bool = False) -> str:
    """Return the plain-text table that a run ends with, and the paths of its export and report."""
    lines = aligned([table.head(), *table.cells()])
    lines.insert(1, "-" * len(lines[0]))
    first = f"deploy {export / table.deploy}: {table.headline()}"
    note = textwrap.wrap(table.note(multiple_choice), max(_WIDTH, len(lines[0])))
    return "\n".join([first, "", *lines, "", *note, "", f"export: {export}", f"report: {report}"])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: the first column is aligned to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
