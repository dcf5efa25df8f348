"""Logits -> probabilities, in float64. The classes are the last axis. Needs NumPy alone, for serving machines."""

from __future__ import annotations

import numpy as np


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of classes that exclude each other."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the logarithms of `softmax`."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return the probability of each class where a text can have several."""
    with np.errstate(over="ignore"):  # exp is infinite below -709, and the probability 0
        return np.asarray(1 / (1 + np.exp(-logits.astype(np.float64))))
