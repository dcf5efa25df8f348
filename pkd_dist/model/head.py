"""The last layer of a classifier: what turns its last states into logits."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from pkd_dist.errors import UserError

MULTIPLE_CHOICE = "ForMultipleChoice"
"""The end of an architecture's name, in a model's configuration, of models that score the options of an example. The logits of
such a model are (B, C) for inputs (B, C, L): its last layer has one output, the score of an option."""
SEQUENCE_CLASSIFICATION = "ForSequenceClassification"
"""The same of classifiers and regressions of a text or a pair of texts."""


def is_multiple_choice(config: PretrainedConfig) -> bool:
    """Return whether a model of this configuration scores options."""
    return any(name.endswith(MULTIPLE_CHOICE) for name in config.architectures or [])


def model_class(config: PretrainedConfig) -> type[AutoModelForMultipleChoice | AutoModelForSequenceClassification]:
    """Return the class of transformers whose `from_pretrained` and `from_config` make a model with the head that it needs."""
    return AutoModelForMultipleChoice if is_multiple_choice(config) else AutoModelForSequenceClassification


def new_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model of a configuration with random weights, in float32."""
    made: PreTrainedModel = model_class(config).from_config(config, dtype=torch.float32, trust_remote_code=False)
    return made


def has_classifier(config: PretrainedConfig) -> bool:
    """Return whether a folder's configuration is that of a fine-tuned classifier or regression."""
    return any(name.endswith(SEQUENCE_CLASSIFICATION) for name in config.architectures or [])


def output_layer(model: PreTrainedModel) -> nn.Linear | None:
    """Return the last linear layer after the encoder that has an output for each label; None if there is none."""
    base = model.base_model_prefix + "."
    heads = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.out_features == model.config.num_labels
        and not name.startswith(base)
    ]
    return heads[-1] if heads else None


def _probe(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return inputs on which logits before and after a change are compared."""
    inputs: dict[str, torch.Tensor] = model.dummy_inputs
    if not is_multiple_choice(model.config):
        return inputs
    ids_1OL = inputs["input_ids"][None]
    return {"input_ids": ids_1OL, "attention_mask": torch.ones_like(ids_1OL)}


@torch.no_grad()
def shift_logits(model: PreTrainedModel, shift_C: np.ndarray) -> PreTrainedModel:
    """Subtract a number from each logit of a classifier, in place, in the biases of its last layer.

    Raises:
        UserError: The logits are not the output of that layer alone, or it has no biases.
    """
    head, probe, shift = output_layer(model), _probe(model), torch.from_numpy(shift_C)
    before_BC = model(**probe).logits.double()
    if head is not None and head.bias is not None:
        head.bias.copy_((head.bias.double() - shift).to(head.bias.dtype))
    if not torch.allclose(model(**probe).logits.double(), before_BC - shift, rtol=1e-4, atol=1e-4):
        raise UserError(
            f"{type(model).__name__} cannot hold the thresholds of its classes: its logits are not those of one linear layer with "
            "biases"
        )
    return model


@torch.no_grad()
def divide_logits(model: PreTrainedModel, temperature: float) -> PreTrainedModel:
    """Divide the logits of a classifier by a temperature, in place, in the weights of its last layer.

    Raises:
        UserError: The logits are not the output of that layer alone.
    """
    head, probe = output_layer(model), _probe(model)
    before_BC = model(**probe).logits.double()
    if head is not None:
        for parameter in head.parameters():
            parameter.copy_((parameter.double() / temperature).to(parameter.dtype))
    if not torch.allclose(model(**probe).logits.double(), before_BC / temperature, rtol=1e-4, atol=1e-5 / temperature):
        raise UserError(
            f"{type(model).__name__} cannot be calibrated: its logits are not those of one linear layer; set it to false",
            "evaluate.calibrate",
        )
    return model


@torch.no_grad()
def reorder_outputs(model: PreTrainedModel, own: Sequence[str], names: Sequence[str]) -> str | None:
    """Put the outputs of a classifier into the order of class names, in place, if it has the same names in another order.

    Args:
        own: Names of its outputs, in their order.
        names: As they should be.

    Returns:
        What people should know: the outputs were reordered, or have other names and are taken by position; None: nothing.

    Raises:
        UserError: The logits are not the output of the last linear layer alone.
    """
    if list(own) == list(names) or len(own) != len(names):
        return None
    if sorted(own) != sorted(names):
        unnamed = all(re.fullmatch(r"LABEL_\d+", name) for name in own)
        return None if unnamed else f"its outputs {', '.join(own)} are taken to be {', '.join(names)}, in this order"
    order = [own.index(name) for name in names]
    head, probe = output_layer(model), _probe(model)
    before_BC = model(**probe).logits
    if head is not None:
        for parameter in head.parameters():
            parameter.copy_(parameter[order])
    if not torch.allclose(model(**probe).logits, before_BC[:, order], rtol=1e-4, atol=1e-5):
        raise UserError(
            f"the classes of its classifier are {', '.join(own)}, not {', '.join(names)}, and {type(model).__name__} has no last "
            "layer that could be reordered; give a folder without a classifier", "student.init",
        )  # fmt: skip
    return f"its outputs {', '.join(own)} were put into the order {', '.join(names)}"
