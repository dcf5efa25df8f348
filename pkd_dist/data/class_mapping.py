"""Match the outputs of a classifier, the values of the label column and the class names; choose the positive class.

    problem_type, number and names of the outputs -> class_order -> (data is read) -> match -> ClassMapping

Functions that check a model take the `key` under which the user named it (`teacher.model` in a run, `--model` on the
command line); error messages begin with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pkd_dist.data.examples import Split
from pkd_dist.data.tasks import Task
from pkd_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SHOWN = 12
_UNNAMED = re.compile(r"LABEL_(\d+)", re.IGNORECASE)
MULTI_LABEL, _SINGLE_LABEL, _REGRESSION = "multi_label_classification", "single_label_classification", "regression"


@dataclass(frozen=True)
class ClassMapping:
    """The classes of a task in the order of a model's outputs.

    Attributes:
        outputs: What the model calls its outputs.
        values: Values of the label column.
        names: Class names of the exported model.
        positive: Index of the positive class; None unless there are two classes.
        why: Why that one, for people.
    """

    outputs: tuple[str, ...]
    values: tuple[str, ...]
    names: tuple[str, ...]
    positive: int | None
    why: str

    def sentence(self) -> str:
        """Return the mapping in one line."""
        rows = [
            " = ".join(dict.fromkeys(map(repr, row))) for row in zip(self.outputs, self.values, self.names, strict=True)
        ]
        more = f", ... ({len(rows)} classes)" if len(rows) > _SHOWN else ""
        line = "classes (output = label = name): " + ", ".join(rows[:_SHOWN]) + more
        return line if self.positive is None else f"{line}; positive: {self.names[self.positive]!r} ({self.why})"

    def as_rows(self) -> list[dict[str, str]]:
        """Return one entry for each output: `output`, `label`, `name`."""
        return [
            {"output": output, "label": value, "name": name}
            for output, value, name in zip(self.outputs, self.values, self.names, strict=True)
        ]


def match(
    task: Task, classes: Sequence[str], examples: Sequence[int] | None, outputs: Sequence[str] | None = None
) -> ClassMapping:
    """Return how outputs, label values and names correspond, and which class is positive.

    Args:
        classes: Label values in the order of the outputs.
        examples: Number of training examples of each class; None: unknown.
        outputs: Names of the model's outputs; None: the class names.

    Raises:
        UserError: `task.positive` is not one of two classes.
    """
    names = task.names_of(classes)
    positive, why = _positive(task, classes, names, examples)
    return ClassMapping(tuple(outputs or names), tuple(classes), tuple(names), positive, why)


def _positive(
    task: Task, classes: Sequence[str], names: Sequence[str], examples: Sequence[int] | None
) -> tuple[int | None, str]:
    given = task.positive_class
    if len(classes) != 2:
        if given is not None:
            raise UserError(f"{given!r}: only two classes have a positive one, not {len(classes)}", "task.positive")
        return None, ""
    if not task.has_labels or task.multilabel or task.multiple_choice:
        return None, ""
    if given is not None:
        index = {key: i for keys in (names, classes) for i, key in enumerate(keys)}
        if given not in index:
            raise UserError(f"{given!r} is not a class; allowed: {', '.join(names)}", "task.positive")
        return index[given], "task.positive" if task.positive_is_set else f"as {task.name} defines"
    if examples is None or examples[0] == examples[1]:
        return 1, "the second class; set task.positive to choose"
    return (0 if examples[0] < examples[1] else 1), "the rarer one in training; set task.positive to choose"


def with_positive(task: Task, mapping: ClassMapping) -> Task:
    """Return the task with the index of the positive class."""
    return task if mapping.positive is None else replace(task, positive=mapping.positive)


# -------------------------------------------------------------------------------------------------- checks of a model


def output_names(config: PretrainedConfig) -> list[str]:
    """Return the names of a classifier's outputs, in order."""
    names = {int(index): str(name) for index, name in (config.id2label or {}).items()}
    return [names[i] for i in sorted(names)]


def is_multilabel(config: PretrainedConfig) -> bool:
    """Return whether a model gives each text any number of classes."""
    return getattr(config, "problem_type", None) == MULTI_LABEL


def require_supported_outputs(
    problem_type: str | None, outputs: int, name: str, key: str | None, multilabel: bool = False
) -> None:
    """Check that a model gives one class for each text, or one number.

    Args:
        problem_type: Of its configuration. None, as in older models, means a regression if there is one output and a
            classification otherwise.
        multilabel: A model that gives any number of classes can be used, too.

    Raises:
        UserError: It is a multi-label classifier, a regression with several outputs, or a classifier with one output.
    """
    if problem_type == MULTI_LABEL and multilabel:
        return
    if problem_type == MULTI_LABEL:
        problem = "is a multi-label classifier: a text can have several of its classes"
    elif problem_type == _REGRESSION and outputs != 1:
        problem = f"is a regression with {outputs} outputs"
    elif problem_type == _SINGLE_LABEL and outputs == 1:
        problem = "is a classifier with a single output"
    else:
        return
    classes = "classes of each text" if multilabel else "one class for each text (with task.kind multilabel: several)"
    raise UserError(
        f"{name} {problem} (problem_type {problem_type} in its config.json); supported: {classes}, or a "
        f"regression with one output; {_remedy(key)}",
        key,
    )


def require_distinct_names(names: Sequence[str], model: str, key: str | None) -> None:
    """Raise UserError if a model calls two of its outputs the same."""
    if double := next((name for name in names if names.count(name) > 1), None):
        raise UserError(
            f"{model} calls two of its outputs {double!r} (id2label in its config.json); give each a name of its own",
            key,
        )


def is_regression_by_default(config: PretrainedConfig) -> bool:
    """Return whether a model is a regression because it has one output, though nothing says so."""
    return getattr(config, "problem_type", None) is None and len(output_names(config)) == 1


def require_outputs(task: Task, config: PretrainedConfig, name: str, key: str) -> None:
    """Check that a model has the outputs that a task needs, as far as the task fixes its classes; options have one output.

    Args:
        config: Configuration of the model.
        name: The model as the user named it.

    Raises:
        UserError: The kind or the number of its outputs differs.
    """
    if task.multiple_choice:
        return
    kind, names = getattr(config, "problem_type", None), output_names(config)
    outputs = len(names)
    require_supported_outputs(kind, outputs, name, key, task.multilabel)
    require_distinct_names(names, name, key)
    if task.multilabel and kind != MULTI_LABEL:
        raise UserError(
            f"{name} is no multi-label classifier (problem_type {kind} in its config.json, not {MULTI_LABEL}), but task.kind is "
            f"multilabel; {_remedy(key)}",
            key,
        )
    if task.regression and outputs != 1:
        raise UserError(f"{name} has {outputs} outputs, but a regression needs 1; {_remedy(key)}", key)
    if not task.regression and outputs == 1:
        raise UserError(
            f"{name} is a regression (it has one output), but {task.name} is a classification; {_remedy(key)}", key
        )
    if task.classes and outputs != len(task.classes):
        raise UserError(
            f"{name} has {outputs} classes, {task.name} has {len(task.classes)} ({', '.join(task.classes)}); "
            f"{_remedy(key)}",
            key,
        )


def require_outputs_for_split(task: Task, config: PretrainedConfig, split: Split, name: str, key: str) -> None:
    """Check that a classifier has one output for each class found in a split.

    Raises:
        UserError: The numbers differ.
    """
    outputs = len(output_names(config))
    if task.has_named_classes and len(split.classes) != outputs:
        raise UserError(
            f"{name} has {outputs} classes, {split.source} has {len(split.classes)} "
            f"({', '.join(split.classes[:10])}); {_remedy(key)}",
            key,
        )


def class_order(task: Task, config: PretrainedConfig, key: str) -> tuple[str, ...] | None:
    """Return the label values in the order of a classifier's outputs, as its class names tell.

    `LABEL_i`, as transformers calls unnamed outputs, is the task's class number i.

    Returns:
        The label values; None for a regression, for options, and where neither the model nor the task names the classes.

    Raises:
        UserError: The class names are not those of the task.
    """
    if not task.has_named_classes:
        return task.classes
    names = output_names(config)
    numbers = [int(found[1]) for name in names if (found := _UNNAMED.fullmatch(name))]
    if task.classes is None:
        return None if numbers == list(range(len(names))) else tuple(names)  # reading rejects labels not among them
    for own in (task.class_names, task.classes):
        if own and (values := _by_name(names, own, task.classes)):
            return values
    if sorted(numbers) == list(range(len(names))):
        return tuple(task.classes[number] for number in numbers)
    raise UserError(
        f"its classes are {', '.join(names)}, those of {task.name} are "
        f"{', '.join(task.class_names or task.classes)}; map them with task.class_names, or {_remedy(key)}",
        key,
    )


def _by_name(names: Sequence[str], own: Sequence[str], values: Sequence[str]) -> tuple[str, ...] | None:
    """Return the value of each name; None where the names are not the task's own, or are so only in part."""
    exact: Mapping[str, str] = dict(zip(own, values, strict=True))
    if sorted(names) == sorted(own):
        return tuple(exact[name] for name in names)
    folded = {name.lower(): value for name, value in exact.items()}
    if len(folded) < len(own) or sorted(name.lower() for name in names) != sorted(folded):
        return None
    return tuple(folded[name.lower()] for name in names)


def _remedy(key: str | None) -> str:
    return "give a model of this task" + (", or set teacher.finetune" if key == "teacher.model" else "")
