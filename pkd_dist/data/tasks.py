"""What a task is: its columns, its classes and the metric that chooses the best epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pkd_dist.config import Task as TaskConfig
from pkd_dist.errors import UserError

MAIN_METRICS = {
    "accuracy": "accuracy",
    "mcc": "MCC",
    "f1": "f_1",
    "pearson_spearman": "pearson_spearman",
}
"""`task.metric` -> key of `results_eval.json` (`pearson_spearman`: the mean of both)."""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        text: the one or two text columns.
        label: the label column.
        classes: values of the label column in class order; None: taken from the training split, sorted.
        class_names: what the exported model calls the classes; None: the values themselves.
        metric: a key of `MAIN_METRICS`.
        regression: the label is a number.
    """

    name: str
    text: tuple[str, ...]
    label: str
    classes: tuple[str, ...] | None = None
    class_names: tuple[str, ...] | None = None
    metric: str = "accuracy"
    regression: bool = False

    @property
    def main_metric(self) -> str:
        return MAIN_METRICS[self.metric]

    def names_of(self, classes: Sequence[str]) -> list[str]:
        """What the exported model calls these values of the label column."""
        own = dict(zip(self.classes or (), self.class_names or (), strict=False))
        return [own.get(value, value) for value in classes]


_ENTAILMENT = ("entailment", "not_entailment")
GLUE = {
    task.name: task
    for task in (
        Task("sst2", ("sentence",), "label", ("0", "1"), ("negative", "positive")),
        Task("mrpc", ("#1 String", "#2 String"), "Quality", ("0", "1"), ("not_equivalent", "equivalent")),
        Task("qqp", ("question1", "question2"), "is_duplicate", ("0", "1"), ("not_duplicate", "duplicate")),
        Task("qnli", ("question", "sentence"), "label", _ENTAILMENT),
        Task("rte", ("sentence1", "sentence2"), "label", _ENTAILMENT),
        Task("wnli", ("sentence1", "sentence2"), "label", ("0", "1"), ("not_entailment", "entailment")),
        Task("stsb", ("sentence1", "sentence2"), "score", metric="pearson_spearman", regression=True),
    )
}


def resolve(config: TaskConfig) -> Task:
    """The task that a configuration names.

    Raises:
        UserError: an unknown name.
    """
    if config.name == "custom":
        assert config.text and config.label, "checked by the schema"
        regression = config.kind == "regression"
        metric = config.metric or ("pearson_spearman" if regression else "accuracy")
        return Task("custom", tuple(config.text), config.label, metric=metric, regression=regression)
    try:
        task = GLUE[config.name.lower().replace("-", "").replace("_", "")]
    except KeyError:
        raise UserError(
            f"task.name: {config.name!r} is not known; allowed: {', '.join(sorted(GLUE))}, custom"
        ) from None
    if config.metric and task.regression != (config.metric == "pearson_spearman"):
        raise UserError(f"task.metric: {config.metric} does not fit {task.name}; its own is {task.metric}")
    return Task(**{**task.__dict__, "metric": config.metric or task.metric})
