"""Match the outputs of a fine-tuned classifier to the classes of a task.

Every function takes the `key` under which the user named the model (`teacher.model` in a run, `--model` on the command
line); error messages begin with it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from pkd_dist.data.tasks import Task
from pkd_dist.data.text import Split
from pkd_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def require_outputs(task: Task, config: PretrainedConfig, name: str, key: str) -> None:
    """Check that a classifier has one output for each class of the task, where the task fixes its classes.

    Args:
        config: Configuration of the classifier.
        name: The classifier as the user named it.

    Raises:
        UserError: The numbers differ.
    """
    outputs = len(_class_names(config))
    if task.regression and outputs != 1:
        raise UserError(f"{name} has {outputs} outputs, but a regression needs 1; {_remedy(key)}", key)
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
    outputs = len(_class_names(config))
    if not task.regression and len(split.classes) != outputs:
        raise UserError(
            f"{name} has {outputs} classes, {split.source} has {len(split.classes)} "
            f"({', '.join(split.classes[:10])}); {_remedy(key)}",
            key,
        )


def class_order(task: Task, config: PretrainedConfig, key: str) -> tuple[str, ...] | None:
    """Return the label values in the order of a classifier's outputs, as its class names tell.

    Returns:
        The task's own order where the outputs are unnamed (`LABEL_0`, ...) or the task is a regression; None where the
        task has no fixed classes either.

    Raises:
        UserError: The class names are not those of the task.
    """
    if task.regression:
        return task.classes
    names = _class_names(config)
    if all(name.upper() == f"LABEL_{i}" for i, name in enumerate(names)):
        return task.classes
    if task.classes is None:
        return tuple(names)  # reading the data rejects labels that are not among them
    for own in (task.class_names, task.classes):
        if own and sorted(name.lower() for name in names) == sorted(name.lower() for name in own):
            value_of = {name.lower(): value for name, value in zip(own, task.classes, strict=True)}
            return tuple(value_of[name.lower()] for name in names)
    raise UserError(
        f"its classes are {', '.join(names)}, those of {task.name} are "
        f"{', '.join(task.class_names or task.classes)}; {_remedy(key)}",
        key,
    )


def with_positive_class(task: Task, order: tuple[str, ...] | None) -> Task:
    """Return the task with `positive` moved to where a binary classifier puts the task's second class."""
    if order and task.classes and len(order) == 2:
        return replace(task, positive=order.index(task.classes[1]))
    return task


def _class_names(config: PretrainedConfig) -> list[str]:
    """Return the names of a classifier's outputs, in order."""
    names = cast("dict[int, str]", config.id2label)
    return [str(names[i]) for i in range(cast(int, config.num_labels))]


def _remedy(key: str) -> str:
    return "give a model of this task" + (", or set teacher.finetune" if key == "teacher.model" else "")
