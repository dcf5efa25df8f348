"""A complete run that takes seconds: a tiny teacher and tiny data from fixed seeds, and the command of the real launcher."""

import os
import random
import sys
from pathlib import Path
from typing import Any

import yaml

from pkd_dist.network import free_port

ROOT = Path(__file__).resolve().parents[2]
GOOD = ["good", "great", "fine", "lovely", "superb", "warm", "clever", "moving"]
BAD = ["bad", "dull", "poor", "awful", "weak", "cold", "boring", "empty"]
PLAIN = ["the", "a", "film", "movie", "plot", "story", "actor", "scene", "it"]
PLAIN += ["is", "was", "and", "with", "of", "this", "that", "very", "quite"]
_OF_A_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_CPUS_ON_NODE")


def sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """Return (sentence, label) pairs that a tiny model can learn; the label is the kind of its good or bad words."""
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


def make_data(folder: Path, dev: int = 41) -> Path:
    """Write 203 training sentences and `dev` dev sentences; neither number is a multiple of the ranks or the batch."""
    write_tsv(folder / "train.tsv", sentences(203, 1))
    write_tsv(folder / "dev.tsv", sentences(dev, 2))
    return folder


def make_body(folder: Path, layers: int = 4, hidden: int = 32, heads: int = 4, **fields: Any) -> Path:
    """Write a BERT with random weights and a word-piece tokenizer, as a Hugging Face folder without a classifier."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = [*special, *GOOD, *BAD, *PLAIN, *"abcdefghijklmnopqrstuvwxyz", "##s"]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)) + "\n")
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), model_max_length=64)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=2 * hidden, max_position_embeddings=64, **fields,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def write_config(settings: dict[str, Any], folder: Path) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of a child: this Python's tools and packages, one thread, no variables of a launcher."""
    clean = {k: v for k, v in os.environ.items() if k not in _OF_A_LAUNCHER}
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean.get('PATH', '')}"
    packages = os.pathsep.join(filter(None, (str(ROOT), clean.get("PYTHONPATH"))))
    return clean | {"PATH": path, "PYTHONPATH": packages, "OMP_NUM_THREADS": "1"} | extra


def command(*arguments: str | Path, ranks: int = 0, launcher: tuple[str, ...] = ()) -> list[str]:
    """Return the command of a run: under python, or under `deepspeed` if `ranks` is given, with the flags `launcher`."""
    program = [sys.executable]
    if ranks:
        flags = launcher or ("--num_accelerators", str(ranks), "--master_port", str(free_port()))
        program = ["deepspeed", *flags, "--log_level", "warning"]
    return [*program, str(ROOT / "launcher/train.py"), *map(str, arguments)]
