"""Create a student: from layers of the teacher, the first layers of a pretrained model, random weights, or a folder.

planned_depth (checks, before anything is written) -> create -> a Hugging Face folder -> open_student (to train)
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pkd_dist.config.schema import Student as StudentConfig
from pkd_dist.data.class_mapping import output_names
from pkd_dist.data.target_scale import TargetScale
from pkd_dist.errors import UserError
from pkd_dist.model.compatibility import require_compatible, require_length, token_difference
from pkd_dist.model.encoder import (
    Encoder,
    load_config,
    load_model,
    load_tokenizer,
    locate,
    name_of,
    planned_model,
)
from pkd_dist.model.families import encoder_layers, num_layers, shares_layers
from pkd_dist.model.head import has_classifier, new_model, reorder_outputs
from pkd_dist.model.layers import copied_layers
from pkd_dist.model.narrowing import can_narrow, narrow
from pkd_dist.model.regression_head import has_trained_head, standardize
from pkd_dist.model.vocabulary import has_plain_vocabulary

INIT_METHODS = ("teacher_layers", "first_k", "random")
"""Values of `student.init` that are not a folder."""


def tokenizer_of(config: StudentConfig, teacher: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer that the student reads with: the teacher's, unless `student.init` is a folder with other tokens."""
    if config.init in INIT_METHODS:
        return teacher
    own = load_tokenizer(_located(config), "student.init")
    return own if token_difference(teacher, own) else teacher


def planned_depth(
    config: StudentConfig,
    teacher: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    multiple_choice: bool = False,
) -> int:
    """Return the number of layers that the student will have.

    Args:
        config: The `student` section of the run.
        teacher: Configuration of the teacher's model.
        tokenizer: The student's.
        max_length: Of the student's inputs, in tokens.
        multiple_choice: The student is to score the options of an example.

    Raises:
        UserError: The student cannot be created, as far as this can be checked in advance.
    """
    if config.init in INIT_METHODS:
        resized = next((key for key in ("hidden_size", "intermediate_size") if getattr(config, key)), None)
        if resized and config.init != "random" and not can_narrow(teacher):
            raise UserError(
                f"is not possible: only layers of BERT, RoBERTa, ELECTRA and DistilBERT can be narrowed, not of a "
                f"{teacher.model_type}; use student.init=random",
                f"student.{resized}",
            )
        require_length(_with_widths(teacher, config), max_length, "the student", "student.max_length")
        return len(_selected_layers(config, teacher))
    own = load_config(_located(config), "student.init")
    require_compatible(own, tokenizer, max_length, config.init, "student.init", "student.max_length", multiple_choice)
    return len(_selected_layers(config, own))


def _located(config: StudentConfig) -> str:
    """Return the folder or hub name of a `student.init` that is no method."""
    near = difflib.get_close_matches(config.init, INIT_METHODS, n=1)
    if near and not Path(config.init).exists():
        raise UserError(
            f"student.init: {config.init!r} is neither a folder nor one of {', '.join(INIT_METHODS)}; "
            f"did you mean {near[0]}?"
        )
    return locate(config.init, "student.init")


def planned_config(config: StudentConfig, teacher: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of the student's model, as `create` will make it."""
    shape = teacher if config.init in INIT_METHODS else load_config(locate(config.init, "student.init"), "student.init")
    return _with_layers(_with_widths(shape, config), _selected_layers(config, shape))


def require_plain_vocabulary(config: StudentConfig, teacher: PretrainedConfig) -> None:
    """Check that the student's word embedding can be cut to some of its rows.

    Raises:
        UserError: It cannot.
    """
    if not has_plain_vocabulary(planned_model(planned_config(config, teacher))):
        raise UserError(
            f"used is not possible: the word embedding of a {teacher.model_type} is not a table of its own; use all",
            "student.vocabulary",
        )


def copied_teacher_layers(config: StudentConfig, teacher: PretrainedConfig) -> tuple[int, ...] | None:
    """Return the teacher layers (from 0) that the student starts from; None if it starts otherwise."""
    return _selected_layers(config, teacher) if config.init == "teacher_layers" else None


def _selected_layers(config: StudentConfig, source: PretrainedConfig) -> tuple[int, ...]:
    """Return the layers (from 0) of a model of configuration `source` that the student gets; for `random`, their kinds."""
    total = num_layers(source)
    if config.init == "teacher_layers":
        chosen = copied_layers(config.layers, total, config.num_layers, source.model_type == "modernbert")
    else:
        count = config.num_layers or (max(1, total // 2) if config.init in INIT_METHODS else total)
        if count > total and config.init != "random":
            whose = (
                f"the {total} layers of {config.init}"
                if config.init not in INIT_METHODS
                else f"the teacher's {total} layers"
            )
            raise UserError(f"student.num_layers: {count} is more than {whose}")
        chosen = tuple(range(count))
    groups = getattr(source, "num_hidden_groups", None) or 1
    if groups > 1 and len(chosen) < total:
        raise UserError(
            f"student.init: {config.init}: {total} layers share {groups} groups of weights by position, so fewer "
            "layers would use other weights; use a teacher with one group, or a folder with all its layers"
        )
    return chosen


def _with_layers(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """Return a model configuration with these layers alone (from 0); beyond its last layer, layer kinds repeat."""
    config = copy.deepcopy(config)
    for name in ("layer_types", "attention_window"):  # of ModernBERT and Longformer, one for each layer
        values = getattr(config, name, None)
        if isinstance(values, list):
            setattr(config, name, [values[i % len(values)] for i in layers])
    config.num_hidden_layers = len(layers)
    return config


def _with_widths(config: PretrainedConfig, student: StudentConfig) -> PretrainedConfig:
    """Return a model configuration with the student's own sizes, or as it is if there are none.

    The size of a head stays. With another hidden size, all else is in proportion.

    Raises:
        UserError: A size would not be an integer, or `teacher_layers` and `first_k` would have to grow.
    """
    if student.hidden_size is None and student.intermediate_size is None:
        return config
    config = copy.deepcopy(config)
    hidden = student.hidden_size or int(config.hidden_size)
    before, head = int(config.hidden_size), int(config.hidden_size) // int(config.num_attention_heads)
    inner = "hidden_dim" if hasattr(config, "hidden_dim") else "intermediate_size"  # hidden_dim: DistilBERT
    inner_before = int(getattr(config, inner))
    scaled = inner_before * hidden
    if hidden % head or (scaled % before and student.intermediate_size is None):
        raise UserError(
            f"student.hidden_size: {hidden} is not possible: the teacher has a head size of {head}, and a feed-forward size "
            f"of {inner_before} at hidden size {before}; use a multiple of {head} that scales both to integers"
        )
    wanted = student.intermediate_size or scaled // before
    for key, value, limit in (("hidden_size", hidden, before), ("intermediate_size", wanted, inner_before)):
        if student.init != "random" and value > limit:
            raise UserError(f"{value} is more than the teacher's {limit}, from which it is taken", f"student.{key}")
    if student.init != "random" and getattr(config, "embedding_size", before) == hidden != before:
        raise UserError(
            f"{hidden} is the size of the teacher's embeddings, whose projection the student would lack; use another size",
            "student.hidden_size",
        )
    for name in ("embedding_size", "pooler_hidden_size"):  # unless they differ from the hidden size
        if getattr(config, name, None) == before:
            setattr(config, name, hidden)
    config.hidden_size, config.num_attention_heads = hidden, hidden // head
    setattr(config, inner, wanted)
    return config


def take_layers(source: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """Return a model with these encoder layers of `source` (from 0) and all its other weights.

    If the layers share one set of weights (ALBERT), only their number matters.

    Raises:
        UserError: The encoder layers are not one list, or other weights depend on their number.
    """
    weights = source.state_dict()
    if not shares_layers(source.config):
        prefix, found = encoder_layers(source)
        if found is None:
            raise UserError(
                f"{type(source).__name__} has no list of encoder layers to copy from; use student.init=random or a folder"
            )
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.(.*)")
        for name in list(weights):
            match = pattern.fullmatch(name)
            if match is not None:
                value = weights.pop(name)
                if int(match[1]) in layers:
                    weights[f"{prefix}.{layers.index(int(match[1]))}.{match[2]}"] = value
    model = new_model(_with_layers(source.config, layers))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{type(source).__name__} has weights that depend on the number of layers ({why}); use student.init=random or "
            "a folder"
        ) from None
    return model


def create(
    config: StudentConfig,
    teacher: str,
    pretrained: str,
    labels: Mapping[str, Any],
    seed: int,
    scale: TargetScale | None = None,
) -> tuple[PreTrainedModel, str]:
    """Create the student's initial weights.

    Args:
        config: The `student` section of the run.
        teacher: Folder of the fine-tuned teacher.
        pretrained: Folder or hub name of the teacher before fine-tuning, for `first_k`.
        labels: Fields of a model configuration that describe the classes (`num_labels`, `id2label`, ...).
        seed: For random weights.
        scale: Of a regression's targets: the student predicts standardized ones. None: it predicts them as they are.

    Returns:
        The model, and a line for people that says what it was made of.

    Raises:
        UserError: A layer is out of range, or a folder cannot be used.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if config.init == "teacher_layers":
            layers = _selected_layers(config, load_config(teacher))
            model, widths = _narrowed(take_layers(load_model(teacher), layers), config)
            _set_fields(model.config, labels)  # a given teacher may lack the names
            return standardize(model, scale), f"teacher layers {list(layers)} (from 0){widths}"
        if config.init == "random":
            shape = load_config(teacher)
            layers = _selected_layers(config, shape)
            shape = _with_layers(_with_widths(shape, config), layers)
            _set_fields(shape, labels)
            model = new_model(shape)
            made_of = f"{len(layers)} layers of random weights, {shape.hidden_size} wide"
            return standardize(model, scale, trained_head=False), made_of
        if config.init == "first_k":
            trained = has_trained_head(load_config(pretrained))
            source = standardize(load_model(pretrained, new_head=True, **labels), scale, trained)
            layers = _selected_layers(config, source.config)
            model, widths = _narrowed(take_layers(source, layers), config)
            return model, f"the first {len(layers)} layers of {name_of(pretrained)}{widths}"
        folder = locate(config.init, "student.init")
        own = load_config(folder, "student.init")
        trained, classifies = has_trained_head(own), has_classifier(own)
        source = load_model(folder, "student.init", new_head=True, **labels)
        made_of = f"the folder {name_of(config.init)}"
        if classifies and own.num_labels != source.config.num_labels:
            made_of += f", with a new classifier (the folder's has {own.num_labels} outputs)"
        elif classifies and "id2label" in labels:
            note = reorder_outputs(source, output_names(own), list(labels["id2label"].values()))
            made_of += f"; {note}" if note else ""
        source = standardize(source, scale, trained)
        layers = _selected_layers(config, source.config)
        return take_layers(source, layers) if config.num_layers else source, made_of


def _narrowed(model: PreTrainedModel, config: StudentConfig) -> tuple[PreTrainedModel, str]:
    """Return the model with the student's sizes, and what people should know of them."""
    narrower = _with_widths(model.config, config)
    if narrower is model.config:
        return model, ""
    inner = getattr(narrower, "hidden_dim", None) or narrower.intermediate_size  # hidden_dim: DistilBERT
    return narrow(model, narrower), f", narrowed to {narrower.hidden_size} (feed-forward {inner})"


def _set_fields(config: PretrainedConfig, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        setattr(config, name, value)


def open_student(
    folder: Path,
    dropout: float | None,
    projection: str,
    teacher_hidden: int,
    seed: int,
    used_V: np.ndarray,
    all_tokens: bool,
) -> Encoder:
    """Open the student for training, with a new projection to the teacher's width if one is needed.

    Args:
        folder: Hugging Face folder.
        dropout: Probability for all dropouts; None keeps the model's own.
        projection: `auto` (if the widths differ), `always`, or `never` (no states are compared).
        teacher_hidden: The teacher's hidden size.
        seed: Of the projection's weights.
        used_V, all_tokens: See `Encoder`.
    """
    model = load_model(str(folder), "student_init", dropout=dropout)
    width = int(model.config.hidden_size)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        needed = projection == "always" or (projection == "auto" and width != teacher_hidden)
        linear = nn.Linear(width, teacher_hidden) if needed else None
    return Encoder(model, linear, used_V, all_tokens)
