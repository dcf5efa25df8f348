"""95% intervals: Wilson's of a share, and the bootstrap of any metric, paired where several models answered the same examples.

A resample of N examples, drawn with replacement, is a weight for each of them: how often it was drawn. Examples with the same
label and the same answers of all models are one *cell* with a common weight, so a resample of thousands of classified examples
costs no more than one of the few cells they fall into.

Shapes: N examples, U cells, C classes (1 for a regression), R resamples, G groups of equal values.
Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 8.3 (pairs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from pkd_dist.data.tasks import Task
from pkd_dist.metric_names import AGREEMENT

RESAMPLES = 2000
_MAX_WEIGHTS, _MIN_RESAMPLES = 3_000_000, 400
"""Limit of resamples times cells, which is a second: many examples of a regression, whose interval is narrow, are resampled less."""
_BLOCK = 1_000_000
"""Weights held in memory at a time."""
Interval = tuple[float, float]


def wilson_interval(share: float, n: int, z: float = 1.959964) -> Interval:
    """Return Wilson's score interval (95% by default) of a proportion of n examples."""
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return center - half, center + half


def percentile_interval(scores_R: np.ndarray) -> Interval:
    """Return the middle 95% of the scores of resamples."""
    low, high = np.percentile(scores_R, (2.5, 97.5))
    return float(low), float(high)


def resampled_scores(labels_N: np.ndarray, logits: Mapping[str, np.ndarray], task: Task) -> dict[str, np.ndarray]:
    """Return the main metric of each model on the same resamples, (R,) float64 each.

    Args:
        labels_N: Class indices, the values of a regression, or (N, C) of 0 and 1 for multi-label.
        logits: Model -> (N, C); the predicted value for a regression.
    """
    cells, counts_U = _cells(labels_N, logits, task)
    count, shares_U = len(labels_N), counts_U / len(labels_N)
    resamples = int(np.clip(_MAX_WEIGHTS // len(counts_U), _MIN_RESAMPLES, RESAMPLES))
    rng, at_a_time = np.random.default_rng(0), max(1, _BLOCK // len(counts_U))
    found: dict[str, list[np.ndarray]] = {name: [] for name in logits}
    classes = next(iter(logits.values())).shape[1]
    for start in range(0, resamples, at_a_time):
        weights_RU = rng.multinomial(count, shares_U, size=min(at_a_time, resamples - start))
        for name, answers_U in zip(logits, cells[1:], strict=True):
            found[name].append(weighted_scores(weights_RU, cells[0], answers_U, task, classes))
    return {name: np.concatenate(scores) for name, scores in found.items()}


def _cells(labels_N: np.ndarray, logits: Mapping[str, np.ndarray], task: Task) -> tuple[list[np.ndarray], np.ndarray]:
    """Return (labels, answers of each model) of each cell, and the number of examples in it."""
    if task.multilabel:
        return [labels_N.astype(bool), *logits.values()], np.ones(len(labels_N))
    if task.regression:
        values = [labels_N.astype(np.float64), *(logits_NC[:, 0].astype(np.float64) for logits_NC in logits.values())]
        return values, np.ones(len(labels_N))
    answers = [labels_N.astype(np.int64), *(logits_NC.argmax(axis=1) for logits_NC in logits.values())]
    cells, counts_U = np.unique(np.stack(answers), axis=1, return_counts=True)
    return list(cells), counts_U.astype(np.float64)


def weighted_scores(
    weights_RU: np.ndarray, labels_U: np.ndarray, answers_U: np.ndarray, task: Task, classes: int
) -> np.ndarray:
    """Return the main metric of one model on resamples, (R,) float64; 0 where a resample does not define it.

    Args:
        weights_RU: How often each cell was drawn.
        answers_U: Predicted classes, the values of a regression, or (U, C) logits for multi-label.
    """
    weights_RU = weights_RU.astype(np.float64)
    if task.multilabel:
        return _of_sets(weights_RU, labels_U, answers_U, task.main_metric)
    if task.regression:
        ranks = _ranks(weights_RU, labels_U), _ranks(weights_RU, answers_U)
        return (_correlations(weights_RU, labels_U, answers_U) + _correlations(weights_RU, *ranks)) / 2
    right_U = labels_U == answers_U
    hits_RC = _by_class(weights_RU * right_U, labels_U, classes)
    predicted_RC, true_RC = (_by_class(weights_RU, of_U, classes) for of_U in (answers_U, labels_U))
    return _METRICS[task.main_metric](hits_RC, predicted_RC, true_RC, task)


def _of_sets(weights_RN: np.ndarray, true_NC: np.ndarray, logits_NC: np.ndarray, metric: str) -> np.ndarray:
    """Return a metric of `MULTILABEL_METRICS` on resamples, (R,) float64; see `metrics.score`."""
    if metric == "mAP":
        classes = zip(true_NC.T, logits_NC.T, strict=True)
        return np.mean([_average_precisions(weights_RN, *of_class) for of_class in classes], axis=0)
    given_NC = logits_NC > 0
    hits_NC, both_NC = (true_NC & given_NC).astype(np.float64), true_NC.astype(np.float64) + given_NC
    if metric == "f1_micro":
        return _share(weights_RN @ (2 * hits_NC.sum(axis=1)), weights_RN @ both_NC.sum(axis=1))
    if metric == "f1_macro":
        return _share(2 * (weights_RN @ hits_NC), weights_RN @ both_NC).mean(axis=1)
    if metric == "f1_samples":
        both_N = both_NC.sum(axis=1)
        value_N = np.where(both_N > 0, _share(2 * hits_NC.sum(axis=1), both_N), 1.0)
    else:
        value_N = (true_NC == given_NC).all(axis=1).astype(np.float64)
    return np.asarray(weights_RN @ value_N / weights_RN.sum(axis=1))


def _average_precisions(weights_RN: np.ndarray, true_N: np.ndarray, logit_N: np.ndarray) -> np.ndarray:
    """Return the average precision of one class on resamples, (R,); equal logits are one threshold, as in scikit-learn."""
    order_N = np.argsort(-logit_N, kind="stable")
    last_G = np.flatnonzero(np.diff(logit_N[order_N], append=np.nan))
    found_RG = np.cumsum(weights_RN[:, order_N] * true_N[order_N], axis=1)[:, last_G]
    given_RG = np.cumsum(weights_RN[:, order_N], axis=1)[:, last_G]
    gained_RG = np.diff(found_RG, axis=1, prepend=0)
    return _share((gained_RG * _share(found_RG, given_RG)).sum(axis=1), found_RG[:, -1])


def _by_class(weights_RU: np.ndarray, classes_U: np.ndarray, classes: int) -> np.ndarray:
    """Return the (R, C) sums of the weights of the cells of each class."""
    from scipy.sparse import csr_array  # slow to import, so only where a run ends

    cells = np.arange(len(classes_U))
    members_CU = csr_array((np.ones(len(cells)), (classes_U, cells)), shape=(classes, len(cells)))
    sums_CR: np.ndarray = members_CU @ weights_RU.T
    return sums_CR.T


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.shape(part)), where=whole > 0)


def _accuracy(hits_RC: np.ndarray, predicted_RC: np.ndarray, true_RC: np.ndarray, task: Task) -> np.ndarray:
    return np.asarray(hits_RC.sum(axis=1) / true_RC.sum(axis=1))


def _f1(hits_RC: np.ndarray, predicted_RC: np.ndarray, true_RC: np.ndarray, task: Task) -> np.ndarray:
    """Return F1 of the positive of two classes, or the mean over the classes that labels or answers have."""
    both_RC = predicted_RC + true_RC
    f1_RC = _share(2 * hits_RC, both_RC)
    return f1_RC[:, task.positive] if f1_RC.shape[1] == 2 else f1_RC.sum(axis=1) / (both_RC > 0).sum(axis=1)


def _mcc(hits_RC: np.ndarray, predicted_RC: np.ndarray, true_RC: np.ndarray, task: Task) -> np.ndarray:
    count_R, right_R = true_RC.sum(axis=1), hits_RC.sum(axis=1)
    covariance_R = right_R * count_R - (predicted_RC * true_RC).sum(axis=1)
    spreads = [count_R**2 - (of_RC**2).sum(axis=1) for of_RC in (predicted_RC, true_RC)]
    return _share(covariance_R, np.sqrt(spreads[0] * spreads[1]))


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, Task], np.ndarray]] = {
    "accuracy": _accuracy, AGREEMENT: _accuracy, "f_1": _f1, "MCC": _mcc,
}  # fmt: skip
"""Metric -> its values from the (R, C) counts of correct, predicted and true examples."""


def _ranks(weights_RN: np.ndarray, values_N: np.ndarray) -> np.ndarray:
    """Return the (R, N) rank of each value within each resample, the mean rank where values are equal."""
    _, group_N = np.unique(values_N, return_inverse=True)
    order_N = np.argsort(group_N, kind="stable")
    first_G = np.flatnonzero(np.diff(group_N[order_N], prepend=-1))
    drawn_RG = np.add.reduceat(weights_RN[:, order_N], first_G, axis=1)
    ranks_RG = np.cumsum(drawn_RG, axis=1) - (drawn_RG - 1) / 2
    return np.asarray(ranks_RG[:, group_N])


def _correlations(weights_RN: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation in each resample, of (N,) or (R, N) values."""
    count_R1 = weights_RN.sum(axis=1, keepdims=True)
    x_RN, y_RN = (v - (weights_RN * v).sum(axis=1, keepdims=True) / count_R1 for v in (x, y))
    covariance_R = (weights_RN * x_RN * y_RN).sum(axis=1)
    spread_R = np.sqrt((weights_RN * x_RN**2).sum(axis=1) * (weights_RN * y_RN**2).sum(axis=1))
    return _share(covariance_R, spread_R)
