"""The last layer of a classifier: what turns its last states into logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from pkd_dist.errors import UserError


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


@torch.no_grad()
def shift_logits(model: PreTrainedModel, shift_C: np.ndarray) -> PreTrainedModel:
    """Subtract a number from each logit of a classifier, in place, in the biases of its last layer.

    Raises:
        UserError: The logits are not the output of that layer alone, or it has no biases.
    """
    head, probe, shift = output_layer(model), model.dummy_inputs, torch.from_numpy(shift_C)
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
    head, probe = output_layer(model), model.dummy_inputs
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
