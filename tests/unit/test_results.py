"""results_eval.json and the model card."""

from dataclasses import asdict

import numpy as np
import pytest
from run_folders import measured, speed

from pkd_dist.config.load import load
from pkd_dist.data.class_mapping import match
from pkd_dist.data.prepare import TokenSetSummary
from pkd_dist.data.tasks import Task
from pkd_dist.environment import Environment
from pkd_dist.evaluation.results import combine, retention_sentence, score_rows
from pkd_dist.export.card import CardFacts, render


def side(score, **figures):
    classification = {"accuracy": score, "MCC": 0.5, "precision": 0.6, "recall": 0.6, "f_1": 0.6, "main_metric": score}
    return classification | {"accuracy_interval_95": [score - 0.1, score + 0.1]} | figures


def size_and_speed(factor):
    figures = {"parameters": 1_000_000 * factor, "modelSize": 4.0 * factor}
    return figures | {"latency_ms_p50": 2.0, "latency_ms_p99": 3.0, "reasoningTime": 400 / factor}


@pytest.fixture
def results():
    dev = {"n": 50, "teacher": side(0.8), "student": side(0.6), "agreement": 0.9}
    test = {"n": 70, "teacher": side(0.7), "student": side(0.5), "agreement": 0.8}
    return combine("sst2", dev, {"teacher": size_and_speed(4), "student": size_and_speed(2)}, {"test": test})


def test_the_keys_of_the_results_and_their_order(results):
    assert list(results) == [
        "task", "split", "n", "accuracy", "MCC", "precision", "recall", "f_1", "main_metric", "modelSize", "reasoningTime",
        "teacher", "student", "compression", "splits",
    ]  # fmt: skip
    assert results["compression"] == {
        "parameters": 2.0, "size": 2.0, "throughput": 2.0, "retention": pytest.approx(0.75), "agreement": 0.9,
    }  # fmt: skip
    assert results["student"] == side(0.6) | size_and_speed(2) and results["splits"]["test"]["n"] == 70


@pytest.mark.parametrize(
    ("teacher", "student", "said"),
    [
        (side(0.0), side(0.0), "the teacher scores 0.000, so there is no score for the student to retain"),
        (side(-0.1), side(0.6), "the teacher scores -0.100, so there is no score for the student to retain"),
        (side(0.5, undefined=["MCC", "main_metric"]), side(0.5), "the main metric is undefined on these dev examples"),
    ],
)
def test_a_share_of_nothing_is_not_told(teacher, student, said):
    dev = {"n": 50, "teacher": teacher, "student": student, "agreement": 0.9}
    made = combine("sst2", dev, {"teacher": size_and_speed(4), "student": size_and_speed(2)}, {})
    assert made["compression"]["retention"] is None
    assert said in retention_sentence(made)
    assert ("undefined" in score_rows(made)[1]) == ("undefined" in teacher)


def test_the_model_card(results, tmp_path):
    def summary(source, examples):
        return TokenSetSummary(source, examples, examples, "d", "i", 900, 30, 0, [])

    environment = Environment(
        versions={"pkd_dist": "9", "torch": "2"}, git_revision=None, world_size=2, launcher="torchrun", device="cpu",
        precision="float32", teacher_precision="bfloat16", deepspeed={}, teacher_layers=4, student_layers=2,
        copied_layers=[1, 3], patience_pairs=[[1, 2]], beta_mean=100.0, beta_sum=0.5,
    )  # fmt: skip
    facts = CardFacts(
        config=load(None, ["run.dir=unused", f"teacher.model={tmp_path}"]), results=results, environment=environment, main_metric="f_1",
        task=Task("t", ("a",), "b"), classes=match(Task("t", ("a",), "b"), ("no", "[yes](x)"), [9, 1], ("LABEL_0", "LABEL_1")),
        train=summary(f"{tmp_path}/train.tsv + {tmp_path}/more.csv", 60), dev=summary(f"{tmp_path}/dev.tsv", 50),
        best_epoch=3, initialized_from="teacher layers [1, 3] (from 0)", max_length=128,
    )  # fmt: skip
    file = {
        "bytes": 4e6,
        "main_metric": 0.6,
        "largest_difference": 1e-6,
        "agreement": 1.0,
        "batch_effect": 2e-4,
        **size_and_speed(2),
    }
    files = {"model.safetensors": file, "onnx/model.int8.onnx": file | {"quantisation": "per token"}}
    on = {"processor": "CPU", "cores": 2, "threads": 1}
    formats = ["safetensors", "onnx-int8"]
    labels_N = np.arange(50) % 2
    logits = {"teacher": np.eye(2)[labels_N], "student": np.eye(2)[np.where(np.arange(50) < 5, 0, labels_N)]}
    table = measured(labels_N, logits)
    figures = {"formats": formats, "opset": 20, "files_on_dev": files, "measured_on": on, "deployment": asdict(table)}
    text = render(facts, figures)
    for line in (
        "# sst2: a 2-layer student",
        "Classes, in the order of the logits: `no`, `[yes](x)`.",
        "| `LABEL_1` | `[yes](x)` | `[yes](x)` |",
        "those of the class `[yes](x)` (the rarer one in training; set task.positive to choose).",
        "| accuracy | 80.0% (70.0 to 90.0) | 60.0% (50.0 to 70.0) |",
        "| `onnx/model.int8.onnx` | 4.0 | 0.6000 | 1.0e-06 | 2.0e-04 | 1.0000 |\n",
        f"`onnx/model.int8.onnx`, the file to deploy: {table.headline()}.",
        *(f"| {' | '.join(row)} |\n" for row in (table.head(), *table.cells())),
        "on 1 thread of a processor",
        "was the best by\n  F1 on `dev.tsv`",
        "- Data: `train.tsv + more.csv`, 60 examples.",
        f"Distilled from `{tmp_path.name}` with",
        "the student retains 75.0% of the teacher's score",
        "counted from 1): (1, 2).",
        "Quantization to int8: per token.",
    ):
        assert line in text, line
    assert str(tmp_path.parent) not in text, "folders of this machine mean nothing elsewhere"
    assert text.count("per second)") == 1, "one session"
    old = {"formats": formats[:1], "opset": 20, "files_on_dev": {"model.safetensors": file}, "measured_on": on}
    text = render(facts, old | {"teacher": speed(50, 9.5)})
    assert "ONNX" not in text
    assert "| teacher, PyTorch | 4,000,000 | 16.0 | 0.800 | – | 9.50 | 19.00 | 50 |" in text
    assert "`model.safetensors`, the file to deploy: 4.0x smaller, 4.8x faster at batch 1, keeps 75.0%" in text
