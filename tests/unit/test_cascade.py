"""`pkd cascade`: shares, agreement and threshold equal a brute force over all thresholds; bad runs are refused in one line."""

import json
import math
import shutil

import numpy as np
import pytest
from run_folders import change, make_run, rewrite
from safetensors.numpy import save_file
from typer.testing import CliRunner

from pkd_dist.cli.main import app
from pkd_dist.evaluation import predictions
from pkd_dist.evaluation.cascade import Curve, choose, most_certain, plot, relative_cost
from pkd_dist.evaluation.predictions import Predictions
from pkd_dist.files import sha256

Z = 1.959964


def lower_limit(hits, n):
    """Wilson's score interval as the smaller root of (share - p)^2 = z^2 p (1 - p) / n."""
    a, b, c = 1 + Z * Z / n, -(2 * hits / n + Z * Z / n), (hits / n) ** 2
    return (-b - math.sqrt(b * b - 4 * a * c)) / (2 * a)


def answers(n=800, classes=3, seed=0, labelled=True, noise=1.2):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    teacher = 2.5 * np.eye(classes)[labels] + rng.normal(size=(n, classes))
    student = teacher + rng.normal(size=teacher.shape) * noise
    logits = {"teacher": teacher.astype(np.float32), "student": student.astype(np.float32)}
    return Predictions(np.arange(n), labels if labelled else np.full(n, -1), logits)


def brute(found):
    """Every threshold: (threshold, answered alone, agreeing, correct of the cascade), example by example."""
    rows = []
    for i, logits in enumerate(found.logits["student"].astype(np.float64)):
        powers = [math.exp(x - max(logits)) for x in logits]
        level = math.floor(max(powers) / sum(powers) * 1e6) / 1e6
        teacher = int(found.logits["teacher"][i].argmax())
        rows.append((level, int(logits.argmax()), teacher, int(found.labels_N[i])))
    for threshold in sorted({row[0] for row in rows}, reverse=True):
        alone = [row for row in rows if row[0] >= threshold]
        right = sum(
            student == label if level >= threshold else teacher == label for level, student, teacher, label in rows
        )
        yield threshold, len(alone), sum(student == teacher for _, student, teacher, _ in alone), right


@pytest.mark.parametrize("classes", [2, 7])
def test_a_curve_equals_brute_force(classes):
    found = answers(300, classes)
    found.logits["student"][10:20] = found.logits["student"][10]  # of the same confidence: answered alone together
    expected = list(brute(found))
    curve = Curve.of(found)
    assert curve.thresholds_K.tolist() == [row[0] for row in expected]
    for column, of in zip(range(1, 4), (curve.answered_K, curve.agreeing_K, curve.correct_K), strict=True):
        assert of.tolist() == [row[column] for row in expected]
    for side in ("teacher", "student"):
        assert curve.alone[side].value == (found.logits[side].argmax(1) == found.labels_N).mean()
    assert curve.lowest_agreement() == pytest.approx([lower_limit(row[2], row[1]) for row in expected], abs=1e-12)
    last = curve.point(len(expected) - 1)
    assert last.answered.value == 1 and last.accuracy == curve.alone["student"], "the student answers everything"
    nothing = curve.at(1.1)
    assert (nothing.answered.value, nothing.agreement, nothing.accuracy) == (0, None, curve.alone["teacher"])
    middle = (curve.thresholds_K[40] + curve.thresholds_K[41]) / 2
    assert curve.at(middle).answered == curve.point(40).answered and curve.at(middle).threshold == middle


@pytest.mark.parametrize("goal", [0.8, 0.9, 0.95, 0.98, 0.999])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_chosen_threshold_answers_most_among_those_that_reach_the_goal(goal, seed):
    found = answers(seed=seed)
    reached = [row for row in brute(found) if lower_limit(row[2], row[1]) >= goal]
    chosen = choose(Curve.of(found), goal)
    if not reached:
        assert chosen is None
        return
    threshold, alone, agreeing, right = max(reached, key=lambda row: row[1])
    assert chosen.threshold == threshold and chosen.answered.value == alone / 800
    assert chosen.agreement.value == agreeing / alone and chosen.agreement.interval_95[0] >= goal
    assert chosen.accuracy.value == right / 800


def test_a_goal_that_is_reached_on_dev_is_rarely_missed():
    """Of new examples: the agreement itself instead of its lower limit would miss it every other time."""
    missed = {"bound": 0, "estimate": 0}
    population = Curve.of(answers(100_000, 2, seed=99))
    for seed in range(100):
        dev = Curve.of(answers(1000, 2, seed=seed))
        estimate = dev.point(int(np.flatnonzero(dev.agreeing_K / dev.answered_K >= 0.97)[-1]))
        for name, chosen in (("bound", choose(dev, 0.97)), ("estimate", estimate)):
            missed[name] += population.at(chosen.threshold).agreement.value < 0.97
    assert missed["bound"] <= 5 and missed["estimate"] >= 30, missed


def test_what_is_best_where_the_goal_is_out_of_reach():
    curve = Curve.of(answers(200))
    best = most_certain(curve)
    assert choose(curve, 0.999) is None
    assert best.agreement.interval_95[0] == curve.lowest_agreement().max()
    assert choose(curve, best.agreement.interval_95[0]) is not None


def test_the_cost_of_a_request():
    assert relative_cost(0.75, 1.0, 10.0) == pytest.approx((0.75 * 1 + 0.25 * (1 + 10)) / 10)


def test_a_split_without_labels_has_agreement_alone():
    curve = Curve.of(answers(labelled=False))
    assert curve.correct_K is None and curve.point(3).accuracy is None and not curve.alone
    assert curve.agreeing_K.tolist() == Curve.of(answers()).agreeing_K.tolist()
    assert len(plot({"dev": curve}, curve.point(3), 0.9).axes) == 1
    assert len(plot({"dev": Curve.of(answers())}, curve.point(3), 0.9).axes) == 2


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def run(tmp_path):
    """A finished run with answers on dev and test, whose marker has their checksum."""
    folder = make_run(tmp_path / "run")
    put(folder, dev=answers(1000, 2), test=answers(600, 2, seed=5))
    return folder


def put(folder, **splits):
    tensors = {}
    for name, found in splits.items():
        tensors |= {f"{name}.ids": found.ids_N, f"{name}.labels": found.labels_N}
        tensors |= {f"{name}.{side}": logits for side, logits in found.logits.items()}
    path = folder / predictions.FILE
    save_file(tensors, path)
    rewrite(folder, "evaluate", lambda marker: marker.update(files={path.name: sha256(path)}))


def pkd(*arguments):
    done = CliRunner().invoke(app, ["cascade", *map(str, arguments)])
    assert "Traceback" not in done.output
    return done


def refused(*arguments):
    done = pkd(*arguments)
    assert done.exit_code == 2 and not done.stdout and done.stderr.startswith("pkd: ")
    assert len(done.stderr.splitlines()) == 1
    return done.stderr.removeprefix("pkd: ").rstrip("\n")


def test_the_command_says_and_writes_what_it_found(run):
    done = pkd(run, "--agreement", 0.97)
    assert done.exit_code == 0, done.output
    written = json.loads((run / "cascade.json").read_text())
    dev, test = Curve.of(answers(1000, 2)), Curve.of(answers(600, 2, seed=5))
    chosen = choose(dev, 0.97)
    held_out = test.at(chosen.threshold)
    assert (written["agreement"], written["threshold"], written["chosen_on"]) == (0.97, chosen.threshold, "dev")
    assert written["splits"]["test"]["n"] == 600
    assert written["splits"]["test"]["agreement"]["value"] == held_out.agreement.value
    assert written["splits"]["test"]["accuracy"]["interval_95"] == list(held_out.accuracy.interval_95)
    assert len(written["splits"]["dev"]["curve"]) <= 200
    assert {each["threshold"] for each in written["splits"]["dev"]["curve"]} <= set(dev.thresholds_K.tolist())
    cost = {"student": "onnx/model.int8.onnx", "student_ms": 0.8, "teacher_ms": 13.0}
    assert written["cost"] == cost, "of the files of the export"
    assert written["splits"]["test"]["cost"] == pytest.approx(0.8 / 13 + 1 - held_out.answered.value)
    assert written["temperature"] is None and written["answers_sha256"] == sha256(run / predictions.FILE)
    first, second, third, *_ = done.stdout.splitlines()
    assert first == (
        f"the student answers {held_out.answered} of test alone (held out), {held_out.agreement} of these with the teacher's class"
    )
    assert second.startswith(f"threshold: a probability of {chosen.threshold:.6f}, ") and second.endswith("above 0.97")
    assert third.startswith(f"a request costs {written['splits']['test']['cost']:.2f} of the teacher's time on average")
    assert "onnx/model.int8.onnx) takes 0.80 ms" in third
    assert (run / "cascade.png").read_bytes().startswith(b"\x89PNG")
    assert pkd(run, "--agreement", 0.95).exit_code == 0, "written again"
    assert json.loads((run / "cascade.json").read_text())["agreement"] == 0.95


def test_a_run_with_dev_alone_and_without_an_export(run, tmp_path):
    put(run, dev=answers(1000, 2))
    shutil.rmtree(run / "export")
    done = pkd(run, "--agreement", 0.9, "--output", tmp_path / "own.json")
    assert done.exit_code == 0 and "of dev alone (in-sample)" in done.stdout
    assert json.loads((tmp_path / "own.json").read_text())["cost"]["student"] == "PyTorch"
    assert (tmp_path / "own.png").is_file() and not (run / "cascade.json").exists()


def test_the_cost_of_several_teachers_was_not_measured(run):
    change(run, "evaluate", lambda outputs: outputs["results"].update(ensemble={"teachers": 2, "first": {}}))
    done = pkd(run, "--agreement", 0.9)
    assert done.exit_code == 0 and "a request costs" not in done.stdout
    assert json.loads((run / "cascade.json").read_text())["cost"] is None


def test_a_test_split_without_labels(run):
    put(run, dev=answers(1000, 2), test=answers(600, 2, seed=5, labelled=False))
    assert pkd(run, "--agreement", 0.9).exit_code == 0
    written = json.loads((run / "cascade.json").read_text())["splits"]
    assert written["test"]["accuracy"] is None and written["test"]["agreement"]["value"] > 0.9
    assert written["dev"]["accuracy"]["value"] > 0.9 and written["test"]["accuracy_alone"] == {}


def test_a_goal_out_of_reach_names_the_best_that_can_be_reached(run):
    said = refused(run, "--agreement", 0.9999)
    assert said.startswith("--agreement: 0.9999 is not reached on dev at any threshold: at best the 95% interval")
    reachable = float(said.split("give at most ")[1].split(",")[0])
    assert not (run / "cascade.json").exists()
    assert pkd(run, "--agreement", reachable).exit_code == 0


@pytest.mark.parametrize("value", ["0", "1", "99", "-0.5", "nan"])
def test_an_agreement_that_is_no_share(run, value):
    assert refused(run, f"--agreement={value}").startswith("--agreement: ")


def test_runs_that_have_no_cascade(run, tmp_path):
    assert refused(tmp_path / "none") == f"no such folder: {tmp_path}/none; give a run folder, such as runs/demo"
    assert refused(tmp_path) == f"{tmp_path}: is not a run folder; give one, such as runs/demo"
    path = run / predictions.FILE
    before = path.read_bytes()
    path.write_bytes(before[:-1] + b"x")
    assert refused(run) == f"{path} was altered; rerun the run's command to write it again"
    path.unlink()
    assert refused(run) == f"{path} is missing; rerun the run's command to write it again"
    path.write_bytes(before)
    rewrite(run, "evaluate", lambda marker: marker.update(done=False))
    assert refused(run) == f"{run}: is not evaluated yet; rerun the run's command to resume it"
    (run / "stages/evaluate.json").unlink()
    assert refused(run) == f"{run}: is not evaluated yet; rerun the run's command to resume it"


def test_answers_of_the_student_alone(run):
    found = answers(100, 2)
    del found.logits["teacher"]
    put(run, dev=found)
    assert "answers.safetensors: cannot be read" in refused(run)


def test_a_regression_has_no_confidence(tmp_path):
    folder = make_run(tmp_path / "run", regression=True)
    assert refused(folder).startswith(f"{folder}: is a regression, whose answers have no confidence")


def test_an_output_that_cannot_be_written(run, tmp_path):
    (tmp_path / "there.png").touch()
    for name, said in (
        ("a.png", "must end in .json"), ("there.json", f"{tmp_path}/there.png exists"), ("no/a.json", "no such folder"),
    ):  # fmt: skip
        assert said in refused(run, "--output", tmp_path / name)


def test_a_calibrated_run_says_its_temperature(run):
    change(run, "evaluate", lambda outputs: outputs["results"].update(calibration={"temperature": 1.7, "splits": {}}))
    assert pkd(run, "--agreement", 0.9).exit_code == 0
    assert json.loads((run / "cascade.json").read_text())["temperature"] == 1.7
