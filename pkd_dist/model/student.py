"""How a student comes into being: layers of the teacher, the first layers of a pretrained model, random weights, or a
folder of the user's own. Each way ends in a Hugging Face folder."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from pkd_dist.config.schema import Student as StudentConfig
from pkd_dist.errors import UserError
from pkd_dist.model.compatibility import require_compatible, require_same_tokens
from pkd_dist.model.encoder import (
    Encoder,
    encoder_layers,
    load_config,
    load_model,
    load_tokenizer,
    locate,
    num_layers,
    shares_layers,
)
from pkd_dist.model.layers import copied_layers

WAYS = ("teacher_layers", "first_k", "random")
"""Values of `student.init` that are not a folder."""


def planned_depth(config: StudentConfig, teacher: Any, tokenizer: Any, max_length: int) -> int:
    """The number of layers that a student will have.

    Args:
        config: `student` of the run.
        teacher: the teacher's configuration.
        tokenizer: the run's (the teacher's).
        max_length: of the run's inputs, tokens.

    Raises:
        UserError: whatever can be known to be wrong before it is made.
    """
    if config.init in WAYS:
        if config.hidden_size:
            _resized(teacher, config.hidden_size)
        return len(_chosen_layers(config, teacher))
    near = difflib.get_close_matches(config.init, WAYS, n=1)
    if near and not Path(config.init).exists():
        raise UserError(f"student.init: {config.init!r} is not known; did you mean {near[0]}?")
    folder = locate(config.init, "student.init")
    own = load_config(folder, "student.init")
    require_same_tokens(tokenizer, load_tokenizer(folder, "student.init"), config.init)
    require_compatible(own, tokenizer, max_length, config.init, "student.init")
    return len(_chosen_layers(config, own))


def _chosen_layers(config: StudentConfig, source: Any) -> tuple[int, ...]:
    """Layers (from 0) that a student has of a model of configuration `source`; of random ones only the number counts."""
    total = num_layers(source)
    if config.init == "teacher_layers":
        chosen = copied_layers(config.layers, total, config.num_layers, source.model_type == "modernbert")
    else:
        count = config.num_layers or (max(1, total // 2) if config.init in WAYS else total)
        if count > total and config.init != "random":
            whose = (
                f"the {total} layers of {config.init}" if config.init not in WAYS else f"the teacher's {total} layers"
            )
            raise UserError(f"student.num_layers: {count} is more than {whose}")
        chosen = tuple(range(count))
    groups = getattr(source, "num_hidden_groups", None) or 1
    if groups > 1 and len(chosen) < total:
        raise UserError(
            f"student.init: {config.init}: {total} layers share {groups} groups of weights, by their place in the whole, so "
            "fewer layers would be others; use a teacher with one group, or a folder of your own as it is"
        )
    return chosen


def _cut(config: Any, layers: Sequence[int]) -> Any:
    """A model configuration with these layers alone (from 0); of random layers beyond its own the kinds repeat."""
    config = copy.deepcopy(config)
    for name in ("layer_types", "attention_window"):  # ModernBERT's and Longformer's: a layer keeps its own
        values = getattr(config, name, None)
        if isinstance(values, list):
            setattr(config, name, [values[i % len(values)] for i in layers])
    config.num_hidden_layers = len(layers)
    return config


def _resized(config: Any, hidden: int) -> Any:
    """A model configuration of another width: heads as wide as before, so more or fewer; all else in proportion.

    Raises:
        UserError: it does not divide.
    """
    config = copy.deepcopy(config)
    before, head = int(config.hidden_size), int(config.hidden_size) // int(config.num_attention_heads)
    inner = "hidden_dim" if hasattr(config, "hidden_dim") else "intermediate_size"  # DistilBERT's name for it
    scaled = getattr(config, inner) * hidden
    if hidden % head or scaled % before:
        raise UserError(
            f"student.hidden_size: {hidden} does not fit: the teacher's heads are {head} wide and its {before} become "
            f"{getattr(config, inner)} inside a layer; give a multiple of {head} that keeps this ratio whole"
        )
    for name in ("embedding_size", "pooler_hidden_size"):  # where they were not a width of their own
        if getattr(config, name, None) == before:
            setattr(config, name, hidden)
    config.hidden_size, config.num_attention_heads = hidden, hidden // head
    setattr(config, inner, scaled // before)
    return config


def take_layers(source: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A model made of the chosen encoder layers of `source` (from 0) and all that is not an encoder layer. Where one set
    of weights serves all layers (ALBERT) only their number counts.

    Raises:
        UserError: its layers are not one list, or something else depends on their number.
    """
    weights = source.state_dict()
    if not shares_layers(source.config):
        prefix, found = encoder_layers(source)
        if found is None:
            raise UserError(
                f"{type(source).__name__} has no list of encoder layers to copy from; use student.init random or a folder"
            )
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.(.*)")
        for name in list(weights):
            match = pattern.fullmatch(name)
            if match is not None:
                value = weights.pop(name)
                if int(match[1]) in layers:
                    weights[f"{prefix}.{layers.index(int(match[1]))}.{match[2]}"] = value
    model = AutoModelForSequenceClassification.from_config(_cut(source.config, layers), dtype=torch.float32)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{type(source).__name__} does not stay the same with fewer layers ({why}); use student.init random or a folder"
        ) from None
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
        if config.init == "teacher_layers":
            layers = _chosen_layers(config, load_config(teacher))
            return take_layers(load_model(teacher), layers), f"teacher layers {list(layers)} (from 0)"
        if config.init == "random":
            shape = load_config(teacher)
            layers = _chosen_layers(config, shape)
            shape = _cut(_resized(shape, config.hidden_size) if config.hidden_size else shape, layers)
            for name, value in labels.items():
                setattr(shape, name, value)
            model = AutoModelForSequenceClassification.from_config(shape, dtype=torch.float32)
            return model, f"{len(layers)} layers of random weights, {shape.hidden_size} wide"
        if config.init == "first_k":
            source = load_model(pretrained, new_head=True, **labels)
            layers = _chosen_layers(config, source.config)
            return take_layers(source, layers), f"the first {len(layers)} layers of {pretrained}"
        source = load_model(locate(config.init, "student.init"), "student.init", new_head=True, **labels)
        layers = _chosen_layers(config, source.config)
        return take_layers(source, layers) if config.num_layers else source, f"the folder {config.init}"


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
