"""95% intervals: resampled scores against the metrics of the examples drawn, and known intervals."""

import numpy as np
import pytest
from scipy.stats import binom

from pkd_dist.data.tasks import Task
from pkd_dist.evaluation.intervals import percentile_interval, resampled_scores, weighted_scores
from pkd_dist.evaluation.metrics import score

TASKS = [(metric, classes) for metric in ("accuracy", "mcc", "f1") for classes in (2, 4)] + [("pearson_spearman", 1)]


def examples(classes, n=300, right=0.8):
    """Labels, and logits of two models whose errors are partly the same."""
    rng = np.random.default_rng(classes)
    if classes == 1:
        labels_N = rng.integers(0, 6, n).astype(np.float64)  # with ties
        first = labels_N + rng.normal(0, 1, n)
        return labels_N, {"a": first[:, None], "b": (first + rng.normal(0, 0.3, n)).round(1)[:, None]}
    labels_N = rng.integers(0, classes, n)
    first = np.where(rng.random(n) < right, labels_N, rng.integers(0, classes, n))
    second = np.where(rng.random(n) < 0.9, first, rng.integers(0, classes, n))
    return labels_N, {"a": np.eye(classes)[first], "b": np.eye(classes)[second]}


@pytest.mark.filterwarnings("ignore:A single label")
@pytest.mark.parametrize(("metric", "classes"), TASKS)
def test_a_weighted_score_is_the_score_of_the_examples_drawn(metric, classes):
    labels_N, logits = examples(classes, n=40)
    task = Task("t", ("text",), "label", metric=metric, regression=classes == 1)
    answers_N = logits["b"][:, 0] if classes == 1 else logits["b"].argmax(axis=1)
    weights_RN = np.random.default_rng(1).multinomial(40, np.full(40, 1 / 40), size=25)
    weights_RN[0] = 0
    weights_RN[0, 0] = 40  # one example alone: neither MCC nor a correlation is defined
    found = weighted_scores(weights_RN, labels_N, answers_N, task, classes)
    drawn = [np.repeat(np.arange(40), weights_N) for weights_N in weights_RN]
    wanted = [score(logits["b"][rows], labels_N[rows], task)["main_metric"] for rows in drawn]
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)


def test_the_interval_of_an_accuracy_is_the_binomials():
    labels_N, logits = examples(2, n=1000)
    found = resampled_scores(labels_N, logits, Task("t", ("text",), "label"))["a"]
    share = float((logits["a"].argmax(axis=1) == labels_N).mean())
    np.testing.assert_allclose(percentile_interval(found), binom(1000, share).ppf([0.025, 0.975]) / 1000, atol=0.003)


@pytest.mark.parametrize(("metric", "classes"), TASKS)
def test_models_are_resampled_together(metric, classes):
    """The interval of their ratio is far narrower than that of independent resamples, and exact for equal models."""
    labels_N, logits = examples(classes)
    task = Task("t", ("text",), "label", metric=metric, regression=classes == 1)
    found = resampled_scores(labels_N, logits | {"same": logits["a"]}, task)
    np.testing.assert_array_equal(found["a"], found["same"])
    paired = found["b"] / found["a"]
    independent = found["b"] / np.random.default_rng(2).permutation(found["a"])
    assert paired.std() < 0.8 * independent.std()


def test_the_resamples_are_the_same_in_every_call():
    labels_N, logits = examples(1, n=600)  # in two blocks
    task = Task("t", ("text",), "label", metric="pearson_spearman", regression=True)
    first, second = (resampled_scores(labels_N, logits, task) for _ in range(2))
    assert len(first["a"]) == 2000
    np.testing.assert_array_equal(first["a"], second["a"])
