"""Whole runs of other tasks than two classes of single sentences: three classes of pairs as GLUE ships them, a regression,
fifty classes with text that only the teacher labels; and what `pkd predict` makes of them."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, environment, launch, results, sentences, write_config
from glue_folders import FOLDERS, put
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pkd_dist.evaluation.inputs import Form, read
from pkd_dist.evaluation.predict import Predictor
from pkd_dist.serve.model import ServedModel

CLASSES = [f"topic {i}" for i in range(50)]


def finished(settings, tmp_path, **task):
    settings["task"] = {"max_length": 32, **task}
    settings["teacher"]["finetune"]["epochs"] = settings["train"]["epochs"] = 1
    done = launch("--config", write_config(settings, tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done, tmp_path / "run"


def answers(run, texts, pair=False):
    return list(Predictor(str(run / "export"))(read(texts, "-", [], pair, Form(), []), 2))


def logits_of(run, *columns):
    """What plain transformers says."""
    tokenizer = AutoTokenizer.from_pretrained(run / "export")
    model = AutoModelForSequenceClassification.from_pretrained(run / "export").eval()
    return model(**tokenizer(*columns, padding=True, return_tensors="pt")).logits.detach().numpy()


def test_three_classes_of_pairs_with_two_dev_sets_and_tests_without_labels(settings, tmp_path):
    data = put(tmp_path / "MNLI", **FOLDERS["mnli"])
    (tmp_path / "diagnostic").mkdir()
    (tmp_path / "MNLI/diagnostic.tsv").rename(tmp_path / "diagnostic/diagnostic.tsv")  # as the download has it
    done, run = finished(settings, tmp_path, name="mnli", data=data)
    assert "without a label (gold_label is '-')" in done.stdout
    found = results(run)
    assert found["n"] == 2 and set(found["splits"]) == {"dev_mismatched"}
    assert found["splits"]["dev_mismatched"]["n"] == 2 and "accuracy" in found["splits"]["dev_mismatched"]["student"]
    names = ["entailment", "neutral", "contradiction"]
    for side in ("teacher", "student"):
        for file in ("MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"):
            header, *rows = (run / "predictions" / side / file).read_text().splitlines()
            assert header == "index\tprediction" and [row.split("\t")[0] for row in rows] == ["0", "1"]
            assert {row.split("\t")[1] for row in rows} <= set(names)
    logits = logits_of(run, ["a", "b"], ["d", "d"])
    said = answers(run, ["a\td", "b\td"], pair=True)
    assert [s["label"] for s in said] == [names[i] for i in logits.argmax(axis=1)]
    assert [row.split("\t")[1] for row in (run / "predictions/student/MNLI-m.tsv").read_text().splitlines()[1:]] == [
        s["label"] for s in said
    ]
    assert list(said[0]["probabilities"]) == names and said[0]["text_pair"] == "d"


def test_a_regression(settings, tmp_path):
    rng = np.random.default_rng(0)
    rows = [(a, b, rng.uniform(0, 5)) for (a, _), (b, _) in zip(sentences(83, 3), sentences(83, 4), strict=True)]
    for split, part in (("train", rows[:60]), ("dev", rows[60:])):
        table = "sentence1\tsentence2\tscore\n" + "".join(f"{a}\t{b}\t{s:.3f}\n" for a, b, s in part)
        put(tmp_path / "STS-B", **{f"{split}__tsv": table})
    put(tmp_path / "STS-B", test__tsv=FOLDERS["stsb"]["test__tsv"])
    settings["export"] = {"formats": ["onnx", "triton"]}
    _, run = finished(settings, tmp_path, name="stsb", data=str(tmp_path / "STS-B"))
    found = results(run)
    dev = rows[60:]
    predicted = logits_of(run, [a for a, _, _ in dev], [b for _, b, _ in dev])[:, 0]
    gold = [round(s, 3) for _, _, s in dev]
    assert found["pearson"] == pytest.approx(pearsonr(predicted, gold).statistic, abs=1e-3)
    assert found["spearman"] == pytest.approx(spearmanr(predicted, gold).statistic, abs=1e-2)
    assert found["main_metric"] == pytest.approx((found["pearson"] + found["spearman"]) / 2)
    values = [answer["value"] for answer in answers(run, ["e\tf", "g\th"], pair=True)]
    served = ServedModel(run / "export").answer([("e", "f"), ("g", "h")])
    assert [answer["value"] for answer in served] == pytest.approx(values, abs=1e-4)
    submitted = (run / "predictions/student/STS-B.tsv").read_text().splitlines()[1:]
    assert [float(line.split("\t")[1]) for line in submitted] == pytest.approx(np.clip(values, 0, 5), abs=2e-3)


def test_fifty_classes_with_more_text_than_labels(settings, tmp_path):
    def rows(count, seed):
        rng = np.random.default_rng(seed)
        return [{"body": text, "topic": CLASSES[rng.integers(50)]} for text, _ in sentences(count, seed)]

    train = rows(200, 1) + [{"body": f"film {chr(97 + i % 26)} plot", "topic": name} for i, name in enumerate(CLASSES)]
    for split, part in (("train", train), ("dev", rows(60, 2))):
        put(tmp_path / "data", **{f"{split}__jsonl": "\n".join(map(json.dumps, part))})
    more = ["the scene is warm", "the scene is warm", train[0]["body"], "a cold actor and a cold plot"]
    put(tmp_path / "data", more__txt="\n".join(more))
    done, run = finished(
        settings, tmp_path, name="custom", data=str(tmp_path / "data"), text=["body"], label="topic",
        unlabeled=[str(tmp_path / "data/more.txt")], augment={"copies": 1}, class_weights="balanced",
    )  # fmt: skip
    assert "removed 2 of 4 texts" in done.stdout
    made = json.loads((run / "stages/data.json").read_text())["outputs"]["sets"]
    assert made["train"]["examples"] == made["train"]["labelled"] == made["distill"]["labelled"] == 250
    examples = made["distill"]["examples"]
    assert 252 < examples <= 502
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in steps) == -(-examples // 16)
    config = json.loads((run / "export/config.json").read_text())
    assert sorted(config["label2id"]) == sorted(CLASSES) and len(config["id2label"]) == 50
    dev = rows(60, 2)
    predicted = logits_of(run, [row["body"] for row in dev]).argmax(axis=1)
    gold = [config["label2id"][row["topic"]] for row in dev]
    found = results(run)
    assert found["accuracy"] == accuracy_score(gold, predicted)
    assert found["f_1"] == pytest.approx(f1_score(gold, predicted, average="macro", zero_division=0))
    assert found["MCC"] == pytest.approx(matthews_corrcoef(gold, predicted))
    assert answers(run, [dev[0]["body"]])[0]["label"] == config["id2label"][str(predicted[0])]

    said = subprocess.run(
        [sys.executable, "-m", "pkd_dist.cli", "predict", "--model", str(run / "export"), "--batch-size", "2"],
        input="a film\nété\nthe plot\r\n".encode(), cwd=ROOT, env=environment(), capture_output=True, timeout=120,
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    lines = [json.loads(line) for line in said.stdout.decode().splitlines()]
    assert [line["text"] for line in lines] == ["a film", "été", "the plot"]
    assert all(line["label"] in CLASSES and sum(line["probabilities"].values()) == pytest.approx(1) for line in lines)


def test_pairs_with_empty_halves_and_class_names_that_look_like_markup(settings, tmp_path):
    names = ["[none]", "[/thanks]", "<b>&", "a`|$x_"]
    rows = [("" if i % 4 == 0 else "a title", text, names[i % 4]) for i, (text, _) in enumerate(sentences(80, 3))]
    table = "title,body,label,p_none\n" + "".join(f"{title},{body},{label},0.5\n" for title, body, label in rows[:60])
    put(
        tmp_path / "data",
        validation__json=json.dumps([dict(zip(("title", "body", "label"), r, strict=True)) for r in rows[60:]]),
    )
    (tmp_path / "data/train.csv.gz").write_bytes(gzip.compress(table.encode()))
    done, run = finished(
        settings, tmp_path, name="custom", data=str(tmp_path / "data"), text=["title", "body"], label="label",
        augment={"copies": 1, "neighbours": 0.3},
    )  # fmt: skip
    assert "title is empty in 15 lines: 2, 6, 10, 14, 18, ..." in done.stdout
    assert "title is empty in 5 rows: 1, 5, 9, 13, 17" in done.stdout and "columns not used: p_none" in done.stdout
    card = (run / "export/README.md").read_text()
    assert "Classes, in the order of the logits: `<b>&`, `[/thanks]`, `[none]`, ``a`|$x_``." in card
    report = (run / "report.html").read_text()
    assert "&lt;b&gt;&amp;" in report and "<b>&" not in report and "[/thanks]" in report and "a`|$x_" in report
    said = answers(run, ["\ta warm film", "a title\t"], pair=True)
    assert said[0]["text"] == "" and said[1]["text_pair"] == "" and {answer["label"] for answer in said} <= set(names)
