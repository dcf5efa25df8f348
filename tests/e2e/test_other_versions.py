"""Packages that the project does not require: the last transformers 4, and SentencePiece. pip installs them from the index.

Each has a folder of its own; everything else comes from this environment.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, environment, results, write_config
from families import FAMILIES, TOKENIZERS, make_folder, tokenizer_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.faults.tiny import sentences
from pkd_dist.model.encoder import load_model, save_model

pytestmark = pytest.mark.slow
TRANSFORMERS_4 = ("transformers<5", "tokenizers<0.23", "huggingface-hub<1", "requests")
READ = """
import json, sys
import torch, transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

found = {"version": transformers.__version__}
texts = ["a good film", "the plot was very dull, and the story empty! " * 3]
for folder in sys.argv[1:]:
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    given = tokenizer(texts, texts[::-1], padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        found[folder] = [given["input_ids"].tolist(), model(**given).logits.tolist()]
print(json.dumps(found))
"""
"""Prints the tokens and logits of folders."""


def read(python: Path | str, folders: list[str]) -> dict:
    argv = [str(python), "-c", READ, *folders]
    done = subprocess.run(argv, env=environment(PYTHONPATH=""), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.timeout(3000)
def test_the_last_transformers_4_reads_every_family(tmp_path):
    """With the tokenizer class that published models of the family have, and with a generic one."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", *TRANSFORMERS_4], check=True)
    own = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    (own / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # searched after its own: torch and so on
    folders = []
    for family in FAMILIES:
        for kind, tokenizer in (("generic", tokenizer_of(family)), ("published", TOKENIZERS[family]())):
            source = make_folder(
                tmp_path / "models" / f"{family}-{kind}", family, classifier=True, vocab_size=len(tokenizer)
            )
            folders.append(f"{source}-saved")
            save_model(load_model(source), tokenizer, Path(folders[-1]), max_length=32)
    here, there = read(sys.executable, folders), read(python, folders)
    assert there.pop("version").startswith("4.") and here.pop("version").startswith("5.")
    for folder, (ids, logits) in here.items():
        assert there[folder][0] == ids, folder
        np.testing.assert_allclose(there[folder][1], logits, atol=1e-5, err_msg=folder)


TRAIN = """
import sys
import sentencepiece

sentencepiece.SentencePieceTrainer.train(
    input=sys.argv[1], model_prefix=sys.argv[2], vocab_size=60, hard_vocab_limit=False, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
    pad_piece="[PAD]", bos_piece="[CLS]", eos_piece="[SEP]", unk_piece="[UNK]",
)
made = sentencepiece.SentencePieceProcessor(model_file=sys.argv[2] + ".model")
print(made.get_piece_size(), *(f"{piece}" for piece in made.encode("a good film", out_type=int)))
"""
"""Trains a SentencePiece model as DeBERTa's is; prints its size and the pieces of a text."""


@pytest.mark.timeout(3000)
def test_a_deberta_whose_tokenizer_is_a_sentencepiece_model(data, tmp_path):
    """As microsoft/deberta-v3-base is published: `spm.model`, no tokenizer.json. A whole run, and its export."""
    packages, model = tmp_path / "packages", tmp_path / "model"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--target", packages, "sentencepiece"], check=True
    )
    (tmp_path / "texts").write_text("\n".join(text for text, _ in sentences(400, 9)))
    with_package = environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(packages)]))
    trained = subprocess.run([sys.executable, "-c", TRAIN, tmp_path / "texts", tmp_path / "spm"],
                             env=with_package, check=True, capture_output=True, text=True)  # fmt: skip
    size, *pieces = map(int, trained.stdout.split())
    make_folder(model, "deberta-v2", vocab_size=size + 1, pad_token_id=0, cls_token_id=1, sep_token_id=2)  # and [MASK]
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text('{"do_lower_case": false, "vocab_type": "spm"}')
    (tmp_path / "spm.model").rename(model / "spm.model")
    short = {"epochs": 1, "learning_rate": 3e-3, "batch_size": 32}
    settings = {
        "run": {"dir": str(tmp_path / "run")},
        "task": {"name": "sst2", "data": str(data), "max_length": 32},
        "teacher": {"model": str(model), "finetune": short}, "student": {"layers": [1, 3]}, "train": short,
        "evaluate": {"latency_samples": 10}, "metrics": {"enabled": False},
    }  # fmt: skip
    argv = [sys.executable, ROOT / "launcher/train.py", "--config", write_config(settings, tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, env=with_package, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(tmp_path / "run")["n"] == 41
    export = tmp_path / "run/export"  # read here, without SentencePiece
    assert AutoTokenizer.from_pretrained(export)("a good film")["input_ids"] == [1, *pieces, 2]
    assert AutoModelForSequenceClassification.from_pretrained(export).config.num_hidden_layers == 2
    argv = [sys.executable, "-m", "pkd_dist.cli", "predict", "--model", export, "a good film"]
    done = subprocess.run(argv, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["label"] in ("negative", "positive"), done.stderr
