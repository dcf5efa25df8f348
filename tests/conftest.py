"""What the tests share: a tiny teacher, tiny data, and a way to start the real launcher.

Everything is made here, from fixed seeds; nothing is fetched.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
GOOD = ["good", "great", "fine", "lovely", "superb", "warm", "clever", "moving"]
BAD = ["bad", "dull", "poor", "awful", "weak", "cold", "boring", "empty"]
PLAIN = [
    "the",
    "a",
    "film",
    "movie",
    "plot",
    "story",
    "actor",
    "scene",
    "it",
    "is",
    "was",
    "and",
    "with",
    "of",
    "this",
    "that",
    "very",
    "quite",
]


def sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """(sentence, label) pairs that a tiny model can learn: the label is which kind of word prevails."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        label = rng.randrange(2)
        words = [rng.choice(PLAIN) for _ in range(rng.randrange(2, 14))]
        for _ in range(rng.randrange(1, 3)):
            words.insert(rng.randrange(len(words)), rng.choice((BAD, GOOD)[label]))
        out.append((" ".join(words), label))
    return out


def write_tsv(path: Path, rows: list[tuple[str, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("sentence\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")


def make_body(folder: Path, layers: int = 4, hidden: int = 32, **fields: Any) -> Path:
    """A BERT of random weights with a word-piece tokenizer, as a Hugging Face folder without a classifier."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *GOOD,
        *BAD,
        *PLAIN,
        *"abcdefghijklmnopqrstuvwxyz",
        "##s",
    ]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)) + "\n")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * hidden, max_position_embeddings=64, **fields,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def body(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny body; read-only."""
    return make_body(tmp_path_factory.mktemp("body") / "bert")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """203 training and 41 dev sentences: neither divides by ranks or batch. Read-only."""
    folder = tmp_path_factory.mktemp("data")
    write_tsv(folder / "train.tsv", sentences(203, 1))
    write_tsv(folder / "dev.tsv", sentences(41, 2))
    return folder


def whole_run(body: Path, data: Path, folder: Path) -> dict[str, Any]:
    """A whole run that takes seconds."""
    return {
        "run": {"dir": str(folder / "run"), "timeout_seconds": 120},
        "task": {"name": "sst2", "data": str(data), "max_length": 32},
        "teacher": {"model": str(body), "finetune": {"epochs": 2, "learning_rate": 3e-3, "batch_size": 16}},
        "student": {"layers": [1, 3]},
        "train": {"epochs": 2, "batch_size": 16, "learning_rate": 3e-3, "deepspeed": "ds_configs/zero1.json"},
        "cache": {"shard_rows": 50},
        "checkpoint": {"every_steps": 5},
        "evaluate": {"latency_samples": 10},
        "metrics": {"enabled": False},
    }


@pytest.fixture
def settings(body: Path, data: Path, tmp_path: Path) -> dict[str, Any]:
    """A whole run; tests change it before they write it."""
    return whole_run(body, data, tmp_path)


def write_config(settings: dict[str, Any], folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child: this Python's tools on PATH, one thread, no variables of a launcher."""
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean.get('PATH', '')}"
    return clean | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | extra


def command(*arguments: str | Path, ranks: int = 0) -> list[str]:
    """The command of a run: under plain python, or under the real `deepspeed` where `ranks` is given."""
    program = [sys.executable] if not ranks else ["deepspeed", "--num_accelerators", str(ranks)]
    if ranks:
        program += ["--master_port", str(_port()), "--log_level", "warning"]
    return [*program, str(ROOT / "launcher/train.py"), *map(str, arguments)]


def launch(
    *arguments: str | Path, ranks: int = 0, timeout: float = 120, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Runs launcher/train.py to its end."""
    argv = command(*arguments, ranks=ranks)
    return subprocess.run(argv, cwd=ROOT, env=environment(**extra), capture_output=True, text=True, timeout=timeout)


def _port() -> int:
    from pkd_dist.ranks import free_port

    return free_port()


def losses(run: Path) -> list[float]:
    """The loss of each step of a run."""
    from pkd_dist.telemetry.records import read

    return [record["loss"] for record in read(run / "metrics.jsonl") if "split" not in record]


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results_eval.json").read_text())
