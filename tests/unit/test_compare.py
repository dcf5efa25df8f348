"""What `pkd compare` accepts, and its table."""

import numpy as np
import pytest
from scipy.stats import ttest_rel
from typer.testing import CliRunner

from pkd_dist.cli import app
from pkd_dist.compare import METHODS, as_markdown, interval, parse_methods, plot, summary
from pkd_dist.config import load
from pkd_dist.errors import UserError


def test_methods_by_name_and_of_ones_own():
    found = parse_methods(
        "finetune, kd", ["pairs-1: distill.patience=[1,5] distill.beta=10", "a+b: task.augment.copies=2"]
    )
    assert list(found) == ["finetune", "kd", "pairs-1", "a+b"] and found["kd"] == METHODS["kd"]
    assert found["pairs-1"] == {"distill.patience": "[1,5]", "distill.beta": "10"}


@pytest.mark.parametrize(
    ("names", "own", "message"),
    [
        ("finetune,pdk", [], "--methods: 'pdk' is not known; allowed: finetune, kd"),
        ("", [], "--methods: name at least one of finetune"),
        ("kd", ["kd: distill.beta=1"], "--method: the name 'kd' is taken"),
        ("kd", ["a/b: distill.beta=1"], "other signs than letters"),
        ("kd", ["mine distill.beta=1"], 'not of the form "NAME: section.key=value'),
        ("kd", ["mine: distill.beta"], "not of the form"),
        ("kd", ["mine:"], "not of the form"),
    ],
)
def test_methods_that_are_refused(names, own, message):
    with pytest.raises(UserError, match=message):
        parse_methods(names, own)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--seeds", "1,x"], "--seeds: '1,x' is not a list of numbers such as 1,2,3"),
        (["--jobs", "2", "--launcher", "deepspeed"], "--jobs: with --launcher one run at a time"),
        (["distill.alhpa=1"], "distill.alhpa: unknown key; did you mean distill.alpha?"),
        (["--method", "deep: student.layers=[9]"], "student.layers: layer 9 is out of range"),
    ],
)
def test_a_comparison_that_is_refused_before_it_starts(tmp_path, more, message):
    output = tmp_path / "out"
    done = CliRunner().invoke(app, ["compare", "--config", "configs/demo.yaml", "--output", str(output), *more])
    assert done.exit_code == 2 and message in done.stderr and not output.exists()


def test_an_interval_is_students():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=5), rng.normal(size=5)
    mean, half = interval(list(a - b))
    expected = ttest_rel(a, b).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))
    assert interval([3.0]) == (3.0, None)


def result(dev, test, agreement):
    side = {"accuracy": dev, "parameters": 9e6, "modelSize": 36.0, "reasoningTime": 100.0}
    return {
        "task": "sst2", "n": 100, "student": side, "teacher": side | {"accuracy": 0.9},
        "compression": {"agreement": agreement},
        "splits": {"test": {"n": 300, "student": {"accuracy": test}, "teacher": {"accuracy": 0.8}, "agreement": 0.9}},
    }  # fmt: skip


def test_the_table_pools_splits_and_pairs_seeds():
    results = {
        "finetune": {1: result(0.8, 0.7, 0.8), 2: result(0.82, 0.72, 0.8)},
        "kd": {2: result(0.84, 0.73, 0.9), 1: result(0.83, 0.71, 0.85), 3: result(0.9, 0.9, 0.9)},
        "shallow": {1: result(0.5, 0.5, 0.5)},
    }
    made = summary(load(None, ["run.dir=unused"]), results, {"finetune": 2, "kd": 2, "shallow": 1})
    assert made["teacher"]["score"] == pytest.approx((90 + 240) / 400) and made["splits"] == ["dev", "test"]
    scores = {seed: figures["score"] for seed, figures in made["methods"]["kd"]["seeds"].items()}
    assert scores == pytest.approx({"1": (83 + 213) / 400, "2": (84 + 219) / 400, "3": 0.9})
    gain = [(83 + 213 - 80 - 210) / 400, (84 + 219 - 82 - 216) / 400]
    assert made["methods"]["kd"]["minus finetune"]["score"] == {
        "mean": pytest.approx(np.mean(gain)), "half_interval_95": pytest.approx(interval(gain)[1]),
    }  # fmt: skip
    assert (
        made["methods"]["shallow"]["half_interval_95"]["score"] is None
        and "minus finetune" not in made["methods"]["shallow"]
    )
    table = as_markdown(made)
    assert (
        "| teacher |  |  | 90.00 | 80.00 | 82.50 | 100.00 |" in table and "| shallow | 1 | 1 | 50.00 | 50.00 |" in table
    )
    assert [axes.get_xlabel() for axes in plot(made).axes] == [
        "accuracy on dev + test, %",
        "agreement with the teacher, %",
    ]
