"""The table of the exported files beside the teacher: its figures, and what terminal, card and report say of them."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter
from run_folders import figures, speed

from pkd_dist.data.tasks import Task
from pkd_dist.evaluation.deployment import Deployment, Measured, beside_teacher, closing_table
from pkd_dist.evaluation.metrics import agreement, score
from pkd_dist.evaluation.results import combine
from pkd_dist.export.manifest import deployment_of
from pkd_dist.report.charts.deployment import raised, tradeoffs

N = 400


def answers(classes=2):
    """Labels of dev and test, and logits of a teacher and a student on both."""
    rng = np.random.default_rng(0)
    labels_N = rng.integers(0, classes, N)
    teacher = np.where(rng.random(N) < 0.85, labels_N, rng.integers(0, classes, N))
    student = np.where(rng.random(N) < 0.9, teacher, rng.integers(0, classes, N))
    return labels_N, {"teacher": np.eye(classes)[teacher], "student": np.eye(classes)[student]}


def table(labels_N, logits, metric="accuracy", regression=False):
    task = Task("t", ("text",), "label", metric=metric, regression=regression)
    models = [
        Measured("teacher", "teacher, PyTorch", 4000, 90_900_000, logits["teacher"], speed(50, 9.6, threads=2)),
        Measured("model.safetensors", "student, PyTorch", 2000, 69_600_000, logits["student"], speed(90, 5.0, threads=2)),
        Measured("onnx/model.int8.onnx", "student, ONNX int8", 2000, 19_200_000, logits["student"], speed(1000, 0.6, threads=2)),
    ]  # fmt: skip
    labels = {"dev": labels_N[:250], "test": labels_N[250:]}
    return beside_teacher(task, labels, models, "onnx/model.int8.onnx", 64, "CPU")


@pytest.mark.parametrize(("metric", "classes"), [("accuracy", 2), ("f1", 2), ("mcc", 3), ("f1", 3)])
def test_scores_are_those_of_all_examples(metric, classes):
    labels_N, logits = answers(classes)
    made = table(labels_N, logits, metric)
    task = Task("t", ("text",), "label", metric=metric)
    wanted = {side: score(logits_NC, labels_N, task)["main_metric"] for side, logits_NC in logits.items()}
    teacher, student, int8 = made.rows
    assert (made.examples, made.on) == (N, "dev + test")
    assert (teacher.score, int8.score) == pytest.approx((wanted["teacher"], wanted["student"]))
    assert int8.kept == pytest.approx(wanted["student"] / wanted["teacher"])
    assert int8.agreement == pytest.approx(agreement(logits["student"], logits["teacher"]))
    for (low, high), value in (
        (teacher.score_interval_95, teacher.score),
        (student.score_interval_95, student.score),
        (int8.kept_interval_95, int8.kept),
    ):
        assert low < value < high
    assert teacher.kept is None and teacher.agreement is None


def test_the_ratios_are_those_of_the_stored_figures():
    made = table(*answers())
    stored = json.loads(json.dumps(asdict(made)))
    read = TypeAdapter(Deployment).validate_python(stored)
    assert read == made
    teacher, best = stored["rows"][0], stored["rows"][2]
    assert read.smaller(read.best) == teacher["bytes"] / best["bytes"] == pytest.approx(4.734, abs=1e-3)
    assert read.faster(read.best) == teacher["speed"]["latency_ms_p50"] / best["speed"]["latency_ms_p50"]
    low, high = best["kept_interval_95"]
    assert read.headline() == (
        f"4.7x smaller, 16x faster at batch 1, keeps {100 * best['kept']:.1f}% ({100 * low:.1f} to {100 * high:.1f}) of the "
        "teacher's accuracy (dev + test)"
    )


def test_the_end_of_a_run():
    made = table(*answers())
    lines = closing_table(made, Path("RUN/export"), Path("RUN/report.html")).splitlines()
    assert lines[0] == f"deploy RUN/export/onnx/model.int8.onnx: {made.headline()}"
    assert "parameters" in lines[2] and "MB" in lines[2] and "accuracy (95%)" in lines[2]
    cells = [[cell for cell in line.split("  ") if cell] for line in lines[4:7]]
    assert [[cell.strip() for cell in row] for row in cells] == [list(row) for row in made.cells()]
    assert cells[0][0].startswith("teacher, PyTorch") and cells[2][0].startswith("student, ONNX int8")
    note = " ".join(lines[7:])
    assert "accuracy on 400 examples (dev + test) with Wilson's 95% interval" in note
    assert "on 2 threads of CPU" in note and "batches of 64" in note and "other work" not in note
    assert lines[-2:] == ["export: RUN/export", "report: RUN/report.html"]


def test_a_busy_machine_is_named():
    made = table(*answers())
    busy = replace(made.rows[1], speed=speed(90, 5.0) | {"spread": 0.5})
    assert "differed by up to 50%: other work" in replace(made, rows=(made.rows[0], busy, made.rows[2])).note()


def test_a_file_that_is_larger_and_slower():
    made = table(*answers())
    worse = replace(made.best, bytes=181_800_000, speed=speed(10, 12.0))
    assert replace(made, rows=(*made.rows[:2], worse)).headline().startswith(
        "2.0x larger, 1.2x slower at batch 1, keeps "
    )  # fmt: skip
    same = replace(made.best, bytes=90_000_000, speed=speed(10, 9.7))
    assert replace(made, rows=(*made.rows[:2], same)).headline().startswith(
        "as large as the teacher, as fast at batch 1, keeps "
    )  # fmt: skip


def test_regressions():
    labels_N = np.random.default_rng(0).uniform(0, 5, N).astype(np.float32)
    rng = np.random.default_rng(1)
    teacher = labels_N[:, None] + rng.normal(0, 0.4, (N, 1))
    logits = {"teacher": teacher, "student": teacher + rng.normal(0, 0.4, (N, 1))}
    made = table(labels_N, logits, "pearson_spearman", regression=True)
    low, high = made.best.score_interval_95
    assert low < made.best.score < high < 1
    assert made.cells()[2][3] == f"{made.best.score:.3f} ({low:.3f} to {high:.3f})"
    assert made.cells()[2][4] == f"{np.corrcoef(logits['teacher'][:, 0], logits['student'][:, 0])[0, 1]:.3f}"
    assert "of the teacher's Pearson/Spearman mean (dev + test)" in made.headline()
    assert "correlation with the teacher's predictions" in made.note() and "the bootstrap's 95% interval" in made.note()


@pytest.mark.parametrize(
    ("labels", "teacher", "student", "said"),
    [
        ([0, 1], [1, 0], [0, 1], "the teacher scores -1.000 on dev + test, and it 1.000"),
        ([0, 1], [0, 1], [1, 0], "the teacher scores 1.000 on dev + test, and it -1.000"),
        ([0, 0], [0, 0], [0, 0], "MCC is undefined on dev + test"),
    ],
)
def test_a_share_of_nothing_cannot_be_told(labels, teacher, student, said):
    """A teacher without a score above 0, a student below 0, or labels of one class."""
    labels_N = np.tile(labels, N // 2)
    logits = {
        name: np.tile(np.eye(2)[says], (N // 2, 1)) for name, says in (("teacher", teacher), ("student", student))
    }
    made = table(labels_N, logits, "mcc")
    assert made.best.kept is None and made.best.kept_interval_95 is None
    assert made.headline().endswith(f"what it keeps of the teacher's MCC cannot be told: {said}")
    assert ("undefined" in made.cells()[0]) == ("undefined" in said)
    assert len(list(tradeoffs(made))) == (0 if "undefined" in said else 2)


def test_exports_of_earlier_versions_have_a_table():
    """0.1.0 stored neither intervals of the files nor the teacher's speed in the same session."""
    size = {"parameters": 4000, "modelSize": 90.9, "reasoningTime": 50.0}
    dev = {"n": 200, "teacher": figures(0.8, False), "student": figures(0.76, False), "agreement": 0.9}
    results = combine("t", dev, {"teacher": size, "student": size | {"parameters": 2000, "modelSize": 69.6}}, {})
    file = {"bytes": 69_600_000, "main_metric": 0.76, "agreement": 1.0, "largest_difference": 1e-7}
    file |= {"latency_ms_p50": 5.0, "latency_ms_p99": 9.0, "reasoningTime": 90.0}
    files = {"onnx/model.int8.onnx": file | {"bytes": 19_200_000}, "model.safetensors": file}
    old = {"files_on_dev": files, "measured_on": {"processor": "CPU", "cores": 2}}
    made = deployment_of(old, results, "accuracy")
    assert [row.title for row in made.rows] == ["teacher, PyTorch", "student, PyTorch", "student, ONNX int8"]
    assert made.headline() == "4.7x smaller, keeps 95.0% of the teacher's accuracy (dev)"
    assert made.cells()[0][3:] == ("80.0% (78.0 to 82.0)", "–", "–", "–", "–")
    assert made.cells()[1][4] == "90.0%" and made.cells()[2][4:] == ("–", "5.00", "9.00", "90")
    assert "deploy" in closing_table(made, Path("e"), Path("r"))
    timed = deployment_of(old | {"teacher": speed(50, 10.0)}, results, "accuracy")
    assert timed.headline().startswith("4.7x smaller, 2.0x faster at batch 1, keeps 95.0%")
    assert [len(plot.svg) > 0 for plot in tradeoffs(timed)] == [True, True]
    only = deployment_of(old | {"files_on_dev": {"model.safetensors": file}}, results, "accuracy")
    assert only.headline() == "1.3x smaller, keeps 95.0% of the teacher's accuracy (dev)"
    assert closing_table(only, Path("e"), Path("r")).startswith("deploy e/model.safetensors: ")


def test_no_flag_covers_another_or_a_pole():
    rng = np.random.default_rng(0)
    for _ in range(200):
        x_F = np.sort(rng.uniform(0, 3, rng.integers(1, 7)).round(1))
        widths = rng.uniform(0.3, 2, len(x_F))
        lines = raised(x_F, widths)
        for i in range(len(x_F)):
            for j in range(i + 1, len(x_F)):
                if x_F[j] < x_F[i] + widths[i]:  # the pole of j ends, and its flag lies, below the flag of i
                    assert lines[j] < lines[i]
    assert raised(np.array([0.0, 1.0, 1.0]), [0.9, 1.0, 1.0]) == [0, 1, 0]
