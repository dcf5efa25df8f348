"""Texts with several classes by the real command line: train on two ranks, export, and answer alike everywhere."""

import csv
import json
import os
import shutil
import signal

import numpy as np
import pytest
from conftest import launch, losses, pkd, refused, results, sentences, started, until, whole_run, write_config
from safetensors.numpy import load_file
from sklearn import metrics as sk
from transformers import pipeline

from pkd_dist.evaluation import predictions
from pkd_dist.metric_names import MULTILABEL_METRICS
from pkd_dist.serve.model import ServedModel

TOPICS = {
    "film": {"film", "movie"}, "story": {"plot", "story"}, "actor": {"actor"}, "scene": {"scene"},
    "praise": {"lovely", "superb"}, "blame": {"boring", "dull"}, "rare": {"warm"},
}  # fmt: skip


def rows(count, seed):
    """Return (text, its topics): 7 classes of 10% to 55%, and some texts without any."""
    texts = [text for text, _ in sentences(count, seed)]
    return [(text, [name for name, own in TOPICS.items() if own & set(text.split())]) for text in texts]


def write_data(folder, labelled_test=True):
    folder.mkdir(exist_ok=True)
    for name, count, seed in (("train", 300, 1), ("dev", 120, 2), ("test", 90, 3)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            hidden = name == "test" and not labelled_test
            table.writerow(["text", "topics"][: 1 + (not hidden)])
            table.writerows([text, "|".join(topics)][: 1 + (not hidden)] for text, topics in rows(count, seed))
    return folder


def several(body, data, folder):
    settings = whole_run(body, data, folder)
    settings["task"] |= {"name": "custom", "kind": "multilabel", "text": ["text"], "label": "topics"}
    settings["teacher"]["finetune"] = {"epochs": 8, "learning_rate": 2e-3, "batch_size": 8, "dropout": 0.0}
    settings["train"] |= {"epochs": 4, "learning_rate": 2e-3}
    settings["distill"] = {"alpha": 0.5, "temperature": 2, "beta": 0}
    settings["export"]["formats"] = ["safetensors", "onnx", "onnx-int8"]
    return settings


@pytest.fixture(scope="module")
def run(body, tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    settings = several(body, write_data(folder / "data"), folder)
    done = launch("--config", write_config(settings, folder), bare=2, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", done.stdout


def test_metrics_are_those_of_scikit_learn_on_the_answers(run):
    folder, printed = run
    found, answers = results(folder), predictions.read(folder / predictions.FILE)
    for split, scores in (("dev", found), ("test", found["splits"]["test"])):
        expected = {name: topics for name, topics in rows(*{"dev": (120, 2), "test": (90, 3)}[split])}
        true = np.array([[name in topics for name in sorted(TOPICS)] for topics in expected.values()])
        assert (answers[split].labels_N == true).all() and (~true.any(axis=1)).any(), "some texts have no class"
        for side in ("teacher", "student"):
            logits = answers[split].logits[side]
            assert scores[side]["f1_micro"] == pytest.approx(sk.f1_score(true, logits > 0, average="micro"))
            assert scores[side]["f1_macro"] == pytest.approx(sk.f1_score(true, logits > 0, average="macro"))
            samples = sk.f1_score(true, logits > 0, average="samples", zero_division=1.0)
            assert scores[side]["f1_samples"] == pytest.approx(samples)
            assert scores[side]["mAP"] == pytest.approx(sk.average_precision_score(true, logits))
            assert scores[side]["subset_accuracy"] == pytest.approx(sk.accuracy_score(true, logits > 0))
            assert scores[side]["main_metric"] == scores[side]["f1_micro"]
        same = (answers[split].predicted["teacher"] == answers[split].predicted["student"]).all(axis=1).mean()
        agreement = scores["agreement"] if split == "test" else found["compression"]["agreement"]
        assert agreement == pytest.approx(same)
    assert found["teacher"]["f1_micro"] > 0.65 and found["student"]["f1_micro"] > 0.55, "they learn"
    assert "of the teacher's micro F1 (dev + test)" in printed


def test_thresholds_are_in_config_manifest_and_results(run):
    folder, printed = run
    thresholds = results(folder)["multilabel"]["thresholds"]
    config = json.loads((folder / "export/config.json").read_text())
    assert config["problem_type"] == "multi_label_classification" and list(config["id2label"].values()) == sorted(
        TOPICS
    )
    assert config["thresholds_in_bias"] == thresholds["student"] != dict.fromkeys(TOPICS, 0.5)
    assert json.loads((folder / "export/manifest.json").read_text())["thresholds"] == thresholds["student"]
    assert "thresholds of the student, chosen on dev: actor " in printed
    teacher = json.loads((folder / "teacher/config.json").read_text())
    assert teacher["problem_type"] == "multi_label_classification" and not teacher.get("thresholds_in_bias")


def test_every_tool_gives_the_same_classes(run, tmp_path):
    folder, _ = run
    export, answers = folder / "export", predictions.read(folder / predictions.FILE)["test"]
    names, texts = sorted(TOPICS), [text for text, _ in rows(90, 3)]
    wanted = [[names[i] for i in np.flatnonzero(row)] for row in answers.predicted["student"]]
    classify = pipeline("text-classification", str(export), top_k=None)
    plain = [{each["label"]: each["score"] for each in answer} for answer in classify(texts)]
    assert [[name for name in names if answer[name] > 0.5] for answer in plain] == wanted
    table = tmp_path / "texts.csv"
    table.write_text("\n".join(["text", *texts]) + "\n")
    said = pkd("predict", "--model", export, "--file", table)
    assert said.returncode == 0, said.stderr
    predicted = [json.loads(line) for line in said.stdout.splitlines()]
    assert [answer["labels"] for answer in predicted] == wanted
    assert [list(answer["scores"].values()) for answer in predicted] == [
        pytest.approx(row, abs=2e-4) for row in answers.probabilities["student"].tolist()
    ]
    served = ServedModel(export, "onnx", 1).answer([(text,) for text in texts])
    assert [answer["labels"] for answer in served] == wanted
    int8 = ServedModel(export, threads=1).answer([(text,) for text in texts])
    assert np.mean([answer["labels"] == sure for answer, sure in zip(int8, wanted, strict=True)]) > 0.8


def test_pkd_evaluate_finds_the_scores_of_the_run(run):
    folder, _ = run
    done = pkd(
        "evaluate", "--model", folder / "export", "--task", "custom", "--kind", "multilabel", "--text", "text",
        "--label", "topics", "--data", folder.parent / "data", "--split", "test",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout), results(folder)["splits"]["test"]["student"]
    assert {name: found[name] for name in MULTILABEL_METRICS} == pytest.approx(
        {name: expected[name] for name in MULTILABEL_METRICS}, abs=1e-6
    )


def test_report_and_card_have_a_table_of_classes(run):
    folder, _ = run
    page, card = (folder / "report.html").read_text(), (folder / "export/README.md").read_text()
    row = next(row for row in results(folder)["multilabel"]["splits"]["test"] if row["name"] == "rare")
    assert "Confusion" not in page and "on which the thresholds were chosen" in page and "held out" in page
    for text in (page, card):
        assert f"{row['f1']['student']:.3f}" in text and f"{row['recall']['teacher']:.3f}" in text
    assert "`thresholds_in_bias`" in card and "| `rare` | " in card
    assert "both give exactly the same classes to " in card
    again = launch("--config", folder.parent / "run.yaml")
    assert again.returncode == 0 and all(
        f"{stage}: done\n" in again.stdout for stage in ("data", "teacher", "distill", "evaluate", "export", "report")
    )


def test_a_given_teacher_and_one_column_for_each_class(run, body, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name, count, seed in (("train", 120, 1), ("dev", 60, 2)):
        with (data / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["text", *TOPICS])
            table.writerows([text, *(int(name in topics) for name in TOPICS)] for text, topics in rows(count, seed))
    (data / "test.csv").write_text("\n".join(["text", *(text for text, _ in rows(5, 3))]) + "\n")
    (tmp_path / "more.txt").write_text("\n".join(text for text, _ in rows(60, 9)) + "\n")
    settings = several(body, data, tmp_path)
    settings["task"] |= {"label": list(TOPICS), "metric": "map", "unlabeled": [str(tmp_path / "more.txt")]}
    settings["teacher"] = {"model": str(run[0] / "teacher")}
    settings["train"]["epochs"] = 2
    del settings["distill"]["beta"]
    settings["evaluate"]["best_by"] = "divergence"
    settings["export"]["formats"] = ["safetensors"]
    done = launch("--config", write_config(settings, tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found, answers = results(tmp_path / "run"), predictions.read(tmp_path / "run" / predictions.FILE)
    assert found["main_metric"] == found["mAP"] and set(found["multilabel"]["thresholds"]["student"]) == set(TOPICS)
    assert [row["name"] for row in found["multilabel"]["splits"]["dev"]] == sorted(TOPICS), "the order of the teacher"
    lines = (tmp_path / "run/predictions/student/test.tsv").read_text().splitlines()
    given = [[sorted(TOPICS)[i] for i in np.flatnonzero(row)] for row in answers["test"].predicted["student"]]
    assert lines == ["index\tprediction", *(f"{i}\t{'|'.join(topics)}" for i, topics in enumerate(given))]
    shifted = [f"teacher.model={run[0] / 'export'}", "student.layers=[1]", f"run.dir={tmp_path / 'second'}"]
    done = launch("--config", tmp_path / "run.yaml", "--stages", "data", *shifted)
    assert (
        done.returncode == 0
        and "/export contain thresholds (thresholds_in_bias in its config" in done.stdout + done.stderr
    )
    assert "contain thresholds" not in (tmp_path / "run/logs/rank-0.log").read_text()


def test_a_student_of_the_answers_equals_that_of_the_cache(run, body, tmp_path):
    """On two ranks, from logits; the answers to dev and test are those without thresholds."""
    folder, _ = run
    settings = several(body, folder.parent / "data", tmp_path)
    for name, more in (("logits", ()), ("probabilities", ("--probabilities",))):
        made = pkd("answers", folder, "--output", tmp_path / f"{name}.csv", *more)
        assert made.returncode == 0 and f"510 answers, {', '.join(sorted(TOPICS))}; use: " in made.stdout, made.stderr
    settings["teacher"] = {"answers": str(tmp_path / "logits.csv"), "answers_are": "logits"}
    settings["student"] = {"init": str(folder / "student_init")}
    settings["export"]["formats"] = ["safetensors"]
    config = write_config(settings, tmp_path)
    done = launch("--config", config, bare=2)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "run/export" / name).read_bytes() == (folder / "export" / name).read_bytes(), name
    found, expected = results(tmp_path / "run"), results(folder)
    assert found["multilabel"]["thresholds"]["teacher"] == pytest.approx(
        expected["multilabel"]["thresholds"]["teacher"]
    )
    for name in MULTILABEL_METRICS:
        assert found["teacher"][name] == pytest.approx(expected["teacher"][name], abs=1e-3)
    assert "student of a teacher's answers" in (tmp_path / "run/report.html").read_text()
    given = [f"teacher.answers={tmp_path / 'probabilities.csv'}", "teacher.answers_are=probabilities"]
    done = launch("--config", config, *given, f"run.dir={tmp_path / 'other'}", "--stages", "data")
    assert done.returncode == 0, done.stderr
    logits = [load_file(tmp_path / run / "data/answers.safetensors") for run in ("run", "other")]
    for split in ("train", "dev", "test"):
        np.testing.assert_allclose(logits[0][split], logits[1][split], atol=1e-4)


def test_a_killed_run_ends_with_the_same_losses_and_weights(run, body, tmp_path):
    folder, _ = run
    config = write_config(several(body, folder.parent / "data", tmp_path), tmp_path)
    until_distill = ("--config", config, "--stages", "data,teacher,cache,init,distill")
    shutil.copytree(folder, tmp_path / "run")
    for path in (tmp_path / "run").glob("stages/*.json"):
        if path.stem in ("distill", "evaluate", "export", "report"):
            path.unlink()
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run/metrics.jsonl").unlink()
    with started(*until_distill, ranks=2) as job:
        until("checkpoints/step-*/commit.json", tmp_path / "run", job)
        os.kill(job[1].pid, signal.SIGKILL)
        for process in job:
            process.wait()
    done = launch(*until_distill, bare=2)
    assert done.returncode == 0 and "distill: resumes" in done.stdout, done.stdout + done.stderr
    assert losses(tmp_path / "run") == losses(folder)
    kept = [json.loads((run / "stages/distill.json").read_text())["outputs"] for run in (tmp_path / "run", folder)]
    assert kept[0]["weights"] == kept[1]["weights"] and kept[0]["history"] == kept[1]["history"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"positive": "film"}}, "task.positive cannot be used with task.kind multilabel"),
        ({"evaluate": {"calibrate": True}}, "evaluate.calibrate cannot be used with task.kind multilabel"),
        (
            {"teacher": {"model": None, "finetune": None, "answers": ["x.csv"], "answers_are": "log_probabilities"}},
            "teacher.answers_are log_probabilities cannot be used with task.kind multilabel",
        ),
        ({"teacher": {"model": "SINGLE", "finetune": None}}, "is no multi-label classifier (problem_type "),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(body, teacher, tmp_path, changes, message):
    settings = several(body, write_data(tmp_path / "data"), tmp_path)
    for section, own in changes.items():
        settings[section] |= {key: str(teacher) if value == "SINGLE" else value for key, value in own.items()}
    for bare in (0, 2):
        assert message in refused("--config", write_config(settings, tmp_path), bare=bare)
        assert not (tmp_path / "run").exists()


def test_a_teacher_of_several_classes_cannot_teach_one(run, data, tmp_path):
    settings = whole_run("unused", data, tmp_path)
    settings["teacher"] = {"model": str(run[0] / "teacher")}
    line = refused("--config", write_config(settings, tmp_path))
    assert (
        "is a multi-label classifier: a text can have several of its classes" in line
        and "(with task.kind multilabel: several)" in line
    )
    assert not (tmp_path / "run").exists()


def test_a_cascade_refuses_the_run(run):
    done = pkd("cascade", run[0])
    assert done.returncode == 2 and "is a multilabel task" in done.stderr and done.stderr.count("\n") == 1
