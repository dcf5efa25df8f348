"""A run of each family through the real launcher, and what plain transformers makes of the export."""

import json
import re

import pytest
import torch
from conftest import TO_EXPORT, launch, pkd, results, write_config
from families import FAMILIES, make_folder
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from typer.testing import CliRunner

from pkd_dist.cli.main import app

SHORT = {"epochs": 1, "learning_rate": 3e-3, "batch_size": 32}
TEXTS = ["a good film", "the plot was very dull and the story empty"]
CASES = {
    "roberta": ({"layers": [1, 3], "hidden_size": 16, "intermediate_size": 24}, "zero1"),
    "distilbert": ({"layers": [1, 3]}, "zero3"),  # on two ranks
    "electra": ({"init": "first_k", "num_layers": 2}, "zero1"),
    "albert": ({"layers": [1, 3]}, "zero1"),
    "deberta-v2": ({}, "zero1"),
    "modernbert": ({"init": "random", "num_layers": 2, "hidden_size": 16}, "zero1"),
    "bert teacher, modernbert student": ({"init": "{own}", "num_layers": 2}, "zero1"),
}


def settings(family, folder, data, student):
    teacher = family.split()[0]
    own = make_folder(folder / "own", "modernbert") if "{own}" in str(student) else ""
    return {
        "run": {"dir": str(folder / "run"), "timeout_seconds": 120},
        "task": {"name": "sst2", "data": str(data), "max_length": 32},
        "teacher": {"model": make_folder(folder / "teacher", teacher), "finetune": SHORT},
        "student": json.loads(json.dumps(student).replace("{own}", own)),
        "train": SHORT,
        "evaluate": {"latency_samples": 10},
        "export": {"formats": ["safetensors"]},
        "metrics": {"enabled": False},
    }


@pytest.mark.parametrize("case", CASES)
def test_a_whole_run(case, data, tmp_path):
    student, stage = CASES[case]
    config = settings(case, tmp_path, data, student)
    config["train"] = config["train"] | {"deepspeed": f"ds_configs/{stage}.json"}
    done = launch("--config", write_config(config, tmp_path), *TO_EXPORT, bare=2 if stage == "zero3" else 0)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "run"
    assert results(run)["n"] == 41
    plain = AutoModelForSequenceClassification.from_pretrained(run / "export").eval()
    assert plain.config.num_hidden_layers == 2 and plain.config.id2label == {0: "negative", 1: "positive"}
    best = json.loads((run / "stages/distill.json").read_text())["outputs"]["best_file"]
    trained = {k.removeprefix("model."): v for k, v in load_file(run / "checkpoints" / best).items()}
    assert all(torch.equal(value, trained[name]) for name, value in plain.state_dict().items())
    inputs = AutoTokenizer.from_pretrained(run / "export")(TEXTS, padding=True, return_tensors="pt")
    logits = plain(**inputs).logits.detach()
    found = pipeline("text-classification", str(run / "export"), top_k=None)(TEXTS)
    for row, answers in zip(logits.softmax(-1), found, strict=True):
        assert {a["label"]: a["score"] for a in answers} == pytest.approx(
            {"negative": float(row[0]), "positive": float(row[1])}, abs=1e-5
        )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("good,1\nbad,2\n", "--model: .* has 3 classes, .*dev.csv has 2 (1, 2); give a model of this task"),
        (None, "--data: no such folder: .*data; it must contain"),
    ],
)
def test_a_model_that_does_not_fit_the_split_is_refused_in_the_words_of_the_command(tmp_path, rows, message):
    model = make_folder(tmp_path / "model", "bert", classifier=True, names=("LABEL_0", "LABEL_1", "LABEL_2"))
    if rows:
        (tmp_path / "data").mkdir()
        (tmp_path / "data/dev.csv").write_text("body,stars\n" + rows)
    argv = ["evaluate", "--model", model, "--data", str(tmp_path / "data"), "--task", "custom", "--text", "body"]
    done = CliRunner().invoke(app, [*argv, "--label", "stars", "--max-length", "32"])
    assert done.exit_code == 2 and re.search(message.replace("(", r"\(").replace(")", r"\)"), done.stderr), done.stderr


def test_pkd_evaluates_a_model_that_takes_no_types(data, tmp_path):
    model = make_folder(tmp_path / "model", "modernbert", classifier=True, names=("negative", "positive"))
    done = pkd("evaluate", "--model", model, "--data", data, "--max-length", 32)
    assert done.returncode == 0 and json.loads(done.stdout)["n"] == 41, done.stderr


def test_every_family_is_run():
    assert {case.split()[-2 if case.endswith("student") else 0] for case in CASES} >= set(FAMILIES) - {"bert"}
