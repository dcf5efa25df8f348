"""`pkd predict`: answers equal the model's, in the order of the lines; invalid lines are rejected."""

import io
import json
import shutil
import sys

import pytest
import torch
from families import make_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from pkd_dist.cli.main import app
from pkd_dist.errors import UserError
from pkd_dist.evaluation.inputs import Example, Form, lines, read
from pkd_dist.evaluation.predict import Predictor


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("bert"), "bert", classifier=True, names=("no", "yes"))


def test_answers_are_the_models_own(folder):
    texts = ["a film", "the plot was very dull and the story empty", "good"]
    said = list(Predictor(folder)((Example(text, (text,)) for text in texts), 2))
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for text, answer in zip(texts, said, strict=True):
        shares = model(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1).detach()
        assert answer["text"] == text and answer["label"] == ("no", "yes")[int(shares.argmax())]
        assert answer["probabilities"] == pytest.approx({"no": float(shares[0]), "yes": float(shares[1])}, abs=1e-6)
        assert answer["probability"] == max(answer["probabilities"].values())


@pytest.mark.parametrize(
    ("text", "pair", "message"),
    [
        ("", False, "text 1: the text is empty; every input needs one"),
        ("  \t", True, "text 1: the text is empty"),
        ("no tab", True, r"text 1: a pair needs two texts separated by one tab \(.*\), but this has 1"),
        ("a\tb\tc", True, "but this has 3"),
        ("\u200b\x00", False, "the text is empty"),
        ("bad \udcff byte", False, "text 1: the text is not UTF-8, or has half of a surrogate pair"),
    ],
)
def test_an_invalid_text_is_rejected(text, pair, message):
    with pytest.raises(UserError, match=message):
        list(read([text], "-", [], pair, Form(), []))


def test_one_half_of_a_pair_may_be_empty():
    assert [example.texts for example in read(["\tb", "a\t"], "-", [], True, Form(), [])] == [("", "b"), ("a", "")]


def test_texts_before_an_invalid_one_are_answered(folder):
    answers = Predictor(folder)(read(["good", "fine", ""], "-", [], False, Form(), []), 4)
    assert [next(answers)["text"] for _ in range(2)] == ["good", "fine"]
    with pytest.raises(UserError, match="text 3: the text is empty"):
        next(answers)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"problem_type": "regression"}, "is a regression with 2 outputs"),
        ({"architectures": ["BertForTokenClassification"]}, "is a model for token classification"),
        ({"architectures": ["BertModel"]}, "is not fine-tuned"),
        (
            {"id2label": {"0": "x", "1": "x"}},
            "calls two of its outputs 'x' (id2label in its config.json); give each a name",
        ),
    ],
)
def test_a_model_of_another_kind_is_rejected(folder, tmp_path, fields, message):
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text()) | fields
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(app, ["predict", "--model", str(tmp_path / "model"), "good"])
    assert result.exit_code == 2 and message in result.stderr and not result.stdout
    assert result.stderr.startswith("pkd: --model: ") and len(result.stderr.splitlines()) == 1


def test_a_multi_label_model_answers_with_a_list(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text()) | {"problem_type": "multi_label_classification"}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(app, ["predict", "--model", str(tmp_path / "model"), "good"])
    answer = json.loads(result.stdout)
    assert set(answer) == {"text", "labels", "scores"}
    assert answer["labels"] == [name for name, score in answer["scores"].items() if score > 0.5]


def test_lines_of_a_file_and_of_standard_input(tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_bytes("\ufeffone\r\n\nzwölf\n \t\nlast".encode())
    notes = []
    assert [text for _, text in lines(str(tmp_path / "texts.txt"), notes)] == ["one", "zwölf", "last"]
    assert notes == [f"{tmp_path / 'texts.txt'}: 2 blank line(s) skipped"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"fine\nbr\xe9ak\n")))
    with pytest.raises(UserError, match="standard input:2: byte 0xe9 is not valid UTF-8; save the text as UTF-8"):
        list(lines("-", notes))
    (tmp_path / "wide.txt").write_bytes("one\ntwo\n".encode("utf-16-le"))
    with pytest.raises(
        UserError, match=r"wide\.txt:1: contains a NUL character; save the file as UTF-8 if it is UTF-16"
    ):
        list(lines(str(tmp_path / "wide.txt"), notes))
    with pytest.raises(UserError, match=r"--file: no/such\.txt cannot be read"):
        list(lines("no/such.txt", notes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a film", "--model", "x", "--file", "y"], "--file: give texts or a file, not both"),
        (
            ["--model", "{folder}", "--file", "t.csv", "--text", "q", "--text", "q"],
            "--text: 'q' is given twice; a pair needs",
        ),
        (["a film"], "--model is missing; give a fine-tuned folder"),
        (["a film", "--model", "no/such/folder/here"], "--model: no such folder"),
        (["a film", "--model", "{folder}", "--max-length", "5000"], "is more than .* can read; give at most"),
    ],
)
def test_pkd_predict_rejects_bad_arguments(folder, arguments, message):
    done = CliRunner().invoke(app, ["predict", *(a.replace("{folder}", folder) for a in arguments)])
    assert done.exit_code == 2 and len(done.stderr.splitlines()) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(done.stderr)


def test_a_regression_gives_its_value(tmp_path):
    folder = make_folder(tmp_path / "bert", "bert", classifier=True, names=("score",))
    answer, half = Predictor(folder)([Example("", ("a", "b")), Example("", ("", "b"))], 1)
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        value, half_value = (float(model(**tokenizer(a, "b", return_tensors="pt")).logits) for a in ("a", ""))
    assert answer == {"text": "a", "text_pair": "b", "value": pytest.approx(value, abs=1e-6)}
    assert half == {"text": "", "text_pair": "b", "value": pytest.approx(half_value, abs=1e-6)}


@pytest.mark.parametrize("kind", [None, "regression", "single_label_classification"])
def test_one_output_is_a_regression_unless_the_model_says_otherwise(kind, tmp_path):
    """As for transformers' loss; its pipeline would apply a sigmoid where nothing is said, so the user is told."""
    folder = make_folder(tmp_path / "bert", "bert", classifier=True, names=("LABEL_0",), problem_type=kind)
    done = CliRunner().invoke(app, ["predict", "--model", folder, "good"])
    if kind == "single_label_classification":
        assert done.exit_code == 2 and 'use `problem_type="regression"` for a single-output' in done.stderr
        assert len(done.stderr.splitlines()) == 1 and not done.stdout
        return
    assert done.exit_code == 0 and set(json.loads(done.stdout)) == {"text", "value"}, done.stderr
    note = (
        f"pkd: --model: {folder} has one output and no problem_type in its config.json; it is taken for a regression\n"
    )
    assert done.stderr == ("" if kind else note)


def test_figures_do_not_overwrite_a_file(folder, tmp_path):
    kept = tmp_path / "figures.json"
    kept.write_text("precious")
    for place in (kept, tmp_path):
        done = CliRunner().invoke(app, ["evaluate", "--model", folder, "--output", str(place)])
        assert done.exit_code == 2 and f"--output: {place} exists; choose another name" in done.stderr
    assert kept.read_text() == "precious"
