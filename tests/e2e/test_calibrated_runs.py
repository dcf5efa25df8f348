"""A calibrated run through the real launcher: every file of its export answers with the probabilities of one temperature."""

import json

import numpy as np
import pytest
from conftest import launch, pkd, results, sentences, write_config, write_tsv
from transformers import pipeline

from pkd_dist.evaluation import predictions
from pkd_dist.evaluation.calibration import reliability
from pkd_dist.serve.model import ServedModel


def softmax(logits):
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def with_errors(rows, every):
    """Labels of which some are wrong, so that a good student is too sure."""
    return [(text, 1 - label if i % every == 0 else label) for i, (text, label) in enumerate(rows)]


@pytest.fixture(scope="module")
def calibrated(body, tmp_path_factory):
    """A run that is finished, and calibrated afterwards on two ranks: (settings, answers and results before, the second start)."""
    folder = tmp_path_factory.mktemp("calibrated")
    data = folder / "data"
    write_tsv(data / "train.tsv", sentences(203, 1))
    write_tsv(data / "dev.tsv", with_errors(sentences(120, 2), 5))
    write_tsv(data / "test.tsv", with_errors(sentences(90, 3), 5))
    settings = {
        "run": {"dir": str(folder / "run")},
        "task": {"name": "sst2", "data": str(data), "max_length": 32},
        "teacher": {"model": str(body), "finetune": {"epochs": 2, "learning_rate": 3e-3, "batch_size": 16}},
        "student": {"layers": [1, 3]},
        "train": {"epochs": 2, "batch_size": 16, "learning_rate": 3e-3},
        "evaluate": {"latency_samples": 10},
        "export": {"formats": ["safetensors", "onnx", "onnx-int8"]},
        "metrics": {"enabled": False},
    }
    done = launch("--config", write_config(settings, folder))
    assert done.returncode == 0, done.stdout + done.stderr
    run = folder / "run"
    before = predictions.read(run / predictions.FILE), results(run)
    plain = (run / "export/manifest.json").read_text(), (run / "export/README.md").read_text()
    assert "calibration" not in before[1] and "temperature" not in json.loads(plain[0]) and "ECE" not in plain[1]
    settings["evaluate"]["calibrate"] = True
    done = launch("--config", write_config(settings, folder), bare=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, before, done


def test_only_what_the_setting_changes_runs_again(calibrated):
    folder, _, done = calibrated
    for stage in ("data", "teacher", "cache", "init", "distill"):
        assert f"{stage}: done\n" in done.stdout
    assert "evaluate: runs again, because evaluate.calibrate changed (False -> True)" in done.stdout
    assert "evaluate: calibration: temperature " in done.stdout and "on test (90 examples)" in done.stdout
    again = launch("--config", folder / "run.yaml")
    assert again.returncode == 0 and all(
        f"{stage}: done\n" in again.stdout for stage in ("evaluate", "export", "report")
    )


def test_answers_and_results_have_the_temperature(calibrated):
    folder, (before, earlier), _ = calibrated
    found = results(folder / "run")
    after, calibration = predictions.read(folder / "run" / predictions.FILE), found["calibration"]
    temperature = calibration["temperature"]
    assert temperature > 1.05, "it is too sure of labels that are wrong"
    assert set(calibration["splits"]) == {"dev", "test"}
    for split, answers in after.items():
        student = before[split].logits["student"]
        np.testing.assert_allclose(answers.logits["student"], student / temperature, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(answers.logits["teacher"], before[split].logits["teacher"], atol=1e-4)
        each = calibration["splits"][split]
        assert each["n"] == len(student)
        assert each["before"]["ece"] == pytest.approx(reliability(student, answers.labels_N)["ece"], abs=1e-3)
        assert each["after"]["ece"] == pytest.approx(reliability(answers.logits["student"], answers.labels_N)["ece"])
        assert each["after"]["nll"] < each["before"]["nll"] and each["after"]["ece"] < each["before"]["ece"]
    for key in ("accuracy", "MCC", "f_1", "main_metric"):
        assert found[key] == earlier[key], "no class changes"
    assert found["teacher"]["accuracy"] == earlier["teacher"]["accuracy"]


def test_every_file_answers_with_calibrated_probabilities(calibrated, tmp_path):
    folder, (before, _), _ = calibrated
    export = folder / "run/export"
    temperature = results(folder / "run")["calibration"]["temperature"]
    rows = (folder / "data/test.tsv").read_text().splitlines()[1:]
    texts = [row.split("\t")[0] for row in rows]
    wanted = softmax(before["test"].logits["student"] / temperature)
    classify = pipeline("text-classification", str(export), top_k=None)
    names = classify.model.config.id2label
    plain = [{each["label"]: each["score"] for each in answer} for answer in classify(texts)]
    assert [[answer[names[i]] for i in range(2)] for answer in plain] == [
        pytest.approx(x, abs=2e-4) for x in wanted.tolist()
    ]
    for kind, tolerance in (("onnx", 2e-4), ("onnx-int8", 0.1)):
        served = ServedModel(export, kind).answer([(text,) for text in texts])
        assert [list(answer["probabilities"].values()) for answer in served] == [
            pytest.approx(x, abs=tolerance) for x in wanted.tolist()
        ]
    said = pkd("predict", "--model", export, *texts[:4])
    assert said.returncode == 0, said.stderr
    found = [json.loads(line)["probabilities"] for line in said.stdout.splitlines()]
    assert [list(each.values()) for each in found] == [pytest.approx(x, abs=2e-4) for x in wanted[:4].tolist()]


def test_manifest_card_and_report_say_so(calibrated):
    folder, _, _ = calibrated
    run = folder / "run"
    calibration = results(run)["calibration"]
    manifest = json.loads((run / "export/manifest.json").read_text())
    assert manifest["temperature"] == calibration["temperature"]
    ece = {name: file["ece"] for name, file in manifest["files_on_dev"].items()}
    assert set(ece) == {"model.safetensors", "onnx/model.onnx", "onnx/model.int8.onnx"}
    dev = calibration["splits"]["dev"]["after"]["ece"]
    assert ece["model.safetensors"] == pytest.approx(dev, abs=1e-3) and max(ece.values()) < 0.2
    assert "temperature" not in json.loads((run / "export/config.json").read_text()), "nobody is to apply it again"
    card, page = (run / "export/README.md").read_text(), (run / "report.html").read_text()
    assert f"a temperature of {calibration['temperature']:.4g}, fitted on dev" in card
    assert f"| dev, in-sample | 120 | {calibration['splits']['dev']['before']['ece']:.4f} | {dev:.4f} |" in card
    assert "| test, held out | 90 | " in card and "| agreement | ECE |" in card
    assert "Reliability on dev" in page and "Reliability on test" in page and "test, held out" in page
    verified = pkd("export", "verify", run / "export")
    assert verified.returncode == 0, verified.stderr


def test_the_cascade_of_a_run(calibrated, tmp_path):
    folder, _, _ = calibrated
    done = pkd("cascade", folder / "run", "--agreement", "0.9", "--output", tmp_path / "cascade.json")
    assert done.returncode == 0 and not done.stderr, done.stderr
    written = json.loads((tmp_path / "cascade.json").read_text())
    answers = predictions.read(folder / "run" / predictions.FILE)["test"]
    alone = softmax(answers.logits["student"]).max(axis=1) >= written["threshold"]
    assert written["splits"]["test"]["answered"]["value"] == pytest.approx(alone.mean())
    same = answers.predicted["student"] == answers.predicted["teacher"]
    assert written["splits"]["test"]["agreement"]["value"] == pytest.approx(same[alone].mean())
    assert written["temperature"] == results(folder / "run")["calibration"]["temperature"]
    assert written["cost"]["student"] == "onnx/model.int8.onnx" and "of test alone (held out)" in done.stdout
    unreached = pkd("cascade", folder / "run", "--agreement", "0.9999")
    assert (
        unreached.returncode == 2 and unreached.stderr.count("\n") == 1 and "is not reached on dev" in unreached.stderr
    )


def test_a_regression_is_refused(settings, tmp_path):
    settings["task"] |= {"name": "stsb"}
    done = launch("--config", write_config(settings, tmp_path), "evaluate.calibrate=true")
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr == (
        "pkd: evaluate.calibrate: calibrates class probabilities, which a regression does not have; set it to false\n"
    )
