"""Texts without labels and a given teacher, by the real command line."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from conftest import launch, pkd, refused, results, sentences, whole_run, write_config
from typer.testing import CliRunner

from pkd_dist.cli.main import app
from pkd_dist.evaluation import predictions
from pkd_dist.export import manifest


def unlabelled(taught, folder, count=300, columns=("text",)):
    """Settings of a run on one file of texts."""
    with (folder / "texts.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows([text, label][: len(columns)] for text, label in sentences(count, 9))
    settings = whole_run("unused", folder / "texts.csv", folder)
    settings["task"] |= {"name": "custom", "text": ["text"], "label": None}
    settings["teacher"] = {"model": str(taught)}
    settings["train"]["epochs"] = 3
    return settings


@pytest.fixture(scope="module")
def run(taught, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlabelled")
    done = launch("--config", write_config(unlabelled(taught, folder), folder), bare=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", done.stdout


def test_every_score_is_an_agreement(run):
    folder, printed = run
    found, answers = results(folder), predictions.read(folder / "answers.safetensors")
    for split, scores in (("dev", found), ("test", found["splits"]["test"])):
        own, teacher = (answers[split].logits[side].argmax(axis=1) for side in ("student", "teacher"))
        assert scores["student"]["agreement"] == scores["student"]["main_metric"] == (own == teacher).mean()
        assert scores["teacher"]["agreement"] == 1 and (answers[split].labels_N == teacher).all()
        low, high = scores["student"]["agreement_interval_95"]
        assert low <= scores["student"]["agreement"] <= high
    assert "gives the teacher's answer to " in printed and "deploy " in printed
    history = json.loads((folder / "stages/distill.json").read_text())["outputs"]["history"]
    assert all(each["main_metric"] == each["agreement"] for each in history)
    best = max(history, key=lambda each: each["agreement"])
    assert json.loads((folder / "stages/distill.json").read_text())["outputs"]["best_metric"] == best["agreement"]
    losses = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert "loss_ds" in losses[0] and not losses[0].get("loss_ce")


def test_nothing_that_people_read_calls_it_an_accuracy(run):
    folder, printed = run
    places = {"output": printed} | {
        name: (folder / name).read_text() for name in ("report.html", "export/README.md", "results_eval.json")
    }
    for name, text in places.items():
        assert "accuracy" not in text.lower() and "F1" not in text, name
    assert "no text has a label" in places["report.html"] and "no text has a label" in places["export/README.md"]
    assert manifest.verify(folder / "export")["main_metric"] == "agreement"


def test_the_classes_are_the_teachers(run, taught):
    config = json.loads((run[0] / "export/config.json").read_text())
    assert (
        config["id2label"]
        == json.loads((taught / "config.json").read_text())["id2label"]
        == {"0": "negative", "1": "positive"}
    )
    called = CliRunner().invoke(app, ["predict", "--model", str(run[0] / "export"), "--", "a good film"])
    assert json.loads(called.stdout)["label"] in ("negative", "positive")


def test_a_cascade_of_it_has_no_accuracy(run, tmp_path):
    done = pkd("cascade", run[0], "--agreement", "0.5", "--output", tmp_path / "cascade.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"agreement": {' in (tmp_path / "cascade.json").read_text()
    assert '"accuracy": {' not in (tmp_path / "cascade.json").read_text()


def test_answers_without_labels(run, body, taught, tmp_path):
    made = pkd("answers", run[0], "--output", tmp_path / "answers.csv")
    assert made.returncode == 0 and "300 answers" in made.stdout, made.stderr
    settings = unlabelled(taught, tmp_path)
    settings["teacher"] = {"answers": str(tmp_path / "answers.csv"), "answers_are": "logits"}
    settings["student"] = {"init": str(run[0] / "student_init")}
    settings["task"]["class_names"] = {"negative": "negative", "positive": "positive"}
    done = launch("--config", write_config(settings, tmp_path))
    assert done.returncode == 0 and "gives the teacher's answer to " in done.stdout, done.stderr
    np.testing.assert_allclose(
        results(tmp_path / "run")["student"]["agreement"], results(run[0])["student"]["agreement"], atol=0.1
    )


@pytest.mark.parametrize("column", [True, False], ids=["empty labels", "no column"])
def test_a_dev_set_with_labels_is_used(taught, data, tmp_path, column):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = (data / "train.tsv").read_text().splitlines()[1:]
    rows = [line.split("\t")[0] + ("\t" if column else "") for line in lines]
    (folder / "train.tsv").write_text("\n".join(["sentence\tlabel" if column else "sentence", *rows]) + "\n")
    (folder / "dev.tsv").write_bytes((data / "dev.tsv").read_bytes())
    settings = whole_run("unused", folder, tmp_path)
    settings["teacher"] = {"model": str(taught)}
    config = write_config(settings, tmp_path)
    line = refused("--config", config)
    assert ("label is empty" if column else "has no column 'label'") in line
    assert line.endswith("; with distill.alpha: 1, the student learns from a given teacher alone, which needs none")
    shown = pkd("prepare", "--data", folder)
    assert shown.returncode == 0 and "  has no labels; with distill.alpha: 1, the student learns" in shown.stdout
    assert re.search(r"^train .* unlabeled$", shown.stdout, re.M) and re.search(r"^negative +\d+", shown.stdout, re.M)
    assert "distill.alpha" not in refused("--config", config, "teacher.finetune={}"), "which needs labels itself"
    done = launch("--config", config, "distill.alpha=1")
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "run")
    assert found["student"]["accuracy"] == found["student"]["main_metric"] and "agreement" not in found["student"]
    scored = pkd("evaluate", "--model", tmp_path / "run/export", "--data", folder)
    assert json.loads(scored.stdout)["accuracy"] == found["student"]["accuracy"]


def test_numbers_of_dev_alone_set_the_scale_of_a_regression(body, tmp_path):
    folder, rows = tmp_path / "data", [(f"a film of {'good ' * (i % 5)}plot {i}", i % 5) for i in range(80)]
    folder.mkdir()
    for split, part in (("train", rows[:60]), ("dev", rows[60:])):
        (folder / f"{split}.csv").write_text("text,score\n" + "".join(f"{text},{score}\n" for text, score in part))
    settings = whole_run(body, folder, tmp_path)
    settings["task"] |= {"name": "custom", "text": ["text"], "label": "score", "kind": "regression"}
    settings["teacher"]["finetune"]["epochs"] = settings["train"]["epochs"] = 6
    config = write_config(settings, tmp_path)
    assert launch("--config", config, "--stages", "data,teacher").returncode == 0
    (folder / "train.csv").write_text("text\n" + "".join(f"{text}\n" for text, _ in rows[:60]))
    shutil.copytree(tmp_path / "run/teacher", tmp_path / "given")
    given = ["teacher.finetune=null", f"teacher.model={tmp_path / 'given'}", f"run.dir={tmp_path / 'second'}"]
    done = launch("--config", config, "distill.alpha=1", *given)
    assert done.returncode == 0 and "targets are learned as (target - 2) / 1.41" in done.stdout, done.stderr
    assert results(tmp_path / "second")["compression"]["agreement"] > 0.5


def test_pkd_prepare_shows_texts_without_labels(taught, tmp_path):
    unlabelled(taught, tmp_path)
    done = pkd("prepare", "--task", "custom", "--data", tmp_path / "texts.csv", "--text", "text")
    assert done.returncode == 0 and "240" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill.alpha=0.5"], "distill.alpha 0.5 needs labels, but task.label is null; leave it out, or set it to 1"),
        (["teacher.finetune={}"], "teacher.finetune needs labels, but task.label is null"),
        (["evaluate.calibrate=true"], "evaluate.calibrate needs labels, but task.label is null; leave it out"),
        (["task.metric=f1"], "task.metric needs labels, but task.label is null; remove it"),
        (["task.class_weights=balanced"], "task.class_weights needs labels, but task.label is null; remove it"),
        (["task.kind=regression"], "task.kind regression needs labels, but task.label is null"),
        (["task.split={stratify: true}"], "task.split.stratify: needs labels, but task.label is null; remove it"),
    ],
)
def test_what_needs_labels_is_refused(taught, tmp_path, arguments, message):
    assert message in refused("--config", write_config(unlabelled(taught, tmp_path), tmp_path), *arguments)
    assert not (tmp_path / "run").exists()


def test_a_label_that_was_forgotten_is_asked_for(taught, tmp_path):
    settings = unlabelled(taught, tmp_path)
    del settings["task"]["label"]
    done = launch("--config", write_config(settings, tmp_path))
    assert done.returncode == 2 and "and task.label: column, or null where there are no labels" in done.stderr, (
        done.stderr
    )
