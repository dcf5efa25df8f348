"""The temperature and what it is judged by equal independent formulas, and the last layer of every family contains it."""

import math

import numpy as np
import pytest
import scipy.special
import torch
from families import FAMILIES, make_folder
from torch import nn

from pkd_dist.data.target_scale import TargetScale
from pkd_dist.errors import UserError
from pkd_dist.evaluation.calibration import (
    HIGHEST,
    LOWEST,
    calibrate,
    divided,
    ece_sentence,
    fit_temperature,
    reliability,
)
from pkd_dist.evaluation.probabilities import log_softmax, sigmoid, softmax
from pkd_dist.model.encoder import load_model
from pkd_dist.model.head import divide_logits, output_layer
from pkd_dist.model.regression_head import standardize

pytestmark = pytest.mark.usefixtures("one_thread")


def overconfident(count=3, n=400, scale=2.5, seed=0):
    """Return logits that are too large by `scale`, and labels drawn from the probabilities of the right ones."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, count)) * 1.5
    powers = np.exp(logits)
    labels = np.array([rng.choice(count, p=row / row.sum()) for row in powers])
    return (scale * logits).astype(np.float32), labels


def likelihood(logits, labels, temperature):
    """The mean negative log-likelihood in float64, example by example."""
    total = 0.0
    for row, label in zip(logits.astype(np.float64) / temperature, labels, strict=True):
        total -= row[label] - row.max() - math.log(sum(math.exp(x - row.max()) for x in row))
    return total / len(labels)


@pytest.mark.parametrize(("count", "scale"), [(2, 0.3), (2, 3.0), (3, 2.5), (20, 1.0)])
def test_the_temperature_is_the_best_of_a_fine_grid(count, scale):
    logits, labels = overconfident(count, scale=scale)
    found = fit_temperature(logits, labels)
    grid = found * np.exp(np.linspace(-0.02, 0.02, 81))
    values = [likelihood(logits, labels, temperature) for temperature in grid]
    assert np.argmin(values) == 40, "the minimum of the grid is in its middle, 0.05% wide"
    coarse = np.exp(np.linspace(math.log(LOWEST), math.log(HIGHEST), 60))
    assert min(likelihood(logits, labels, temperature) for temperature in coarse) >= likelihood(logits, labels, found)
    assert found == pytest.approx(scale, rel=0.25), "and it is near what the labels were drawn with"


def test_a_temperature_scales_with_the_logits():
    logits, labels = overconfident()
    assert fit_temperature(2 * logits, labels) == pytest.approx(2 * fit_temperature(logits, labels), rel=1e-6)


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        (np.eye(2)[[0, 1, 1, 0]], [0, 1, 1, 0]),
        (np.eye(3)[[0, 1, 2]], [1, 2, 0]),
        (np.zeros((4, 2)), [0, 1, 0, 1]),
    ],
    ids=["all right: smaller is always better", "all wrong: larger is always better", "no difference"],
)
def test_dev_that_determines_no_temperature(logits, labels):
    assert fit_temperature(logits, np.asarray(labels)) is None
    found = calibrate({"dev": logits}, {"dev": np.asarray(labels)})
    assert found["temperature"] == 1 and "no temperature between 0.05 and 20" in found["unfitted"]
    assert found["splits"]["dev"]["before"] == found["splits"]["dev"]["after"]


@pytest.mark.parametrize("count", [2, 5])
def test_calibration_error_and_bins_equal_a_loop(count):
    logits, labels = overconfident(count, n=300)
    bins = [[] for _ in range(15)]
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        powers = [math.exp(x - max(row)) for x in row]
        confidence = max(powers) / sum(powers)
        place = next(i for i in range(15) if confidence <= (i + 1) / 15)
        bins[place].append((confidence, int(np.argmax(row)) == label))
    error = 0.0
    for members in filter(None, bins):
        sure, right = (sum(x) / len(members) for x in zip(*members, strict=True))
        error += len(members) / len(labels) * abs(sure - right)
    found = reliability(logits, labels)
    assert found["ece"] == pytest.approx(error, abs=1e-12)
    assert found["nll"] == pytest.approx(likelihood(logits, labels, 1.0), abs=1e-12)
    assert [each["n"] for each in found["bins"]] == [len(members) for members in bins if members]
    first = next(members for members in bins if members)
    assert found["bins"][0]["confidence"] == pytest.approx(np.mean([sure for sure, _ in first]))


def test_the_error_by_chance_is_that_of_labels_drawn_from_the_probabilities():
    logits, _ = overconfident(n=500, scale=1.0)
    powers = np.exp(logits.astype(np.float64))
    rng = np.random.default_rng(3)
    cumulative = np.cumsum(powers / powers.sum(axis=1, keepdims=True), axis=1)
    errors = [
        reliability(logits, (rng.random((500, 1)) > cumulative).sum(axis=1).clip(max=2))["ece"] for _ in range(200)
    ]
    assert reliability(logits, np.zeros(500, int))["ece_by_chance"] == pytest.approx(np.mean(errors), rel=0.06)


def test_certainty_is_in_the_last_bin():
    found = reliability(np.asarray([[50.0, -50.0], [-800.0, 800.0]]), np.asarray([0, 0]))
    assert found["bins"] == [{"n": 2, "confidence": 1.0, "accuracy": 0.5}] and found["ece"] == 0.5


def test_calibration_is_fitted_on_dev_alone_and_judged_everywhere():
    dev, test = overconfident(seed=1), overconfident(seed=2)
    found = calibrate({"dev": dev[0], "test": test[0]}, {"dev": dev[1], "test": test[1]})
    assert found["temperature"] == fit_temperature(*dev) and "unfitted" not in found
    for split, (logits, labels) in (("dev", dev), ("test", test)):
        each = found["splits"][split]
        assert each["n"] == 400 and each["before"] == reliability(logits, labels)
        assert each["after"] == reliability(divided(logits, found["temperature"]), labels)
        assert each["after"]["ece"] < each["before"]["ece"] and each["after"]["nll"] < each["before"]["nll"]
    said = ece_sentence(found)
    assert "on dev (400 examples, on which it was fitted)" in said and said.endswith("on test (400 examples)")


@pytest.mark.filterwarnings("error")
def test_probabilities_are_those_of_scipy_also_of_large_logits():
    logits_NC = np.vstack([np.random.default_rng(0).normal(0, 5, (50, 3)), [[1000.0, 0.0, -1000.0]]]).astype(np.float32)
    wide_NC = logits_NC.astype(np.float64)
    for own, independent in ((softmax, scipy.special.softmax), (log_softmax, scipy.special.log_softmax)):
        assert own(logits_NC).dtype == np.float64
        np.testing.assert_allclose(own(logits_NC), independent(wide_NC, axis=-1), rtol=1e-14)
        np.testing.assert_array_equal(own(logits_NC[3]), own(logits_NC)[3])
    np.testing.assert_allclose(sigmoid(logits_NC), scipy.special.expit(wide_NC), rtol=1e-14)
    assert log_softmax(np.asarray([[1000.0, 0.0]], np.float32)).tolist() == [[0.0, -1000.0]]


@pytest.mark.parametrize("outputs", [2, 3, 32])  # 32: as many as the model is wide
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_of_every_family_contains_the_temperature(family, outputs, tmp_path):
    folder = make_folder(tmp_path, family, classifier=True, names=tuple(f"c{i}" for i in range(outputs)))
    model = load_model(folder).eval()
    inputs = {"input_ids": torch.tensor([[2, 9, 12, 7, 3], [2, 8, 8, 15, 3]])}
    with torch.inference_mode():
        before = model(**inputs).logits.double()
        divide_logits(model, 2.7)
        np.testing.assert_allclose(model(**inputs).logits.double(), before / 2.7, rtol=1e-5, atol=1e-7)


def test_logits_that_are_not_of_one_linear_layer_are_rejected(tmp_path):
    model = load_model(make_folder(tmp_path, "bert", classifier=True)).eval()
    with torch.no_grad():
        model.classifier.weight *= 20
    model.classifier = nn.Sequential(model.classifier, nn.Tanh())
    with pytest.raises(UserError, match=r"evaluate\.calibrate: BertForSequenceClassification cannot be calibrated"):
        divide_logits(model, 2.0)
    model.classifier = nn.Identity()
    assert output_layer(model) is None
    with pytest.raises(UserError, match="its regression head is not one linear layer with a bias"):
        standardize(model, TargetScale(0.0, 2.0))
