"""Several teachers as one: what they must have in common, and their mean answer.

Shapes: M teachers, B examples, C classes (1 for a regression).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from pkd_dist.errors import UserError


def mean_logits(logits: Sequence[torch.Tensor], multilabel: bool = False) -> torch.Tensor:
    """Return the logits whose softmax is the mean of the teachers' probabilities, or a regression's mean, float64 (B, C).

    Args:
        logits: of each teacher, (B, C).
        multilabel: each class has a probability of its own, the sigmoid of its logit.
    """
    logits_MBC = torch.stack([each.double() for each in logits])
    if multilabel:
        return F.logsigmoid(logits_MBC).logsumexp(0) - F.logsigmoid(-logits_MBC).logsumexp(0)
    if logits_MBC.shape[-1] == 1:
        return logits_MBC.mean(0)
    return logits_MBC.log_softmax(-1).logsumexp(0) - math.log(len(logits))


def require_same_tokenizer(
    first: tuple[str, PreTrainedTokenizerBase], other: tuple[str, PreTrainedTokenizerBase], key: str
) -> None:
    """Raise UserError if two models do not tokenize alike.

    Args:
        first, other: each the model as the user named it, and its tokenizer.
        key: the setting that names them.
    """
    if _behavior(first[1]) != _behavior(other[1]):
        raise UserError(
            f"{other[0]} has another tokenizer than {first[0]}; several teachers must share one; leave {other[0]} out",
            key,
        )


def _behavior(tokenizer: PreTrainedTokenizerBase) -> object:
    """Return all that decides the tokens of a text, without how it was last padded and truncated."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())
    return {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")}
