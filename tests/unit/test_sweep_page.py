"""sweep.html in Chromium without network: on a phone and on a desktop."""

import numpy as np
import pytest

from pkd_dist.config.sweep import Sweep
from pkd_dist.search import page, summary
from pkd_dist.search.outcome import Final, Outcome, ranked
from pkd_dist.search.space import Space
from pkd_dist.search.study import Study

POINTS = 24
OVERFLOWING = """() => [...document.querySelectorAll('main *')].filter(element =>
    !element.closest('.scroll') && element.getBoundingClientRect().right > innerWidth + 0.5
).map(element => element.outerHTML.slice(0, 200))"""
DRAWN = "() => [...document.querySelectorAll('.js-plotly-plot')].map(plot => plot.querySelectorAll('path').length)"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study of trials that nobody trained: complete, pruned and failed ones."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    space = Space(
        {
            "train.learning_rate": FloatDistribution(1e-5, 1e-3, log=True),
            "distill.temperature": CategoricalDistribution([5.0, 10.0]),
            "student.layers": CategoricalDistribution(["[5]", "[2, 5]", "[1, 3, 5]"]),
        }
    )
    settings = Sweep(space={"train.learning_rate": [1.0]}, sampler="random", trials=POINTS, seeds=[1, 2])
    made, rng = Study(tmp_path_factory.mktemp("sweep"), settings, space), np.random.default_rng(1)
    made.prepare({"sweep.seeds": [1, 2]}, "accuracy")
    while (claim := made.claim("nobody")) is not None:
        depth = len(claim.trial.params["student.layers"].split(","))
        if claim.number == 3:
            made.fail(claim, "a <b>loss</b> is not finite")
            continue
        history = np.exp(-np.arange(4) / depth) * rng.uniform(0.1, 0.2)
        for epoch, divergence in enumerate(history[: 1 if claim.number % 3 == 1 else 4], start=1):
            claim.trial.report(-divergence, epoch)
        scores = {"accuracy": 0.8 + 0.03 * depth + rng.uniform(0, 0.02), "divergence": history[-1]}
        scores["main_metric"] = scores["accuracy"]
        found = {
            "epoch": 4, "scores": scores, "parameters": 10**6 * depth, "examples": 1050, "seconds": 61.0,
            "bytes": 3_000_000 * depth, "latency_ms": 0.3 * depth, "processor": "a CPU",
        }  # fmt: skip
        if claim.number % 3 == 1 and claim.seed == 1:
            made.prune(claim, {"seconds": 20.0})
        else:
            made.complete(claim, scores["accuracy"], found)
    return made


@pytest.fixture(scope="module")
def outcome(study):
    points = ranked(study.trials, 2)
    results = {
        "split": "dev",
        "student": {"main_metric": 0.87},
        "teacher": {"accuracy": 0.91, "main_metric": 0.91},
        "splits": {},
    }
    rows = [{"file": "teacher", "bytes": 90_000_000, "speed": {"latency_ms_p50": 6.0}}]
    final = Final(study.folder / "final/seed-3", results, {"deployment": {"rows": rows}})
    return Outcome(study.folder, points[0], points, "accuracy", {3: final}, (1, 2), study.trials, study.looks_per_epoch)


@pytest.fixture(scope="module")
def written(study, outcome):
    page.write(outcome, study, study.folder / "sweep.html")
    return study.folder / "sweep.html"


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_and_every_chart_is_drawn(chromium, written, width):
    shown = chromium.new_page(viewport={"width": width, "height": 900}, offline=True)
    errors = []
    shown.on("pageerror", lambda error: errors.append(error))
    shown.on("request", lambda request: errors.append(request.url) if not request.url.startswith("file:") else None)
    shown.goto(written.as_uri())
    shown.wait_for_function("() => document.querySelectorAll('.js-plotly-plot .main-svg').length >= 5")
    assert not errors, errors
    assert shown.evaluate(OVERFLOWING) == []
    drawn = shown.evaluate(DRAWN)
    assert len(drawn) == 5 and min(drawn) >= 3, drawn
    shown.close()


def test_the_page_says_what_was_found(written, outcome):
    text = written.read_text()
    assert f"point {outcome.winner.number}" in text and "seed 3, dev" in text and "not searched" in text
    assert "&lt;b&gt;loss&lt;/b&gt; is not finite" in text and "<b>loss</b>" not in text
    assert summary.counted(outcome.trials) in text


def test_points_are_ranked_by_the_mean_over_their_seeds(outcome, study):
    means = {
        point.number: np.mean([trial.value for trial in study.trials if trial.user_attrs["point"] in (point.number,) or trial.number == point.number])
        for point in outcome.points
    }  # fmt: skip
    assert [point.number for point in outcome.points] == sorted(means, key=lambda number: -means[number])
    assert all(len(point.trials) == 2 for point in outcome.points)


def test_the_optimism_of_the_search_is_told(outcome):
    searched = np.mean([trial.user_attrs["scores"]["main_metric"] for trial in outcome.winner.trials])
    assert f"optimistic by {searched - 0.87:+.4f} on dev" in summary.describe(outcome)
