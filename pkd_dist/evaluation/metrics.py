"""Task metrics of a model's logits, and how far two models agree.

Shapes: N examples, C classes (1 for a regression).
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Literal, cast

import numpy as np

from pkd_dist.data.tasks import Task
from pkd_dist.data.tokens import TokenSet
from pkd_dist.evaluation.intervals import wilson_interval
from pkd_dist.evaluation.probabilities import log_softmax
from pkd_dist.evaluation.results import Scores
from pkd_dist.metric_names import AGREEMENT, MAIN_METRIC


def score(logits_NC: np.ndarray, labels_N: np.ndarray, task: Task) -> dict[str, float]:
    """Return the metrics of a task, by their names in `metric_names.py`.

    Precision, recall and F1 are those of `task.positive` for two classes and macro averages for more. A correlation of
    constant values is undefined and counts as 0.

    Args:
        logits_NC: Floating, (N, C); the predicted value for a regression.
        labels_N: (N,) class indices, or the values of a regression; without labels, the teacher's classes; (N, C) of 0 and 1
            for multi-label, where a text has the classes with logits above 0.

    Returns:
        accuracy, MCC, precision, recall and f_1; of multiple choice, whose options are no classes, accuracy alone; pearson,
        spearman and pearson_spearman; or those of `MULTILABEL_METRICS`; without labels, agreement; and `main_metric`.
    """
    if not task.has_labels:
        return dict.fromkeys((AGREEMENT, MAIN_METRIC), float((logits_NC.argmax(axis=1) == labels_N).mean()))
    if task.multilabel:
        metrics = _of_sets(logits_NC, labels_N)
    elif task.multiple_choice:
        metrics = {"accuracy": float((logits_NC.argmax(axis=1) == labels_N).mean())}
    elif task.regression:
        from scipy.stats import pearsonr, spearmanr  # slow to import, so only on the rank that scores

        predicted_N = logits_NC[:, 0].astype(np.float64)
        constant = len(predicted_N) < 2 or np.ptp(predicted_N) == 0 or np.ptp(labels_N) == 0
        pearson = 0.0 if constant else float(pearsonr(predicted_N, labels_N).statistic)
        spearman = 0.0 if constant else float(spearmanr(predicted_N, labels_N).statistic)
        metrics = {"pearson": pearson, "spearman": spearman, "pearson_spearman": (pearson + spearman) / 2}
    else:
        from sklearn import metrics as sk

        predicted_N = logits_NC.argmax(axis=1)
        average: Literal["binary", "macro"] = "binary" if logits_NC.shape[1] == 2 else "macro"
        precision, recall, f_1, _ = sk.precision_recall_fscore_support(
            labels_N, predicted_N, average=average, pos_label=task.positive, zero_division=0
        )
        metrics = {
            "accuracy": float(sk.accuracy_score(labels_N, predicted_N)),
            "MCC": float(sk.matthews_corrcoef(labels_N, predicted_N)),
            "precision": float(precision),
            "recall": float(recall),
            "f_1": float(f_1),
        }
    return metrics | {MAIN_METRIC: metrics[task.main_metric]}


def _of_sets(logits_NC: np.ndarray, labels_NC: np.ndarray) -> dict[str, float]:
    """Return the metrics where a text can have several classes, as scikit-learn defines them.

    A class that neither labels nor answers have counts as 0 in the macro average, as does one without labels in mAP. A text
    without classes that is given none counts as 1 in the mean over the texts.
    """
    from sklearn import metrics as sk

    true_NC, predicted_NC = labels_NC.astype(int), (logits_NC > 0).astype(int)
    f1: dict[str, float] = {
        f"f1_{average}": float(
            sk.f1_score(true_NC, predicted_NC, average=average, zero_division=1.0 if average == "samples" else 0.0)
        )
        for average in ("micro", "macro", "samples")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No positive class found", UserWarning)
        precision = float(sk.average_precision_score(true_NC, logits_NC, average="macro"))
    return {**f1, "mAP": precision, "subset_accuracy": float(sk.accuracy_score(true_NC, predicted_NC))}


def undefined(logits_NC: np.ndarray, labels_N: np.ndarray, task: Task) -> list[str]:
    """Return the metrics that `score` counts as 0 because these labels or predictions do not define them.

    A correlation needs two values on both sides. Labels of a single class leave MCC undefined; where that class is not
    `task.positive`, there is nothing to find, and precision, recall and F1 of two classes are undefined as well. Without any class,
    all but the subset accuracy and F1 of the texts are undefined.
    """
    if not task.has_labels or task.multiple_choice:
        return []
    if task.multilabel:
        found = [] if labels_N.any() else ["f1_micro", "f1_macro", "mAP"]
    elif task.regression:
        told = len(labels_N) > 1 and np.ptp(labels_N) > 0 and np.ptp(logits_NC[:, 0].astype(np.float64)) > 0
        found = [] if told else ["pearson", "spearman", "pearson_spearman"]
    else:
        classes = np.unique(labels_N)
        found = ["MCC"] if len(classes) == 1 else []
        if logits_NC.shape[1] == 2 and task.positive not in classes:
            found += ["precision", "recall", "f_1"]
    return found + ([MAIN_METRIC] if task.main_metric in found else [])


def score_split(logits_NC: np.ndarray, tokens: TokenSet, task: Task) -> Scores:
    """Return `score` of a labeled split, with the 95% interval of its accuracy."""
    metrics = score(logits_NC, np.asarray(tokens.labels_N), task)
    scores = cast(Scores, metrics)
    if missing := undefined(logits_NC, np.asarray(tokens.labels_N), task):
        scores["undefined"] = missing
    if "accuracy" in scores:
        scores["accuracy_interval_95"] = list(wilson_interval(scores["accuracy"], len(tokens)))
    elif "subset_accuracy" in scores:
        scores["subset_accuracy_interval_95"] = list(wilson_interval(scores["subset_accuracy"], len(tokens)))
    elif not task.has_labels:
        scores["agreement_interval_95"] = list(wilson_interval(scores["agreement"], len(tokens)))
    return scores


def labelled_by(logits_NC: np.ndarray, tokens: TokenSet) -> TokenSet:
    """Return examples with the classes that a teacher gives them as labels, where there are no others."""
    return replace(tokens, labels_N=logits_NC.argmax(axis=1).astype(np.int64))


def agreement(a_NC: np.ndarray, b_NC: np.ndarray, multilabel: bool = False) -> float:
    """Return the share of examples for which two models predict the same class, or exactly the same classes.

    For a regression it is the correlation of their predictions, 0 where one of them is constant.

    Args:
        multilabel: A text has the classes with logits above 0.
    """
    if multilabel:
        return float(((a_NC > 0) == (b_NC > 0)).all(axis=1).mean())
    if a_NC.shape[1] == 1:
        constant = np.ptp(a_NC) == 0 or np.ptp(b_NC) == 0
        return 0.0 if constant else float(np.corrcoef(a_NC[:, 0], b_NC[:, 0])[0, 1])
    return float((a_NC.argmax(axis=1) == b_NC.argmax(axis=1)).mean())


def divergence(teacher_NC: np.ndarray, student_NC: np.ndarray, multilabel: bool = False) -> float:
    """Return the mean over the examples of KL(teacher || student) of their softmax distributions, in nats.

    For a regression it is the mean squared difference of the outputs.

    Args:
        multilabel: Each class is a distribution over two outcomes; the mean is also over the classes.
    """
    teacher_NC, student_NC = teacher_NC.astype(np.float64), student_NC.astype(np.float64)
    if multilabel:
        teacher_M2, student_M2 = (np.stack([np.zeros(x.size), x.ravel()], axis=1) for x in (teacher_NC, student_NC))
        return divergence(teacher_M2, student_M2)
    if teacher_NC.shape[1] == 1:
        return float(((teacher_NC - student_NC) ** 2).mean())
    log_teacher_NC, log_student_NC = log_softmax(teacher_NC), log_softmax(student_NC)
    return float((np.exp(log_teacher_NC) * (log_teacher_NC - log_student_NC)).sum(axis=1).mean())
