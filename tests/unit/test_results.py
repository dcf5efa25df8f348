"""results_eval.json, the table a run ends with, and the model card."""

from pathlib import Path

import pytest

from pkd_dist.config.load import load
from pkd_dist.data.prepare import TokenSetSummary
from pkd_dist.environment import Environment
from pkd_dist.evaluation.results import closing_table, combine, table_rows
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


def test_a_teacher_that_learned_nothing_retains_nothing():
    dev = {"n": 50, "teacher": side(0.0), "student": side(0.6), "agreement": 0.9}
    made = combine("sst2", dev, {"teacher": size_and_speed(4), "student": size_and_speed(2)}, {})
    assert made["compression"]["retention"] == 0.0


def test_the_closing_table(results):
    lines = closing_table(results, Path("RUN/export"), Path("RUN/report.html")).splitlines()
    assert lines[2].split() == ["accuracy", "80.0%", "(70.0", "to", "90.0)", "60.0%", "(50.0", "to", "70.0)"]
    assert (
        "the student retains 75.0% of the teacher's score; both predict the same class for 90.0% of the examples "
        "(50 dev examples)" in lines
    )
    assert lines[-2:] == ["export: RUN/export", "report: RUN/report.html"]
    assert ("parameters", "4,000,000", "2,000,000") in table_rows(results)


def test_the_model_card(results):
    def summary(source, examples):
        return TokenSetSummary(source, examples, examples, "d", "i", 900, 30, 0, [])

    environment = Environment(
        versions={"pkd_dist": "9", "torch": "2"}, git_revision=None, world_size=2, launcher="torchrun", device="cpu",
        precision="float32", teacher_precision="bfloat16", deepspeed={}, teacher_layers=4, student_layers=2,
        patience_pairs=[[1, 2]], beta_mean=100.0, beta_sum=0.5,
    )  # fmt: skip
    facts = CardFacts(
        config=load(None, ["run.dir=unused", "teacher.model=MINE"]), results=results, environment=environment,
        main_metric="f_1", class_names=["no", "yes"], train=summary("train.tsv", 60), dev=summary("dev.tsv", 50),
        best_epoch=3, initialized_from="teacher layers [1, 3] (from 0)",
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
    text = render(facts, {"formats": formats, "opset": 20, "files_on_dev": files, "measured_on": on})
    for line in (
        "# sst2: a 2-layer student",
        "Classes, in the order of the logits: no, yes.",
        "| accuracy | 80.0% (70.0 to 90.0) | 60.0% (50.0 to 70.0) |",
        "| `onnx/model.int8.onnx` | 4.0 | 0.6000 | 1.0e-06 | 2.0e-04 | 1.0000 | 2.00 | 3.00 | 200 |",
        "by F1 on `dev.tsv`",
        "counted from 1): (1, 2).",
        "Quantisation to int8: per token.",
    ):
        assert line in text
    assert "ONNX" not in render(
        facts, {"formats": formats[:1], "opset": 20, "files_on_dev": {"model.safetensors": file}, "measured_on": on}
    )
