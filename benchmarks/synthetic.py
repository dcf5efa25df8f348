"""Write a teacher with random weights in a known shape: as fast as a real one, for machines without real weights.

python -m benchmarks.synthetic --tokenizer DIR --output DIR [--layers 12] [--hidden 768]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.common import run_program
from pkd_dist.errors import UserError
from pkd_dist.model.encoder import load_tokenizer, locate, save_model


def make(tokenizer: str, output: Path, layers: int, hidden: int) -> None:
    """Write a BERT classifier of two classes with the tokenizer of another model."""
    if output.exists():
        raise UserError(f"--output: {output} exists; choose another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    loaded = load_tokenizer(locate(tokenizer, "--tokenizer"), "--tokenizer")
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(loaded), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden, num_labels=2, id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )  # fmt: skip
    save_model(BertForSequenceClassification(config), loaded, output)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synthetic", description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="model folder, or package:NAME")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768)
    options = parser.parse_args()
    run_program(lambda: make(options.tokenizer, options.output, options.layers, options.hidden))


if __name__ == "__main__":
    main()
