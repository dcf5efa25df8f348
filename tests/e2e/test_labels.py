"""What a model's outputs mean: unnamed and renamed classes, the positive class, and the unit of a regression."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import TO_EXPORT, launch, losses, pkd, results, sentences, write_config
from safetensors.torch import load_file
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from benchmarks.faults.tiny import GOOD
from pkd_dist.evaluation.inputs import Example
from pkd_dist.evaluation.predict import Predictor
from pkd_dist.model.encoder import load_model, load_tokenizer, save_model
from pkd_dist.telemetry.records import read

LETTERS = "abcdefghijkl"


def put(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def given_teacher(body, folder, texts, classes, names):
    """Write a classifier that is right about these texts: its head is fitted to the body's features."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model, tokenizer = load_model(str(body), new_head=True, **labels), load_tokenizer(str(body))
    with torch.no_grad():
        features = model.bert(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
        one_hot = torch.nn.functional.one_hot(torch.tensor(classes), len(names)).float()
        padded = torch.cat([features, torch.ones(len(texts), 1)], dim=1)
        fitted = torch.linalg.lstsq(padded.double(), 10 * one_hot.double(), driver="gelsd").solution.float()
        model.classifier.weight.copy_(fitted[:-1].T)
        model.classifier.bias.copy_(fitted[-1])
    save_model(model, tokenizer, folder)
    return str(folder)


def trained(settings, tmp_path, *arguments, **task):
    settings["task"] = {"max_length": 32, "name": "custom", "text": ["text"], "label": "label", **task}
    done = launch("--config", write_config(settings, tmp_path), *TO_EXPORT, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_unnamed_outputs_are_matched_by_number(settings, body, tmp_path):
    texts = [f"film {letter} plot" for letter in LETTERS]
    rows = [{"text": text, "label": f"LABEL_{i}"} for i, text in enumerate(texts)]
    data = put(tmp_path / "data", train=rows[::-1] * 3, dev=rows)
    names = [f"LABEL_{i}" for i in range(12)]
    settings["teacher"] = {"model": given_teacher(body, tmp_path / "twelve", texts, list(range(12)), names)}
    settings["train"]["epochs"] = 1
    done = trained(settings, tmp_path, data=data)
    assert "their outputs" not in done.stdout and "'LABEL_9', 'LABEL_10', 'LABEL_11'" in done.stdout
    found = results(tmp_path / "run")
    assert found["teacher"]["accuracy"] == 1.0
    assert [row["label"] for row in found["classes"]] == names and found["positive"] is None
    assert json.loads((tmp_path / "run/export/config.json").read_text())["id2label"]["10"] == "LABEL_10"


def test_names_are_mapped_and_reach_the_export(settings, body, tmp_path):
    rows = [{"text": text, "label": label} for text, label in sentences(60, 1)]
    data = put(tmp_path / "data", train=rows, dev=rows[:20])
    words = [GOOD[0], "bad"]
    settings["teacher"] = {"model": given_teacher(body, tmp_path / "signs", words, [0, 1], ("POSITIVE", "NEGATIVE"))}
    settings["train"]["epochs"] = 1
    custom = {"name": "custom", "text": ["text"], "label": "label", "data": data, "max_length": 32}
    refused = launch("--config", write_config(settings | {"task": custom}, tmp_path))
    assert refused.returncode == 2 and "task.class_names maps labels to its classes" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    done = trained(settings, tmp_path, "task.class_names={0: negative, 1: positive}", data=data)
    line = "'POSITIVE' = '1' = 'positive', 'NEGATIVE' = '0' = 'negative'"
    assert line in done.stdout
    assert "| `POSITIVE` | `1` | `positive` |" in (tmp_path / "run/export/README.md").read_text()
    export = str(tmp_path / "run/export")
    assert json.loads((tmp_path / "run/export/config.json").read_text())["label2id"] == {"positive": 0, "negative": 1}
    assert results(tmp_path / "run")["classes"][0] == {"output": "POSITIVE", "label": "1", "name": "positive"}
    said = list(Predictor(export, 32)([Example("1", ("good film",))], 1))
    assert said[0]["label"] == pipeline("text-classification", export)("good film")[0]["label"]
    asked = ("evaluate", "--model", export, "--task", "custom", "--data", data, "--text", "text", "--label", "label")
    scored = pkd(*asked, "--class-name", "0=negative", "--class-name", "1=positive", "--max-length", 32)
    assert json.loads(scored.stdout)["accuracy"] == results(tmp_path / "run")["accuracy"], scored.stderr
    wrong = pkd(*asked, "--class-name", "0")
    assert wrong.returncode == 2 and "pkd: --class-name: '0' is not LABEL=NAME" in wrong.stderr


@pytest.mark.parametrize("name", ["sst2", "custom"])
def test_a_student_of_an_unnamed_teacher_has_the_names_of_the_task(settings, body, data, tmp_path, name):
    texts, labels = zip(*sentences(20, 1), strict=True)
    settings["teacher"] = {"model": given_teacher(body, tmp_path / "two", texts, labels, ("LABEL_0", "LABEL_1"))}
    own = {"name": "custom", "text": ["sentence"], "label": "label", "class_names": {0: "bad film", 1: "good film"}}
    settings["task"] |= own if name == "custom" else {}
    done = launch("--config", write_config(settings, tmp_path), "--stages", "data,teacher,cache,init")
    assert done.returncode == 0, done.stderr
    names = ["bad film", "good film"] if name == "custom" else ["negative", "positive"]
    config = json.loads((tmp_path / "run/student_init/config.json").read_text())
    assert config["id2label"] == {"0": names[0], "1": names[1]}
    assert config["label2id"] == {names[0]: 0, names[1]: 1}
    assert config["problem_type"] == "single_label_classification"


def test_f1_is_that_of_the_positive_class(settings, tmp_path):
    kinds = ("hateful", *["normal"] * 4)
    rows = [{"text": text, "label": kinds[i % 5]} for i, (text, _) in enumerate(sentences(100, 1))]
    data = put(tmp_path / "data", train=rows, dev=rows[:40])
    settings["teacher"]["finetune"]["epochs"] = settings["train"]["epochs"] = 1
    done = trained(settings, tmp_path, data=data, metric="f1")
    assert "positive: 'hateful' (the rarer one in training; set task.positive to choose)" in done.stdout
    run = tmp_path / "run"
    model = AutoModelForSequenceClassification.from_pretrained(run / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "export")

    def scores(positive):
        inputs = tokenizer([row["text"] for row in rows[:40]], padding=True, return_tensors="pt")
        said = [model.config.id2label[int(i)] for i in model(**inputs).logits.argmax(dim=1)]
        return f1_score([row["label"] for row in rows[:40]], said, pos_label=positive, zero_division=0)

    history = json.loads((run / "stages/distill.json").read_text())["outputs"]["history"]
    assert results(run)["f_1"] == history[0]["main_metric"] == pytest.approx(scores("hateful"))
    again = trained(settings, tmp_path, data=data, metric="f1", positive="normal")
    assert "teacher: runs" in again.stdout and "data: runs" not in again.stdout
    assert results(run)["f_1"] == pytest.approx(scores("normal")) and results(run)["positive"] == "normal"
    asked = ("evaluate", "--model", run / "export", "--task", "custom", "--data", data, "--text", "text")
    for extra, positive in (((), "hateful"), (("--positive", "normal"), "normal")):
        figures = json.loads(pkd(*asked, "--label", "label", "--max-length", 32, *extra).stdout)
        assert figures["positive"] == positive and figures["f_1"] == pytest.approx(scores(positive))


def rated(count, seed, scale):
    """Texts with the balance of their good and bad words, in a unit far from 0."""
    rng = np.random.default_rng(seed)
    return [
        {"text": text, "label": round(scale * (50 + 15 * (2 * kind - 1) + rng.normal()), 6)}
        for text, kind in sentences(count, seed)
    ]


def test_a_regression_learns_in_any_unit_and_answers_in_it(settings, tmp_path):
    settings["teacher"]["finetune"]["epochs"] = 4
    settings["train"]["epochs"] = 3
    found = {}
    for unit, formats in ((1.0, ["onnx"]), (100.0, ["onnx-fp16"])):
        settings["export"]["formats"] = formats
        folder = tmp_path / f"unit-{unit:g}"
        data = put(folder / "data", train=rated(203, 1, unit), dev=rated(41, 2, unit))
        settings["run"]["dir"] = str(folder / "run")
        done = trained(settings, folder, data=data, kind="regression")
        assert "targets are learned as (target - " in done.stdout
        found[unit] = results(folder / "run")
        dev = [line["main_metric"] for line in read(folder / "run/metrics.jsonl") if "split" in line]
        assert max(dev) == pytest.approx(found[unit]["main_metric"], abs=1e-3), (
            "the best epoch is chosen in float32, too"
        )
    assert found[1.0]["pearson"] > 0.8
    for side in ("teacher", "student"):
        assert found[1.0][side]["pearson"] == pytest.approx(found[100.0][side]["pearson"], abs=0.02)
    run = tmp_path / "unit-1/run"
    export = str(run / "export")
    assert "target_scale" not in (run / "export/config.json").read_text() + (run / "teacher/config.json").read_text()
    said = [answer["value"] for answer in Predictor(export, 32)([Example("1", ("good",)), Example("2", ("bad",))], 2)]
    assert 25 < said[1] < 50 < said[0] < 75
    plain = pipeline("text-classification", export)
    assert [plain(text)[0]["score"] for text in ("good", "bad")] == pytest.approx(said, abs=1e-3)
    newest = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    made = pkd("export", "--from-checkpoint", newest, "--output", tmp_path / "taken")
    assert made.returncode == 0, made.stderr
    taken = [answer["value"] for answer in Predictor(str(tmp_path / "taken"), 32)([Example("1", ("good",))], 1)]
    assert 50 < taken[0] < 75

    settings["teacher"] = {"model": str(run / "teacher")}
    settings["run"]["dir"] = str(tmp_path / "given/run")
    settings["student"]["init"] = export
    del settings["student"]["layers"]
    settings["train"]["epochs"] = 1
    (tmp_path / "given").mkdir()
    trained(settings, tmp_path / "given", data=str(tmp_path / "unit-1/data"), kind="regression")
    assert losses(tmp_path / "given/run")[0] < 2, "the given teacher and the given student are standardized too"
    init = load_file(tmp_path / "given/run/student_init/model.safetensors")
    scale = json.loads((run / "stages/data.json").read_text())["outputs"]["scale"]
    exported = load_file(run / "export/model.safetensors")
    assert torch.allclose(init["classifier.weight"] * scale["std"], exported["classifier.weight"], rtol=1e-5)
    shards = sorted((tmp_path / "given/run/cache").glob("*.safetensors"))
    assert all(load_file(shard)["logits"].float().abs().max() < 5 for shard in shards) and shards


def test_class_settings_that_cannot_be_used(settings, tmp_path):
    config = write_config(settings, tmp_path)
    for arguments, message in (
        (["task.class_names=[a, b]"], r"task\.class_names: must be a mapping from label value to class name"),
        (["task.class_names={0: a, 1: a}"], r"task\.class_names: labels and names must be different"),
        (["task.class_names={yes: a, 1: b}"], r"task\.class_names: a true/false value is not allowed here"),
        (["task.class_names={0: a, 2: b}"], r"task\.class_names: names 0, 2; the labels of sst2 are 0, 1"),
        (["task.positive=good"], r"task\.positive: 'good' is not a class; allowed: negative, positive"),
        (["task.name=stsb", "task.positive=1"], r"task\.positive: a regression has no classes; remove it"),
        (["task.name=mnli", "task.positive=neutral"], r"task\.positive: only two classes have a positive one"),
    ):
        done = launch("--config", config, *arguments)
        assert done.returncode == 2 and re.match(rf"pkd: .*{message}", done.stderr), done.stderr
        assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "run").exists()
