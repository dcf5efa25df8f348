"""The stage `data`: every split of a task, and more text for the teacher to label, as token sets in a folder each.

FOLDER/train, dev, test, ...   the task's splits that are there
FOLDER/distill                 train, the unlabelled and the augmented text, where there is any
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pkd_dist.config.schema import Task as TaskConfig
from pkd_dist.data import text, tokens
from pkd_dist.data.augment import augment
from pkd_dist.data.columns import TextColumn
from pkd_dist.data.tasks import Task
from pkd_dist.data.text import Split, is_labelled
from pkd_dist.telemetry.log import log

DISTILL = "distill"


def prepare(
    config: TaskConfig,
    task: Task,
    classes: Sequence[str] | None,
    tokenizer: Any,
    folder: Path,
    check: Callable[[], None],
) -> tuple[dict[str, Split], dict[str, dict[str, Any]]]:
    """Reads, tokenises and writes all of a task's text.

    Args:
        classes: label values in class order; None: the task's own, else those of train.
        check: called now and then; what it raises ends the work.

    Returns:
        The text, and of each token set `source`, `examples`, `labelled`, `digest`, `input_digest`, `tokens`,
        `longest`, `truncated`, `notes` and, of a classification, `per_class`.

    Raises:
        UserError: whatever is wrong, with file and line.
    """
    splits = {"train": text.read(config.data, "train", task, classes)}
    known = splits["train"].classes or None
    for name in text.available(config.data, task)[1:]:
        splits[name] = text.read(config.data, name, task, known)
        check()
    if more := list(_more(config, task, splits, tokenizer.mask_token)):
        splits[DISTILL] = _joined([splits["train"], *more])
    return splits, {
        name: _tokenized(split, tokenizer, config.max_length, folder / name, check) for name, split in splits.items()
    }


def _more(config: TaskConfig, task: Task, splits: dict[str, Split], mask_token: str | None) -> Iterator[Split]:
    """Text without labels, none of which stands in a split or twice."""
    unlabeled = []
    if config.unlabeled:
        unlabeled = [text.without(text.read_unlabeled(config.unlabeled, task), *splits.values())]
        yield from unlabeled
    if config.augment:
        made = augment(splits["train"], config.augment, mask_token)
        yield text.without(made, *splits.values(), *unlabeled)


def _joined(splits: Sequence[Split]) -> Split:
    return Split(
        np.concatenate([split.ids_N for split in splits]),
        tuple(TextColumn(itertools.chain(*columns)) for columns in zip(*(s.texts for s in splits), strict=True)),
        np.concatenate([split.labels_N for split in splits]),
        splits[0].classes,
        " + ".join(split.source for split in splits),
        tuple(note for split in splits[1:] for note in split.notes),
    )


def _tokenized(
    split: Split, tokenizer: Any, max_length: int, folder: Path, check: Callable[[], None]
) -> dict[str, Any]:
    made = tokens.tokenize(split, tokenizer, max_length, folder, check)
    labelled = is_labelled(split.labels_N)
    out: dict[str, Any] = {
        "source": split.source,
        "examples": len(made),
        "labelled": int(labelled.sum()),
        "digest": made.digest,
        "input_digest": made.input_digest,
        "tokens": int(made.lengths_N.sum()),
        "longest": int(made.lengths_N.max()),
        "truncated": made.truncated,
        "notes": list(split.notes),
    }
    if split.classes:
        out["per_class"] = np.bincount(split.labels_N[labelled], minlength=len(split.classes)).tolist()
    without = "" if labelled.all() else f", {out['examples'] - out['labelled']} of them without a label"
    cut = f", {made.truncated} cut to {max_length}" if made.truncated else ""
    log.info("data: %s: %d examples%s, %d tokens%s", split.source, len(made), without, out["tokens"], cut)
    for note in split.notes:
        log.info("data: %s: %s", split.source, note)
    return out
