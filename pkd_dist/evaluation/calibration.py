"""Temperature scaling: the number that the student's logits are divided by, and how far its probabilities can be trusted.

logits and labels of dev -> `fit_temperature` -> results_eval.json -> the last layer of the exported student

Needs no PyTorch. Shapes: N examples, C classes, B bins.
Source: Guo et al., On Calibration of Modern Neural Networks (2017).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from typing_extensions import NotRequired, TypedDict

from pkd_dist.evaluation.probabilities import log_softmax

BINS = 15
"""Of equal width, for the expected calibration error."""
LOWEST, HIGHEST = 0.05, 20.0
"""Temperatures that are looked at; a best one beyond them says that dev cannot determine it."""
FITTED_ON = "dev"


class Bin(TypedDict):
    """The examples whose confidence (largest probability) is in a bin: their number, mean confidence and accuracy."""

    n: int
    confidence: float
    accuracy: float


class Reliability(TypedDict):
    """How far probabilities can be trusted.

    `ece` is the expected calibration error over `BINS` bins of equal width, `ece_by_chance` what it is on average where the
    probabilities are exactly right: few examples alone make an error. `nll` is the mean negative log-likelihood of the labels
    in nats, `bins` are those that are not empty, in ascending order.
    """

    ece: float
    ece_by_chance: float
    nll: float
    bins: list[Bin]


class SplitCalibration(TypedDict):
    """The student on a labeled split of `n` examples, without and with the temperature."""

    n: int
    before: Reliability
    after: Reliability


class Calibration(TypedDict):
    """The student's temperature; `unfitted` says why it is 1 where dev determines none.

    `splits` has all labeled ones. The temperature was fitted on dev, so only the others tell what it is worth.
    """

    temperature: float
    unfitted: NotRequired[str]
    splits: dict[str, SplitCalibration]


def fit_temperature(logits_NC: np.ndarray, labels_N: np.ndarray) -> float | None:
    """Return the temperature T that minimizes the negative log-likelihood of softmax(logits / T).

    The likelihood is convex in 1 / T, so the root of its slope is the only minimum.

    Returns:
        None where the minimum is not between `LOWEST` and `HIGHEST`: no example is answered wrongly, so that smaller is
        always better, or the logits say nothing of the labels.
    """
    from scipy.optimize import brentq  # slow to import, so only on the rank that scores

    logits_NC = logits_NC.astype(np.float64)
    true_N = logits_NC[np.arange(len(labels_N)), labels_N]

    def slope(log_temperature: float) -> float:
        expected_N = (np.exp(log_softmax(logits_NC / math.exp(log_temperature))) * logits_NC).sum(axis=1)
        return float((expected_N - true_N).mean())

    low, high = math.log(LOWEST), math.log(HIGHEST)
    if not slope(low) > 0 > slope(high):
        return None
    return math.exp(brentq(slope, low, high, xtol=1e-12))


def reliability(logits_NC: np.ndarray, labels_N: np.ndarray) -> Reliability:
    """Return how far the probabilities of a model can be trusted.

    Bins are (0, 1/15], (1/15, 2/15], ..., (14/15, 1].
    """
    logs_NC = log_softmax(logits_NC)
    confidence_N = np.exp(logs_NC.max(axis=1))
    correct_N = logits_NC.argmax(axis=1) == labels_N
    bin_N = np.clip(np.ceil(confidence_N * BINS).astype(int) - 1, 0, BINS - 1)
    bins: list[Bin] = [
        {
            "n": int((bin_N == i).sum()),
            "confidence": float(confidence_N[bin_N == i].mean()),
            "accuracy": float(correct_N[bin_N == i].mean()),
        }
        for i in np.unique(bin_N)
    ]
    spread_B = np.sqrt(
        np.bincount(bin_N, confidence_N * (1 - confidence_N))
    )  # of the right answers in each bin, if all is well
    return {
        "ece": sum(each["n"] * abs(each["accuracy"] - each["confidence"]) for each in bins) / len(labels_N),
        "ece_by_chance": math.sqrt(2 / math.pi) * float(spread_B.sum()) / len(labels_N),
        "nll": -float(logs_NC[np.arange(len(labels_N)), labels_N].mean()),
        "bins": bins,
    }


def divided(logits_NC: np.ndarray, temperature: float) -> np.ndarray:
    """Return logits divided by a temperature, float32."""
    return (logits_NC.astype(np.float64) / temperature).astype(np.float32)


def calibrate(logits: Mapping[str, np.ndarray], labels: Mapping[str, np.ndarray]) -> Calibration:
    """Fit a temperature on dev, and judge it on every labeled split.

    Args:
        logits, labels: Split -> (N, C) and (N,) class indices.
    """
    fitted = fit_temperature(logits[FITTED_ON], labels[FITTED_ON])
    temperature = 1.0 if fitted is None else fitted
    found: Calibration = {
        "temperature": temperature,
        "splits": {
            split: {
                "n": len(labels_N),
                "before": reliability(logits[split], labels_N),
                "after": reliability(divided(logits[split], temperature), labels_N),
            }
            for split, labels_N in labels.items()
        },
    }
    if fitted is None:
        found["unfitted"] = (
            f"no temperature between {LOWEST:g} and {HIGHEST:g} makes the labels of {FITTED_ON} most likely: the student answers "
            "all of its examples correctly, or no better than by chance"
        )
    return found


def ece_sentence(found: Calibration) -> str:
    """Say what the temperature changes of the expected calibration error, on every split."""
    shown = ", ".join(
        f"{each['before']['ece']:.3f} to {each['after']['ece']:.3f} on {split} ({each['n']:,} examples"
        f"{', on which it was fitted' if split == FITTED_ON else ''})"
        for split, each in found["splits"].items()
    )
    return f"temperature {found['temperature']:.4g}; expected calibration error, before to after: {shown}"
