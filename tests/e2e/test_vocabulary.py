"""A run with `student.vocabulary: used`, by the real command line: its export is smaller and answers as the run says."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import launch, refused, results, sentences, whole_run, write_config, write_tsv
from families import make_folder
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel, BertTokenizer
from typer.testing import CliRunner

from benchmarks.faults.tiny import BAD, GOOD, PLAIN
from pkd_dist.cli.main import app
from pkd_dist.evaluation import predictions
from pkd_dist.export import manifest

UNSEEN = [f"word{i}" for i in range(40)]
"""Tokens of the teacher that no training text holds."""
DEV = [*sentences(37, 2), ("word7 is a good film", 1), ("dull word9 plot 😀", 0), ("superbly", 1), ("电影 bad", 0)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run folder and its settings."""
    folder = tmp_path_factory.mktemp("used")
    (folder / "body").mkdir()
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [*UNSEEN, *GOOD, *BAD, *PLAIN, *letters, *(f"##{c}" for c in letters)]
    (folder / "body/vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(words)])
    )
    tokenizer = BertTokenizer(vocab=str(folder / "body/vocab.txt"), model_max_length=64)
    tokenizer.save_pretrained(folder / "body")
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder / "body")
    write_tsv(folder / "data/train.tsv", sentences(80, 1))
    write_tsv(folder / "data/dev.tsv", DEV)
    write_tsv(folder / "data/test.tsv", DEV[20:])
    settings = whole_run(folder / "body", folder / "data", folder)
    settings["teacher"]["finetune"]["epochs"] = settings["train"]["epochs"] = 1
    settings["student"] = {"layers": [1], "vocabulary": "used"}
    settings["export"] = {"formats": ["safetensors", "onnx", "onnx-int8"]}
    done = launch("--config", write_config(settings, folder))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data: the finished student keeps" in done.stdout + done.stderr
    return folder, settings


def texts():
    return [text for text, _ in DEV]


def student_logits(folder):
    """The student's logits on dev, as the run left them, in the order of dev."""
    return predictions.read(folder / "run/answers.safetensors")["dev"].logits["student"]


def test_the_export_holds_the_used_tokens_alone(run):
    export = run[0] / "run/export"
    tokenizer, body = AutoTokenizer.from_pretrained(export), AutoTokenizer.from_pretrained(run[0] / "body")
    table = load_file(export / "model.safetensors")["bert.embeddings.word_embeddings.weight"]
    kept = len(body) - len(UNSEEN)
    assert manifest.verify(export)["vocabulary"] == {"kept": kept, "total": len(body)}
    assert len(tokenizer) == len(table) == json.loads((export / "config.json").read_text())["vocab_size"] == kept
    assert not set(UNSEEN) & set(tokenizer.get_vocab())
    beside = manifest.verify(export)["deployment"]
    assert beside["splits"] == ["dev", "test"] and beside["examples"] == len(DEV) + len(DEV[20:])
    assert f"hold {kept} of {len(body)} tokens" in (export / "README.md").read_text()
    plain = AutoModelForSequenceClassification.from_pretrained(export)
    assert results(run[0] / "run")["student"]["parameters"] == plain.num_parameters()


def test_every_reader_of_the_export_answers_as_the_run_says(run):
    export, wanted = run[0] / "run/export", student_logits(run[0])
    tokenizer, model = AutoTokenizer.from_pretrained(export), AutoModelForSequenceClassification.from_pretrained(export)
    with torch.inference_mode():
        found = model(**tokenizer(texts(), padding=True, return_tensors="pt")).logits.numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    alone = Tokenizer.from_file(str(export / "tokenizer.json"))
    session = onnxruntime.InferenceSession(export / "onnx/model.onnx")
    for text, logits in zip(texts(), wanted, strict=True):
        ids = np.array([alone.encode(text).ids])
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        np.testing.assert_allclose(session.run(None, inputs)[0][0], logits, atol=1e-4)
    called = CliRunner().invoke(app, ["predict", "--model", str(export), "--", *texts()])
    answers = [json.loads(line)["label"] for line in called.stdout.splitlines()]
    assert answers == [model.config.id2label[int(i)] for i in wanted.argmax(axis=1)]


def test_the_export_is_the_trained_student_with_fewer_rows(run):
    """Texts without a cut token have the logits of the untrimmed student; those of the run are of the trimmed one."""
    folder, settings = run
    best = next((folder / "run/checkpoints").glob("*.safetensors"))
    weights = {name.removeprefix("model."): value for name, value in load_file(best).items()}
    full = AutoModelForSequenceClassification.from_pretrained(folder / "run/student_init").eval()
    full.load_state_dict(weights, strict=False)
    body = AutoTokenizer.from_pretrained(folder / "body")
    with torch.inference_mode():
        logits = full(**body(texts(), padding=True, return_tensors="pt")).logits.numpy()
    same = np.abs(logits - student_logits(folder)).max(axis=1) < 1e-5
    assert same.tolist() == [not set(text.split()) & set(UNSEEN) for text in texts()]


def test_a_checkpoint_is_exported_with_the_same_tokens(run, tmp_path):
    """Its last step ends the only epoch."""
    step = max((run[0] / "run/checkpoints").glob("step-*"))
    called = CliRunner().invoke(app, ["export", "--from-checkpoint", str(step), "--output", str(tmp_path / "student")])
    assert called.exit_code == 0, called.output
    tokenizer, model = (
        kind.from_pretrained(tmp_path / "student") for kind in (AutoTokenizer, AutoModelForSequenceClassification)
    )
    with torch.inference_mode():
        found = model(**tokenizer(texts(), padding=True, return_tensors="pt")).logits.numpy()
    np.testing.assert_allclose(found, student_logits(run[0]), atol=1e-5)


def test_another_vocabulary_repeats_no_training(run, tmp_path):
    folder, settings = run
    done = launch(
        "--config", write_config(settings, tmp_path), "student.vocabulary=all", "export.formats=[safetensors]"
    )
    assert done.returncode == 0, done.stderr
    assert "data: runs again, because student.vocabulary changed (used -> all)" in done.stdout + done.stderr
    stages = folder / "run/stages"
    starts = {
        name: json.loads((stages / f"{name}.json").read_text())["starts"]
        for name in ("teacher", "cache", "init", "distill")
    }
    assert set(starts.values()) == {1}
    previous = sorted(path.name for path in (folder / "run/previous").glob("*/*"))
    assert not {"teacher", "cache", "student_init", "checkpoints"} & set(previous)
    assert len(AutoTokenizer.from_pretrained(folder / "run/export")) == len(
        AutoTokenizer.from_pretrained(folder / "body")
    )
    assert "vocabulary" not in manifest.verify(folder / "run/export")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["student.vocabulary=used"],
            "student.vocabulary: used is not possible: the teacher's tokenizer is of the kind WordLevel",
        ),
        (["student.min_count=2"], "student.min_count 2 is allowed only with student.vocabulary used"),
    ],
)
def test_what_cannot_be_cut_is_refused(data, tmp_path, arguments, message):
    model = make_folder(tmp_path / "teacher", "bert", classifier=True, names=("negative", "positive"))
    settings = whole_run(tmp_path / "teacher", data, tmp_path)
    settings["teacher"] = {"model": model}
    assert message in refused("--config", write_config(settings, tmp_path), *arguments)
    assert not (tmp_path / "run").exists()
