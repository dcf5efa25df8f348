"""`pkd evaluate`: score any fine-tuned classifier on one split, with its size and speed, without a run folder."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
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
from pkd_dist.data.examples import Split, is_labelled
from pkd_dist.distributed.ranks import discover
from pkd_dist.distributed.world import World
from pkd_dist.errors import UserError
from pkd_dist.evaluation.compare import size_figures
from pkd_dist.evaluation.metrics import score_split
from pkd_dist.evaluation.results import class_facts
from pkd_dist.evaluation.scoring import evaluating, forward_of, predict_logits
from pkd_dist.evaluation.speed import TimedInputs, measure_speed
from pkd_dist.model import encoder
from pkd_dist.model.compatibility import require_compatible
from pkd_dist.telemetry.progress import Bar

MODEL_OPTION = "--model"


def evaluate_folder(model: str, task_settings: schema.Task, settings: schema.Evaluate, split: str) -> dict[str, object]:
    """Score a fine-tuned classifier in float32 and time it.

    Args:
        model: Folder, hub name or `package:NAME`; errors name it `--model`.
        split: One with labels.

    Returns:
        `task`, `split`, `n` (number of examples), the metrics of the task, `parameters`, `modelSize` (MB) and speed.

    Raises:
        UserError: The classifier or the data cannot be used, or they do not fit each other.
    """
    task = tasks.resolve(task_settings)
    folder = encoder.locate(model, MODEL_OPTION)
    config = encoder.load_config(folder, MODEL_OPTION)
    sources.require(task_settings.data, split, task)
    tokenizer = encoder.load_tokenizer(folder, MODEL_OPTION)
    require_compatible(config, tokenizer, task_settings.max_length, model, MODEL_OPTION)
    encoder.require_classifier(folder, model, MODEL_OPTION)
    require_outputs(task, config, model, MODEL_OPTION)
    order = class_order(task, config, MODEL_OPTION)
    examples, per_class = _read(task_settings.data, split, task, order)
    require_outputs_for_split(task, config, examples, model, MODEL_OPTION)
    about: Mapping[str, object] = {}
    if not task.regression:
        classes = match(task, examples.classes, per_class, output_names(config))
        task, about = with_positive(task, classes), class_facts(classes)
    classifier = encoder.load_model(folder, MODEL_OPTION)
    world = World(discover())
    try:
        torch.nn.Module.to(classifier, world.device)
        forward, pad_id = forward_of(classifier), tokenizer.pad_token_id
        with tempfile.TemporaryDirectory() as scratch, evaluating(classifier):
            made = tokens.tokenize(examples, tokenizer, task_settings.max_length, Path(scratch))
            with Bar(f"evaluate, {split}", len(made)) as bar:
                logits_NC = predict_logits(forward, made, world, settings.batch_size, pad_id, bar.advance)
            inputs = TimedInputs.choose(made, pad_id, world.device, settings)
            timing = measure_speed({"model": forward}, inputs)["model"]
            scores = score_split(logits_NC, made, task)
            n = len(made)
        figures = {**scores, **size_figures(classifier), **timing.figures}
        return {"task": task.name, "split": split, "n": n, **figures, **about}
    finally:
        world.close()


def _read(data: str, split: str, task: tasks.Task, classes: Sequence[str] | None) -> tuple[Split, Sequence[int] | None]:
    """Read a labelled split, and count the training examples of each class if they choose the positive one.

    A task without fixed classes takes them from the training split, if there is one.
    """
    per_class: list[int] | None = None
    two_of_data = task.positive_class is None and len(classes or ()) in (0, 2) and not task.regression
    if two_of_data and sources.locate(data, "train", task):
        train = text.read(data, "train", task, classes)
        classes, per_class = train.classes, np.bincount(train.labels_N, minlength=len(train.classes)).tolist()
    examples = text.read(data, split, task, classes)
    if not is_labelled(examples.labels_N).all():
        raise UserError(f"{examples.source} has no labels to score; `pkd predict` answers it", "--split")
    return examples, per_class
