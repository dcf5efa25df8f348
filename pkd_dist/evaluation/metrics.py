"""Scoring: logits of exactly n examples whatever the ranks and batches, task metrics, size and speed, and teacher
against student."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pkd_dist.data.tasks import Task
from pkd_dist.data.tokens import TokenSet


def score(logits_NC: np.ndarray, labels_N: np.ndarray, task: Task) -> dict[str, float]:
    """The metrics of `results_eval.json`: accuracy, MCC, precision, recall, f_1 (of `task.positive`; macro beyond two
    classes), or pearson and spearman and their mean for a regression; `main_metric` is the one that chooses the best epoch.

    A correlation that is not defined (constant predictions) counts as 0.
    """
    if task.regression:
        from scipy.stats import pearsonr, spearmanr  # slow to import, so only where a rank scores

        predicted = logits_NC[:, 0].astype(np.float64)
        constant = len(predicted) < 2 or np.ptp(predicted) == 0 or np.ptp(labels_N) == 0
        pearson = 0.0 if constant else float(pearsonr(predicted, labels_N).statistic)
        spearman = 0.0 if constant else float(spearmanr(predicted, labels_N).statistic)
        out = {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}
    else:
        from sklearn import metrics as sk

        predicted = logits_NC.argmax(axis=1)
        average: Any = "binary" if logits_NC.shape[1] == 2 else "macro"
        precision, recall, f_1, _ = sk.precision_recall_fscore_support(
            labels_N, predicted, average=average, pos_label=task.positive, zero_division=0
        )
        out = {
            "accuracy": float(sk.accuracy_score(labels_N, predicted)),
            "MCC": float(sk.matthews_corrcoef(labels_N, predicted)),
            "precision": float(precision),
            "recall": float(recall),
            "f_1": float(f_1),
        }
    return out | {"main_metric": out[task.main_metric]}


def scores(logits_NC: np.ndarray, tokens: TokenSet, task: Task) -> dict[str, Any]:
    """`score` of a labelled split, with the 95% interval of an accuracy."""
    out: dict[str, Any] = score(logits_NC, np.asarray(tokens.labels_N), task)
    if "accuracy" in out:
        out["accuracy_interval_95"] = list(interval(out["accuracy"], len(tokens)))
    return out


def interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n examples."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return centre - half, centre + half


def agreement(a_NC: np.ndarray, b_NC: np.ndarray) -> float:
    """Share of examples of which both predict the same class; for a regression the correlation of the two (0 where
    one of them is constant)."""
    if a_NC.shape[1] == 1:
        constant = np.ptp(a_NC) == 0 or np.ptp(b_NC) == 0
        return 0.0 if constant else float(np.corrcoef(a_NC[:, 0], b_NC[:, 0])[0, 1])
    return float((a_NC.argmax(axis=1) == b_NC.argmax(axis=1)).mean())
