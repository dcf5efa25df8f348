"""How a student comes into being: layers of the teacher, the first layers of a pretrained model, random weights, or a
folder of the user's own. Each way ends in a Hugging Face folder."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from pkd_dist.config import Student as StudentConfig
from pkd_dist.errors import UserError
from pkd_dist.model.encoder import Encoder, encoder_layers, load_config, load_model, locate, num_layers
from pkd_dist.model.layers import copied_layers


def take_layers(source: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A model made of the chosen encoder layers of `source` (from 0) and all that is not an encoder layer."""
    config = copy.deepcopy(source.config)
    config.num_hidden_layers = len(layers)
    model = AutoModelForSequenceClassification.from_config(config)
    prefix, found = encoder_layers(source)
    if found is None:
        raise UserError(
            f"{type(source).__name__} has no list of encoder layers to copy from; use student.init random or a folder"
        )
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.(.*)")
    weights = {}
    for name, value in source.state_dict().items():
        match = pattern.fullmatch(name)
        if match is None:
            weights[name] = value
        elif int(match[1]) in layers:
            weights[f"{prefix}.{layers.index(int(match[1]))}.{match[2]}"] = value
    model.load_state_dict(weights)
    return model


def create(
    config: StudentConfig, teacher: str, pretrained: str, labels: dict[str, Any], seed: int
) -> tuple[PreTrainedModel, str]:
    """Makes the student's starting weights.

    Args:
        config: `student` of the run.
        teacher: folder of the fine-tuned teacher.
        pretrained: folder or hub name of the teacher before fine-tuning, for `first_k`.
        labels: fields of a model configuration that describe the classes (`num_labels`, `id2label`, ...).
        seed: of whatever is drawn at random.

    Returns:
        The model and one line that says what it was made of.

    Raises:
        UserError: layers out of range, or a folder that cannot be used.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = load_config(teacher)
        wanted = config.num_layers or max(1, num_layers(shape) // 2)
        if config.init == "teacher_layers":
            chosen = copied_layers(config.layers, num_layers(shape))
            if config.layers is None and config.num_layers:
                chosen = _spread(config.num_layers, num_layers(shape))
            return take_layers(load_model(teacher), chosen), f"teacher layers {list(chosen)} (from 0)"
        if config.init == "random":
            shape.num_hidden_layers = wanted
            for name, value in labels.items():
                setattr(shape, name, value)
            return AutoModelForSequenceClassification.from_config(shape), f"{wanted} layers of random weights"
        if config.init == "first_k":
            source = load_model(pretrained, new_head=True, **labels)
            if wanted > num_layers(source.config):
                raise UserError(
                    f"student.num_layers: {wanted} is more than the {num_layers(source.config)} layers of {pretrained}"
                )
            return take_layers(source, range(wanted)), f"the first {wanted} layers of {pretrained}"
        source = load_model(locate(config.init, "student.init"), "student.init", new_head=True, **labels)
        if config.num_layers and config.num_layers > num_layers(source.config):
            raise UserError(
                f"student.num_layers: {config.num_layers} is more than the {num_layers(source.config)} layers of {config.init}"
            )
        return (
            take_layers(source, range(config.num_layers)) if config.num_layers else source
        ), f"the folder {config.init}"


def _spread(count: int, total: int) -> tuple[int, ...]:
    """`count` of `total` layers at even distance, the last included."""
    if count > total:
        raise UserError(f"student.num_layers: {count} is more than the teacher's {total} layers")
    return tuple(round((i + 1) * total / count) - 1 for i in range(count))


def open_student(
    folder: Path,
    dropout: float | None,
    projection: str,
    teacher_hidden: int,
    seed: int,
    used_V: np.ndarray,
    all_tokens: bool,
) -> Encoder:
    """The trainable student: the folder's model and, where it is wanted, a new projection to the teacher's width.

    Args:
        projection: `auto`: where the widths differ; `always`; `never`: no states are compared.
        used_V, all_tokens: see `Encoder`.
    """
    model = load_model(str(folder), "student_init", dropout=dropout)
    width = int(model.config.hidden_size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wanted = projection == "always" or (projection == "auto" and width != teacher_hidden)
        linear = nn.Linear(width, teacher_hidden) if wanted else None
    return Encoder(model, linear, used_V, all_tokens)
