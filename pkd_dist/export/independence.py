"""How much the answer to a text depends on the other texts of its batch and on padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from pkd_dist.data.batches import collate
from pkd_dist.data.tokens import TokenSet
from pkd_dist.evaluation.probabilities import sigmoid, softmax
from pkd_dist.evaluation.scoring import Inputs
from pkd_dist.export.manifest import BatchEffect

EXAMPLES = 256
"""Examples of dev that are run alone, evenly spaced; all where dev has fewer."""
BATCH = 64
TOLERANCE, RARE = 1e-3, 2e-2
"""Difference of a probability, or share of the range of predicted values, allowed between alone and in a batch: of every example; in
lower precision on average, and of no example more than `RARE`. There, a value between two steps is rounded up or down by its last bit,
which the shape of a batch may change, and such an answer moves by as much as rounding moves it at all."""


def measure(
    forward: Callable[[Inputs], torch.Tensor | np.ndarray],
    dev: TokenSet,
    pad_id: int,
    examples: int = EXAMPLES,
) -> BatchEffect:
    """Run examples of dev alone and in batches.

    Args:
        forward: A tokenizer's outputs -> logits_BC on the CPU.
    """
    rows_N = np.unique(np.linspace(0, len(dev) - 1, min(examples, len(dev))).astype(np.int64))
    rows_N = np.random.default_rng(0).permutation(rows_N)
    alone, together = [], []
    for start in range(0, len(rows_N), BATCH):
        rows_B = rows_N[start : start + BATCH]
        inputs = collate(dev, rows_B, np.ones(len(rows_B)), pad_id).inputs
        together.append(np.asarray(forward(inputs), np.float32))
        for i, length in enumerate(dev.lengths_N[rows_B]):
            alone.append(np.asarray(forward({k: v[i : i + 1, ..., :length] for k, v in inputs.items()}), np.float32))
    return compare(np.concatenate(alone), np.concatenate(together), multilabel=dev.labels_N.ndim == 2)


def holds(effect: Mapping[str, float], exact: bool) -> bool:
    """Return whether a file answers a text alone as it does in a batch.

    Args:
        exact: The file computes in float32.
    """
    if exact:
        return effect["batch_effect"] <= TOLERANCE
    return effect["batch_effect_mean"] <= TOLERANCE and effect["batch_effect"] <= RARE


def compare(alone_NC: np.ndarray, together_NC: np.ndarray, multilabel: bool = False) -> BatchEffect:
    """Return the effect of batches on logits."""
    if multilabel:
        scores = [sigmoid(logits_NC) for logits_NC in (alone_NC, together_NC)]
        changed_N = ((alone_NC > 0) != (together_NC > 0)).any(axis=1)
    elif alone_NC.shape[1] == 1:
        scores = [logits_NC / (float(np.ptp(alone_NC)) or 1.0) for logits_NC in (alone_NC, together_NC)]
        changed_N = np.zeros(len(alone_NC), bool)
    else:
        scores = [softmax(logits_NC) for logits_NC in (alone_NC, together_NC)]
        changed_N = alone_NC.argmax(1) != together_NC.argmax(1)
    moved_N = np.abs(scores[0] - scores[1]).max(axis=1)
    return {
        "batch_effect": float(moved_N.max()),
        "batch_effect_mean": float(moved_N.mean()),
        "batch_changed_labels": int(changed_N.sum()),
    }
