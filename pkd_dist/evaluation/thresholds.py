"""Where a text can have several classes: the threshold of each, and how well each class is found.

logits and labels of dev -> `choose` -> results_eval.json -> the biases of the exported student's last layer

A threshold is a probability. It is subtracted from the logits (`shifted`), so that afterwards a text has the classes with logits
above 0, which are those with a score above 0.5. Needs no PyTorch. Shapes: N examples, C classes, G groups of equal logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from typing_extensions import TypedDict

from pkd_dist.data.examples import present
from pkd_dist.evaluation.probabilities import sigmoid

CHOSEN_ON = "dev"
DEFAULT = 0.5
_BELOW = 0.1
"""How far below the lowest logit a threshold is that gives every example the class."""
_EQUAL = 1e-12


class ClassScores(TypedDict):
    """How well a class is found on a split; `support` is the number of examples that have it. The others are by side."""

    name: str
    support: int
    precision: dict[str, float]
    recall: dict[str, float]
    f1: dict[str, float]


class MultiLabel(TypedDict):
    """What is particular to a task where a text can have several classes.

    `thresholds` has side -> class name -> probability, chosen on dev, so only the other splits tell what they are worth. `unfitted`
    names the classes without an example in dev, whose threshold is 0.5. `splits` has the scores of each class on each labeled
    split, `without_class` the number of its examples that have none.
    """

    thresholds: dict[str, dict[str, float]]
    unfitted: list[str]
    splits: dict[str, list[ClassScores]]
    without_class: dict[str, int]


def choose(logits_NC: np.ndarray, labels_NC: np.ndarray) -> np.ndarray:
    """Return the threshold of each class that maximizes its F1 on these examples, float64 (C,), a probability.

    It is half-way between two neighboring logits. Where 0.5 is as good as any, it is 0.5, as for a class without examples; among
    others that are equally good it is the one nearest to 0.5.
    """
    cutoffs_C = [_best_cutoff(*of_class) for of_class in zip(logits_NC.T, labels_NC.T, strict=True)]
    return sigmoid(np.asarray(cutoffs_C))


def _best_cutoff(logit_N: np.ndarray, true_N: np.ndarray) -> float:
    """Return the logit above which F1 of one class is best."""
    order_N = np.argsort(-logit_N, kind="stable")
    logit_N, true_N = logit_N[order_N].astype(np.float64), true_N[order_N] > 0
    last_G = np.flatnonzero(np.diff(logit_N, append=-np.inf))
    f1_G = 2 * np.cumsum(true_N)[last_G] / (last_G + 1 + true_N.sum())
    next_G = np.append(logit_N[last_G[1:]], logit_N[-1] - 2 * _BELOW)
    cutoff_G = (logit_N[last_G] + next_G) / 2
    above = logit_N > 0
    default = 2 * (above & true_N).sum() / max(1, above.sum() + true_N.sum())
    if default >= f1_G.max() - _EQUAL:
        return 0.0
    best_G = cutoff_G[f1_G >= f1_G.max() - _EQUAL]
    return float(best_G[np.abs(best_G).argmin()])


def cutoffs(thresholds_C: np.ndarray) -> np.ndarray:
    """Return the logits of thresholds, float64 (C,)."""
    return np.asarray(np.log(thresholds_C) - np.log1p(-thresholds_C))


def shifted(logits_NC: np.ndarray, thresholds_C: np.ndarray) -> np.ndarray:
    """Return logits that are above 0 for the classes that a text has, float32."""
    return (logits_NC.astype(np.float64) - cutoffs(thresholds_C)).astype(np.float32)


def describe(
    thresholds: Mapping[str, np.ndarray],
    logits: Mapping[str, Mapping[str, np.ndarray]],
    labels: Mapping[str, np.ndarray],
    names: Sequence[str],
) -> MultiLabel:
    """Return thresholds and scores of each class.

    Args:
        thresholds: Side -> (C,).
        logits: Split -> side -> (N, C), shifted by them.
        labels: Labeled split -> (N, C).
        names: Class names in the order of the logits.
    """
    return {
        "thresholds": {side: dict(zip(names, found_C.tolist(), strict=True)) for side, found_C in thresholds.items()},
        "unfitted": [name for name, any_C in zip(names, present(labels[CHOSEN_ON]), strict=True) if not any_C],
        "splits": {split: class_scores(logits[split], labels_NC, names) for split, labels_NC in labels.items()},
        "without_class": {split: int((~labels_NC.any(axis=1)).sum()) for split, labels_NC in labels.items()},
    }


def class_scores(logits: Mapping[str, np.ndarray], labels_NC: np.ndarray, names: Sequence[str]) -> list[ClassScores]:
    """Return the scores of each class on a split; a ratio of nothing counts as 0, as in scikit-learn."""
    from sklearn.metrics import precision_recall_fscore_support  # slow to import, so only on the rank that scores

    true_NC = labels_NC.astype(int)
    found = {
        side: precision_recall_fscore_support(true_NC, (logits_NC > 0).astype(int), average=None, zero_division=0)
        for side, logits_NC in logits.items()
    }
    return [
        {
            "name": name,
            "support": int(true_NC[:, i].sum()),
            "precision": {side: float(scores[0][i]) for side, scores in found.items()},
            "recall": {side: float(scores[1][i]) for side, scores in found.items()},
            "f1": {side: float(scores[2][i]) for side, scores in found.items()},
        }
        for i, name in enumerate(names)
    ]
