"""A student with its own tokenizer: does a teacher with another one help it? Film reviews; rerun the same command to resume.

    python -m benchmarks.two_tokenizers --jobs 2

The student is a RoBERTa of random weights that reads byte pairs learned from the training text; the teacher is the 6-layer MiniLM, which
reads word pieces.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, choices, run_program, stamp
from pkd_dist.config.paths import project_path
from pkd_dist.files import folder_written_atomically, write_json

CONFIG = Path(__file__).parent / "glue/movie-reviews.yaml"
TOKENS, LAYERS, WIDTH = 8000, 2, 256
COMMON: dict[str, Any] = {"train.learning_rate": 5.0e-4, "distill.beta": 0.0}
METHODS: dict[str, dict[str, Any]] = {
    "finetune": {**COMMON, "distill.alpha": 0.0, "train.epochs": 8},
    "kd": {**COMMON, "train.epochs": 8},
    "kd+states": {**COMMON, "train.epochs": 8, "distill.beta": 10.0, "distill.pair_last_layer": True},
    "kd+text": {"train.learning_rate": 5.0e-4, "distill.preset": "strong"},
}
"""`kd+states` pairs the [CLS] states of both layers, through a projection to the teacher's width."""


def make_student(folder: Path) -> None:
    """Write the student's folder: a tokenizer of byte pairs, and random weights."""
    import torch
    from tokenizers.implementations import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained = ByteLevelBPETokenizer()
    lines = (project_path("data/movie-reviews") / "train.tsv").read_text(encoding="utf-8").splitlines()[1:]
    trained.train_from_iterator([line.split("\t")[0] for line in lines], TOKENS, special_tokens=special)
    with folder_written_atomically(folder) as temporary:
        trained.save_model(str(temporary))
        tokenizer = RobertaTokenizerFast(
            vocab=str(temporary / "vocab.json"), merges=str(temporary / "merges.txt"), model_max_length=128
        )
        tokenizer.save_pretrained(temporary)
        torch.manual_seed(1)
        shape = RobertaConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=8,
            intermediate_size=4 * WIDTH, max_position_embeddings=130, type_vocab_size=1,
        )  # fmt: skip
        RobertaModel(shape).save_pretrained(temporary)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_tokenizers", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/two-tokenizers"))
    parser.add_argument("--methods", default=",".join(METHODS), help="methods; those of another call stay in the table")
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    chosen = choices(options.methods, METHODS, "--methods", parser)

    def work() -> None:
        from pkd_dist.comparison.study import open_comparison

        student = options.output.absolute() / "student"
        if not student.exists():
            student.parent.mkdir(parents=True, exist_ok=True)
            make_student(student)
        seeds = [int(seed) for seed in options.seeds.split(",")]
        methods = {name: METHODS[name] for name in chosen}
        given = [f"student.init={student}"]
        made = open_comparison(str(CONFIG), given, methods, seeds, options.output, jobs=options.jobs).run_all()
        write_json(RESULTS / "two_tokenizers.json", {**stamp(), **made})

    run_program(work)


if __name__ == "__main__":
    main()
