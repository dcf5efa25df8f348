"""Every file of an export answers as the student does, on all of dev, or the export is refused."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from families import FAMILIES, make_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.faults.tiny import sentences, write_tsv
from pkd_dist.config import Config
from pkd_dist.data import tasks, text, tokens
from pkd_dist.errors import UserError
from pkd_dist.export import build, manifest, onnx
from pkd_dist.export.runtime import OnnxModel
from pkd_dist.model import encoder

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY = ["safetensors", "onnx", "onnx-fp16", "onnx-int8", "torch-export", "triton"]


def subject(folder: Path, family: str, **fields) -> build.Subject:
    model = make_folder(folder / "model", family, classifier=True, names=("negative", "positive"), **fields)
    write_tsv(folder / "data/train.tsv", sentences(60, 1))
    write_tsv(folder / "data/dev.tsv", sentences(45, 2))
    task = tasks.resolve(Config.model_validate({"run": {"dir": "unused"}}).task)
    tokenizer = encoder.load_tokenizer(model)
    made, texts = {}, ()
    for name in ("train", "dev"):
        split = text.read(str(folder / "data"), name, task)
        made[name] = tokens.tokenize(split, tokenizer, 32, folder / name)
        texts = tuple(column[:8] for column in split.texts)
    return build.Subject(
        encoder.load_model(model), tokenizer, task, ["negative", "positive"], made["dev"], made["train"], texts, 32, 16, 10
    )  # fmt: skip


def export(made: build.Subject, output: Path, formats: list[str]) -> dict:
    return build.export(made, formats, output, lambda files: json.dumps(files), {"task": "sst2"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path):
    made = subject(tmp_path, family)
    found = export(made, tmp_path / "export", EVERY)
    folder = tmp_path / "export"
    assert manifest.verify(folder) == {k: v for k, v in found.items() if k != "digest"}
    assert set(found["files_on_dev"]) == {
        "model.safetensors", *(f"onnx/model{kind}.onnx" for kind in ("", ".fp16", ".int8")), "torch_export/model.pt2",
    }  # fmt: skip
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    given = AutoTokenizer.from_pretrained(folder)(["a good film", "bad"], padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = plain(**given).logits.numpy()
    for name, tolerance in (("model.onnx", 1e-5), ("model.fp16.onnx", 0.02), ("model.int8.onnx", 0.5)):
        np.testing.assert_allclose(OnnxModel(folder / "onnx" / name, 1)(given), logits, atol=tolerance)
    program = torch.export.load(folder / "torch_export/model.pt2").module()
    np.testing.assert_allclose(program(**given).detach().numpy(), logits, atol=1e-5)
