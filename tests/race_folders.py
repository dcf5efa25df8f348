"""Folders in the layout that RACE is published in, with questions that a tiny model can learn."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from benchmarks.faults.tiny import BAD, GOOD, PLAIN

COUNTS = {"train": (5, 30), "dev": (3, 8), "test": (2, 6)}
"""Split -> number of texts in `middle` and in `high`."""


def article(rng: random.Random, questions: int) -> dict[str, Any]:
    """A text with questions, every second one with a gap; mostly the right option is the one with a good word."""
    found: dict[str, Any] = {"article": " ".join(rng.choices(PLAIN, k=rng.randrange(6, 40)))}
    found |= {"questions": [], "options": [], "answers": []}
    for i in range(questions):
        right = rng.randrange(4)
        words = [rng.choice(GOOD if option == right else BAD) for option in range(4)]
        found["questions"].append(f"the film was {rng.choice(['_ .', '_'])}" if i % 2 else "what was the story ?")
        found["options"].append([" ".join([*rng.choices(PLAIN, k=rng.randrange(3)), word]) for word in words])
        found["answers"].append("ABCD"[right if rng.random() < 0.85 else rng.randrange(4)])
    return found


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def make_race(folder: Path, counts: dict[str, tuple[int, int]] = COUNTS, seed: int = 1) -> Path:
    """Write `train/middle/1.txt` and so on, with 3 to 5 questions a text."""
    rng = random.Random(seed)
    for split, texts in counts.items():
        for level, count in zip(("middle", "high"), texts, strict=True):
            for number in range(1, count + 1):
                name = f"{level}{number}.txt"
                text = article(rng, rng.randrange(3, 6)) | {"id": name}
                write(folder / split / level / f"{number}.txt", text)
    return folder


def rows(count: int, seed: int = 3) -> list[dict[str, Any]]:
    """Examples as rows of a table: `context`, `question`, `options`, `right` (an index)."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        text = article(rng, 1)
        options, question = text["options"][0], text["questions"][0]
        right = next(i for i, option in enumerate(options) if option.split()[-1] in GOOD)
        found.append({"context": text["article"], "question": question, "options": options, "right": right})
    return found


def settings(body: Path, data: Path, folder: Path) -> dict[str, Any]:
    """A whole run that takes seconds; see `conftest.whole_run`."""
    return {
        "run": {"dir": str(folder / "run"), "timeout_seconds": 120},
        "task": {"name": "race", "data": str(data), "max_length": 40},
        "teacher": {"model": str(body), "finetune": {"epochs": 1, "learning_rate": 3e-3, "batch_size": 4}},
        "student": {"layers": [1, 3]},
        "train": {"epochs": 1, "batch_size": 4, "learning_rate": 3e-3, "deepspeed": "ds_configs/zero1.json"},
        "cache": {"shard_rows": 50},
        "checkpoint": {"every_steps": 5, "min_seconds": 0},
        "evaluate": {"latency_samples": 10},
        "export": {"formats": ["safetensors"]},
        "metrics": {"enabled": False},
    }
