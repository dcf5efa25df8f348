"""Write a teacher in the shape of BERT-base with random weights: as fast as a real one, for machines without real weights."""

import argparse
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.common import run_program
from pkd_dist.errors import UserError
from pkd_dist.model.encoder import load_tokenizer, locate, save_model


def make(tokenizer: str, output: Path) -> None:
    """Write a BERT classifier of two classes with the tokenizer of another model."""
    if output.exists():
        raise UserError(f"--output: {output} exists; choose another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    loaded = load_tokenizer(locate(tokenizer, "--tokenizer"), "--tokenizer")
    torch.manual_seed(1)
    labels = {0: "negative", 1: "positive"}
    config = BertConfig(
        vocab_size=len(loaded), id2label=labels, label2id={name: label for label, name in labels.items()}
    )
    save_model(BertForSequenceClassification(config), loaded, output)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.synthetic", description=__doc__)
    parser.add_argument("--tokenizer", required=True, help="model folder, or package:NAME")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    run_program(lambda: make(options.tokenizer, options.output))


if __name__ == "__main__":
    main()
