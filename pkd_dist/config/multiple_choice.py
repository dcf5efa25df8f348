"""What a multiple-choice task needs, and what cannot be used with it: every refusal that settings alone decide."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pkd_dist.config.schema import Config
    from pkd_dist.config.task import Task

KIND = "multiple_choice"
TASKS = ("race",)
"""Names of tasks of this kind that come with their columns."""
MOST_OPTIONS = 26
"""Of an example: labels can call them A to Z."""


def require_columns(task: Task) -> None:
    """Check the columns of a task of one's own: `task.options` and the kind belong together.

    Raises:
        ValueError: they do not, or the columns are not different ones.
    """
    if not task.is_multiple_choice:
        if key := next((key for key in ("options", "label_is", "gap") if getattr(task, key) is not None), None):
            raise ValueError(f"task.{key} is allowed only with task.kind {KIND}; remove it")
        return
    if task.options is None:
        raise ValueError(
            f"task.kind {KIND} needs task.options: the column that has a list of options, or [a, b, ...], a column for each"
        )
    columns = [task.options] if isinstance(task.options, str) else task.options
    if isinstance(task.options, list) and (len(columns) < 2 or len(set(columns)) < len(columns)):
        raise ValueError(
            f"task.options must name two or more different columns, or one that has lists, not {task.options}"
        )
    if len(columns) > MOST_OPTIONS:
        raise ValueError(
            f"task.options names {len(columns)} columns; an example can have at most {MOST_OPTIONS} options"
        )
    if both := next((name for name in columns if name in (*(task.text or ()), *task.label_columns)), None):
        raise ValueError(f"task.options: {both} is also a text or label column; name the columns of the options")
    if task.gap is not None and len(task.text or ()) < 2:
        raise ValueError(
            "task.gap is a place in the question, but task.text names a context alone; remove it, or name both columns"
        )
    if task.label is None and task.label_is is not None:
        raise ValueError("task.label_is needs labels, but task.label is null; remove it")


def refuse_in_task(task: Task) -> None:
    """Refuse settings of the section `task` that mean nothing for options.

    Raises:
        ValueError: one is set.
    """
    split = task.split
    for key, given, why in (
        ("class_names", task.class_names, "options have no names; remove it"),
        ("positive", task.positive, "no option is the positive class; remove it"),
        ("class_weights", task.class_weights, "the place of an option is no class; remove it"),
        ("label_separator", task.label_separator, "one option is right; remove it"),
        ("augment", task.augment, "changed words in a context may change which option is right; set it to null"),
        ("split.stratify", split and split.stratify, "the place of an option is no class; remove it"),
    ):
        if given:
            raise ValueError(f"task.{key} cannot be used with {_named(task)}: {why}")


def refuse(config: Config) -> None:
    """Refuse settings of other sections that cannot be used with a multiple-choice task.

    Raises:
        ValueError: one is set.
    """
    for key, why in _refused(config):
        raise ValueError(f"{key} cannot be used with {_named(config.task)}: {why}")


def _refused(config: Config) -> Iterator[tuple[str, str]]:
    distill: Any = config.distill
    if config.teacher.answers and config.teacher.answers_are == "labels" and config.task.label_is == "text":
        yield (
            "teacher.answers_are labels",
            "task.label_is is text, and answers name options by index or letter; give probabilities",
        )
    if distill.beta > 0 and distill.states == "tokens":
        yield "distill.states tokens", "the states of the first token of each option are compared; use cls"
    for key in ("gram", "relations", "attention"):
        if getattr(distill, key):
            yield f"distill.{key}", "the states of the first token of each option are compared; set it to 0"
    if "triton" in config.export.formats:
        yield "export.formats triton", "its repository holds classifiers of texts; leave it out"


def _named(task: Task) -> str:
    return f"task.kind {KIND}" if task.kind == KIND else f"task.name {task.name}"
