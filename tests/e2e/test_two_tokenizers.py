"""A student that reads with a tokenizer of its own, by the real command line."""

import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import launch, losses, refused, results, whole_run, write_config
from families import TOKENIZERS, make_folder, shape_of
from safetensors.torch import load_file, save_file
from test_kill import kill_at
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from benchmarks.faults.tiny import make_body
from pkd_dist.cli.main import app
from pkd_dist.config.load import load
from pkd_dist.data.tokens import open_tokens
from pkd_dist.evaluation import predictions


def published_kind(folder, family, **fields):
    """Write a model of a family with a tokenizer of the kind that its published models have."""
    tokenizer = TOKENIZERS[family]()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    torch.manual_seed(5)
    shape = shape_of(family, **ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 130} | fields)
    AutoModel.from_config(shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


CASES = {
    ("modernbert", "bert"): ["student.vocabulary=used", "task.augment.copies=1", "task.augment.mask=0.4"],
    ("bert", "roberta"): ["student.max_length=100", "distill.pair_last_layer=true"],
    ("roberta", "albert"): ["student.max_length=20"],
    ("albert", "modernbert"): ["distill.beta=0", "evaluate.best_by=divergence"],
}
"""Teacher and student -> settings. Bytes, word pieces and Unigram; WordPiece cut to the used tokens."""


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def run(request, data, tmp_path_factory):
    """A run folder and the student that was given; the first of them on two ranks."""
    folder = tmp_path_factory.mktemp("two")
    teacher, student = request.param
    teacher = published_kind(folder / "teacher", teacher)
    student = published_kind(folder / "own", student, num_hidden_layers=2, hidden_size=16)
    settings = whole_run(teacher, data, folder)
    settings["task"]["max_length"] = 128
    settings["teacher"]["finetune"]["epochs"] = settings["train"]["epochs"] = 1
    settings["student"] = {"init": student}
    settings["export"] = {"formats": ["safetensors", "onnx"]}
    config, first = write_config(settings, folder), request.param == next(iter(CASES))
    done = launch("--config", config, *CASES[request.param], bare=2 if first else 0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data: the student reads its own tokens, of " in done.stdout + done.stderr
    return folder / "run", folder / "own"


def dev_texts(data):
    return [line.split("\t")[0] for line in (data / "dev.tsv").read_text().splitlines()[1:]]


def test_each_model_reads_its_own_tokens(run, data):
    folder, own = run
    config = load(str(folder / "config.yaml"))
    limits = config.task.max_length, config.student.max_length or 128
    for place, model, limit in (("dev", folder / "teacher", limits[0]), ("student/dev", own, limits[1])):
        found, tokenizer = open_tokens(folder / "data" / place), AutoTokenizer.from_pretrained(model)
        wanted = tokenizer(dev_texts(data), truncation=True, max_length=limit)["input_ids"]
        assert [each.tolist() for each in np.split(found.input_ids_T, found.offsets_N1[1:-1])] == wanted
    both = [open_tokens(folder / "data" / place).ids_N for place in ("train", "student/train")]
    assert (both[0] == both[1]).all(), "the cache goes by these"


def test_copies_hold_the_students_own_mask_token(run):
    folder, own = run
    if not (folder / "data/distill").exists():
        return
    counts = []
    for place, model in (("distill", folder / "teacher"), ("student/distill", own)):
        mask = AutoTokenizer.from_pretrained(model).mask_token_id
        counts.append(int((open_tokens(folder / "data" / place).input_ids_T == mask).sum()))
    assert counts[0] == counts[1] > 50


def test_every_reader_of_the_export_answers_as_the_run_says(run, data):
    folder, _ = run
    export, texts = folder / "export", dev_texts(data)
    wanted = predictions.read(folder / "answers.safetensors")["dev"].logits["student"]
    tokenizer, model = AutoTokenizer.from_pretrained(export), AutoModelForSequenceClassification.from_pretrained(export)
    with torch.inference_mode():
        found = model(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits.numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    session = onnxruntime.InferenceSession(export / "onnx/model.onnx")
    names = [each.name for each in session.get_inputs()]
    inputs = tokenizer(texts, padding=True, truncation=True, return_tensors="np")
    np.testing.assert_allclose(session.run(None, {name: inputs[name] for name in names})[0], wanted, atol=1e-4)
    called = CliRunner().invoke(app, ["predict", "--model", str(export), "--", *texts])
    answers = [json.loads(line)["label"] for line in called.stdout.splitlines()]
    assert answers == [model.config.id2label[int(i)] for i in wanted.argmax(axis=1)]
    scored = CliRunner().invoke(app, ["evaluate", "--model", str(export), "--data", str(data)])
    assert json.loads(scored.stdout)["accuracy"] == results(folder)["student"]["accuracy"]


def renumbered(source, folder):
    """Copy a BERT folder with another order of its tokens: the same model of the same texts."""
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    order = [*range(5), *np.random.default_rng(1).permutation(np.arange(5, len(vocabulary))).tolist()]
    tokenizer["model"]["vocab"] = {token: order[number] for token, number in vocabulary.items()}
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "vocab.txt").unlink(missing_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() == len(vocabulary)
    weights = load_file(folder / "model.safetensors")
    [name] = [name for name in weights if name.endswith("word_embeddings.weight")]
    table = weights[name].clone()
    table[order] = weights[name][: len(order)]
    save_file(weights | {name: table}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_only_the_numbers_of_the_tokens_differ(body, data, tmp_path):
    """A student learns the same from the cache whether its tokens are numbered as its teacher's or not."""
    settings = whole_run(body, data, tmp_path)
    settings["student"] = {"init": str(make_body(tmp_path / "own", heads=2)), "num_layers": 2}
    stages = ("--stages", "data,teacher,cache,init,distill,evaluate")
    alike = launch("--config", write_config(settings, tmp_path), *stages)
    other = f"student.init={renumbered(tmp_path / 'own', tmp_path / 'renumbered')}"
    apart = launch("--config", write_config(settings, tmp_path), *stages, other, f"run.dir={tmp_path / 'apart'}")
    assert alike.returncode == apart.returncode == 0, alike.stderr + apart.stderr
    assert not (tmp_path / "run/data/student").exists() and (tmp_path / "apart/data/student").exists()
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "apart"), rtol=2e-3)
    logits = [predictions.read(tmp_path / run / "answers.safetensors")["dev"].logits for run in ("run", "apart")]
    assert (logits[0]["teacher"] == logits[1]["teacher"]).all()
    np.testing.assert_allclose(logits[0]["student"], logits[1]["student"], atol=0.05)


def test_killed_it_resumes_to_the_same_bytes(data, tmp_path):
    teacher = make_folder(tmp_path / "teacher", "modernbert")
    settings = whole_run(teacher, data, tmp_path)
    settings["student"] = {"init": published_kind(tmp_path / "own", "bert", num_hidden_layers=2)}
    config = write_config(settings, tmp_path)
    for moment in ("data/student/train/meta.json", "cache/shard-00001.safetensors", "metrics.jsonl:7"):
        kill_at(tmp_path / "run", moment, "--config", config)
    last = ("--stages", "data,teacher,cache,init,distill,evaluate,export")
    for folder in ("run", "calm"):
        done = launch("--config", config, f"run.dir={tmp_path / folder}", *last)
        assert done.returncode == 0, done.stderr
    run, calm = ((tmp_path / folder / "export/model.safetensors").read_bytes() for folder in ("run", "calm"))
    assert run == calm


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distill.states=tokens"], "distill.states: needs the same tokens in both models, but the student reads its own ("),
        (["distill.gram=1"], "distill.gram: needs the same tokens in both models"),
        (["distill.relations=1"], "distill.relations: needs the same tokens in both models"),
        (["distill.attention=1"], "distill.attention: needs the same tokens in both models"),
        (["cache.enabled=false"], "cache.enabled: needs the same tokens in both models"),
        (["student.max_length=131"], "student.max_length: 131 is more than"),
    ],
)  # fmt: skip
def test_what_needs_equal_tokens_is_refused(body, data, tmp_path, arguments, message):
    settings = whole_run(body, data, tmp_path)
    settings["student"] = {"init": published_kind(tmp_path / "own", "roberta")}
    assert message in refused("--config", write_config(settings, tmp_path), *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("turned", [False, True], ids=["same order", "other order"])
def test_the_classifier_of_a_folder_is_matched_by_class_name(taught, data, tmp_path, turned):
    """With a learning rate of almost 0, the student is the folder: it answers as its teacher, whatever the order of its outputs."""
    own = tmp_path / "own"
    shutil.copytree(taught, own)
    if turned:
        weights = load_file(own / "model.safetensors")
        flipped = {
            name: value.flip(0).contiguous() if name.startswith("classifier.") else value
            for name, value in weights.items()
        }
        save_file(flipped, own / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((own / "config.json").read_text())
        config |= {"id2label": {"0": "positive", "1": "negative"}, "label2id": {"positive": 0, "negative": 1}}
        (own / "config.json").write_text(json.dumps(config))
    settings = whole_run("unused", data, tmp_path)
    settings |= {"teacher": {"model": str(taught)}, "student": {"init": str(own)}}
    settings["train"] |= {"epochs": 1, "learning_rate": 1e-9}
    done = launch("--config", write_config(settings, tmp_path), "--stages", "data,teacher,cache,init,distill,evaluate")
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "run")["compression"]["agreement"] == 1
    assert ("its outputs positive, negative were put into the order negative, positive" in done.stdout) == turned
