"""`pkd evaluate`: score any fine-tuned classifier on one split, with its size and speed, without a run folder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from pkd_dist.config import schema
from pkd_dist.data import sources, tasks, text, tokens
from pkd_dist.data.class_mapping import (
    class_order,
    match,
    output_names,
    require_outputs,
    require_outputs_for_split,
    with_positive,
)
from pkd_dist.data.examples import Split, class_counts, is_labelled
from pkd_dist.distributed.ranks import discover
from pkd_dist.distributed.world import World
from pkd_dist.errors import UserError
from pkd_dist.evaluation.compare import size_figures
from pkd_dist.evaluation.metrics import score_split
from pkd_dist.evaluation.results import ModelResults, class_facts
from pkd_dist.evaluation.scoring import evaluating, forward_of, predict_logits
from pkd_dist.evaluation.speed import TimedInputs, measure_speed
from pkd_dist.model import encoder
from pkd_dist.model.compatibility import require_compatible, usual_length
from pkd_dist.telemetry.progress import Bar

MODEL_OPTION = "--model"


class Figures(ModelResults, total=False):
    """What `pkd evaluate` prints: what was scored, the figures of the model, and the examples that were `truncated`."""

    task: str
    split: str
    n: int
    max_length: int
    truncated: int


def evaluate_folder(
    model: str, task_settings: schema.Task, settings: schema.Evaluate, split: str, max_length: int | None
) -> Figures:
    """Score a fine-tuned classifier in float32 and time it.

    Args:
        model: Folder, hub name or `package:NAME`; errors name it `--model`.
        split: One with labels.
        max_length: Tokens at which texts are truncated; None: see `usual_length`.

    Returns:
        `task`, `split`, `n` (number of examples), `max_length`, `truncated` (number of examples), the metrics of the task,
        `parameters`, `modelSize` (MB of 10^6 bytes) and speed.

    Raises:
        UserError: The classifier or the data cannot be used, or they do not fit each other.
    """
    task = tasks.resolve(task_settings)
    folder = encoder.locate(model, MODEL_OPTION)
    config = encoder.load_config(folder, MODEL_OPTION)
    if sources.locate(task_settings.data, split, task) is None:
        found = ", ".join(sources.available(task_settings.data, task)) or "none of this task"
        raise UserError(f"{task_settings.data} has no split {split!r}; it has {found}", "--split")
    tokenizer = encoder.load_tokenizer(folder, MODEL_OPTION)
    max_length = max_length or usual_length(config, tokenizer)
    require_compatible(config, tokenizer, max_length, model, MODEL_OPTION, multiple_choice=task.multiple_choice)
    encoder.require_classifier(folder, model, MODEL_OPTION, multiple_choice=task.multiple_choice)
    require_outputs(task, config, model, MODEL_OPTION)
    order = class_order(task, config, MODEL_OPTION)
    examples, per_class = _read(task_settings.data, split, task, order)
    require_outputs_for_split(task, config, examples, model, MODEL_OPTION)
    about: Mapping[str, object] = {}
    if task.has_named_classes:
        classes = match(task, examples.classes, per_class, output_names(config))
        task, about = with_positive(task, classes), class_facts(classes)
    classifier = encoder.load_model(folder, MODEL_OPTION)
    world = World(discover())
    try:
        torch.nn.Module.to(classifier, world.device)
        forward, pad_id = forward_of(classifier), tokenizer.pad_token_id
        with tempfile.TemporaryDirectory() as scratch, evaluating(classifier):
            made = tokens.tokenize(examples, tokenizer, max_length, Path(scratch))
            with Bar(f"evaluate, {split}", len(made)) as bar:
                logits_NC = predict_logits(forward, made, world, settings.batch_size, pad_id, bar.advance)
            inputs = TimedInputs.choose(made, pad_id, world.device, settings)
            timing = measure_speed({"model": forward}, inputs)["model"]
            scores = score_split(logits_NC, made, task)
            read = {"n": len(made), "max_length": max_length, "truncated": made.truncated}
        figures = {**scores, **size_figures(classifier), **timing.figures}
        return cast(Figures, {"task": task.name, "split": split, **read, **figures, **about})
    finally:
        world.close()


def _read(data: str, split: str, task: tasks.Task, classes: Sequence[str] | None) -> tuple[Split, Sequence[int] | None]:
    """Read a labeled split, and count the training examples of each class if they choose the positive one.

    A task without fixed classes takes them from the training split, if there is one.
    """
    per_class: list[int] | None = None
    two_of_data = (
        task.positive_class is None and len(classes or ()) in (0, 2) and not task.regression and not task.class_columns
    )
    if two_of_data and sources.locate(data, "train", task):
        train = text.read(data, "train", replace(task, unlabelled_train="accept"), classes)
        if is_labelled(train.labels_N).any():
            classes, per_class = train.classes, class_counts(train.labels_N, len(train.classes)).tolist()
    examples = text.read(data, split, task, classes)
    if not is_labelled(examples.labels_N).all():
        raise UserError(f"{examples.source} has no labels to score; `pkd predict` answers it", "--split")
    return examples, per_class
