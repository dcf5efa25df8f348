"""Write predictions in the format of GLUE's evaluation server."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pkd_dist.data.tasks import Task
from pkd_dist.files import write_atomically


def write(folder: Path, split: str, task: Task, logits_NC: np.ndarray, classes: Sequence[str]) -> Path:
    """Write `index<TAB>prediction` lines to the file that GLUE expects, or `SPLIT.tsv` for other splits.

    Args:
        folder: existing folder to write to.
        split: name of the split.
        task: its file names and kind.
        logits_NC: one row per example, in the order of the data file; (N, 1) for regression. A text has the classes with logits
            above 0, if it can have several: separated as in a label column, or as a JSON list where a class has the separator.
        classes: values of the label column in the order of the logits.

    Returns:
        The path of the file.
    """
    path = folder / task.submissions.get(split, f"{split}.tsv")
    table = [("index", "prediction"), *enumerate(_predictions(task, logits_NC, classes))]

    def save(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter="\t", lineterminator="\n").writerows(table)

    write_atomically(path, save)
    return path


def _predictions(task: Task, logits_NC: np.ndarray, classes: Sequence[str]) -> Iterator[str]:
    if task.multilabel:
        plain = not any(task.label_separator in name or name.startswith("[") for name in classes)
        for logits_C in logits_NC:
            found = [name for name, logit in zip(classes, logits_C, strict=True) if logit > 0]
            yield task.label_separator.join(found) if plain else json.dumps(found, ensure_ascii=False)
    elif not task.regression:
        yield from (classes[i] for i in logits_NC.argmax(axis=1))
    elif task.value_range:
        yield from (
            f"{value:.3f}" for value in np.clip(logits_NC[:, 0], *task.value_range) + 0.0
        )  # + 0.0: never -0.000
    else:
        yield from map(str, logits_NC[:, 0])
