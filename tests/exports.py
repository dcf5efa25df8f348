"""A tiny export, made in seconds: what `pkd export verify`, `pkd serve` and the tests of each format work on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import make_folder
from onnxruntime.quantization import QuantType, quantize_dynamic

from benchmarks.faults.tiny import sentences, write_tsv
from pkd_dist.config.schema import Config, Evaluate
from pkd_dist.config.task import Task
from pkd_dist.data import tasks, text, tokens
from pkd_dist.evaluation.scoring import forward_of, predict_logits_single
from pkd_dist.export import build
from pkd_dist.export.manifest import ExportManifest
from pkd_dist.model import encoder


def subject(folder: Path, family: str = "bert", **fields: Any) -> build.Subject:
    """A classifier of random weights, with 60 sentences of train and 45 of dev."""
    model = make_folder(folder / "model", family, classifier=True, names=("negative", "positive"), **fields)
    write_tsv(folder / "data/train.tsv", sentences(60, 1))
    write_tsv(folder / "data/dev.tsv", sentences(45, 2))
    task = tasks.resolve(Config.model_validate({"run": {"dir": "unused"}}).task)
    tokenizer = encoder.load_tokenizer(model)
    sets = {}
    for name in ("train", "dev"):
        split = text.read(str(folder / "data"), name, task)
        sets[name] = tokens.tokenize(split, tokenizer, 32, folder / name)
    return build.Subject(
        encoder.load_model(model), tokenizer, task, ["negative", "positive"], sets["dev"],
        tuple(column[:8] for column in split.texts), 32, Evaluate(batch_size=16, latency_samples=10),
    )  # fmt: skip


@torch.no_grad()
def with_outlier(made: build.Subject) -> build.Subject:
    """Change a BERT so that its answers would depend on other texts if activations had one scale for a batch.

    The word of id 7 gets an activation in layer 0 that is far above all others and has no effect of its own. The logits of
    dev differ by units, and the threshold is where a gap between them is wide, so that rounding alone changes no label.
    """

    def differences() -> np.ndarray:
        logits_NC = predict_logits_single(forward_of(made.student), made.dev, 16, made.pad_id)
        return np.sort(logits_NC[:, 1] - logits_NC[:, 0])

    layers, classifier = made.student.bert.encoder.layer, made.student.classifier
    for linear in (module for module in layers.modules() if isinstance(module, torch.nn.Linear)):
        linear.weight *= 4
    word = made.student.get_input_embeddings().weight[7]
    word *= 50
    layers[0].intermediate.dense.weight[0] = 40 * word / word.norm()
    layers[0].intermediate.dense.bias[0] = -100
    layers[0].output.dense.weight[:, 0] = 0
    classifier.weight *= 3 / differences().std()
    middle = differences()[10:35]
    widest = int(np.diff(middle).argmax())
    classifier.bias[1] -= float(middle[widest : widest + 2].mean())
    return made


def one_scale_for_the_batch(source: Path, path: Path, how: str = "") -> None:
    """Quantise as ONNX Runtime does, in place of `onnx.write_int8`."""
    quantize_dynamic(source, path, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Attention"])


def pair_subject(folder: Path) -> build.Subject:
    """A classifier of pairs, the columns `a` and `b` of CSV files, with random weights."""
    model = make_folder(folder / "model", "bert", classifier=True, names=("other", "same"))
    for name, seed in (("train", 1), ("dev", 2)):
        texts = [text for text, _ in sentences(30, seed)]
        rows = [f"{a},{b},{'same' if a == b else 'other'}" for a, b in zip(texts, texts[:15] * 2, strict=True)]
        (folder / "data").mkdir(exist_ok=True)
        (folder / f"data/{name}.csv").write_text("\n".join(["a,b,label", *rows, ""]))
    given = {"name": "custom", "text": ["a", "b"], "label": "label"}
    task, tokenizer = tasks.resolve(Task.model_validate(given)), encoder.load_tokenizer(model)
    splits = {name: text.read(str(folder / "data"), name, task) for name in ("train", "dev")}
    sets = {name: tokens.tokenize(split, tokenizer, 48, folder / name) for name, split in splits.items()}
    return build.Subject(
        encoder.load_model(model), tokenizer, task, ["other", "same"], sets["dev"],
        tuple(column[:8] for column in splits["dev"].texts), 48, Evaluate(batch_size=16, latency_samples=10),
    )  # fmt: skip


def export(made: build.Subject, output: Path, *formats: str) -> ExportManifest:
    return build.export(made, ["safetensors", *formats], output, json.dumps, {"task": "sst2"})
