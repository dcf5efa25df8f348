"""Move the scale of a regression's targets into and out of a model's last layer.

Models are trained on standardized targets; every folder that a user gives or gets predicts in the user's unit. While a model
predicts standardized targets, its configuration says so (`target_scale`), and that field is saved with it.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from pkd_dist.data.target_scale import TargetScale
from pkd_dist.errors import UserError
from pkd_dist.model.head import has_classifier, output_layer

_FIELD = "target_scale"


def has_trained_head(config: PretrainedConfig) -> bool:
    """Return whether a folder's configuration is that of a fine-tuned regression."""
    return has_classifier(config) and len(config.id2label or {}) == 1


@torch.no_grad()
def standardize(model: PreTrainedModel, scale: TargetScale | None, trained_head: bool = True) -> PreTrainedModel:
    """Make a regression predict standardized targets, in place; None changes nothing.

    Args:
        trained_head: The head predicts in the user's unit. A new head is only marked: it will learn standardized targets.

    Raises:
        UserError: The model's head is not one linear layer with a bias.
    """
    if scale is None:
        return model
    head, bias = _head(model)
    if trained_head:
        bias.copy_(((bias.double() - scale.mean) / scale.std).to(bias.dtype))
        head.weight.copy_((head.weight.double() / scale.std).to(head.weight.dtype))
    setattr(model.config, _FIELD, [scale.mean, scale.std])
    return model


@torch.no_grad()
def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Make a regression predict in the user's unit, in place, if it predicts standardized targets."""
    found = getattr(model.config, _FIELD, None)
    if found is None:
        return model
    scale = TargetScale(*found)
    head, bias = _head(model)
    bias.copy_((bias.double() * scale.std + scale.mean).to(bias.dtype))
    head.weight.copy_((head.weight.double() * scale.std).to(head.weight.dtype))
    delattr(model.config, _FIELD)
    return model


def _head(model: PreTrainedModel) -> tuple[nn.Linear, nn.Parameter]:
    head = output_layer(model)
    if head is None or head.bias is None:
        raise UserError(
            f"{type(model).__name__}: its regression head is not one linear layer with a bias; use a model of another family"
        )
    return head, head.bias
