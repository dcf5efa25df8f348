"""Turn all text of a task into token sets.

Every split is read (`text.py`), more text for the teacher to label is added where the configuration asks for it, and each
result is tokenized into a folder of its own (`tokens.py`):

FOLDER/train, dev, test, ...   the splits that the data has
FOLDER/distill                 train plus unlabeled and augmented text; only if there is any
FOLDER/parts                   the splits of one file as tables
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pkd_dist.config.task import Task as TaskConfig
from pkd_dist.data import parts, text, tokens
from pkd_dist.data.augment import augment
from pkd_dist.data.columns import TextColumn
from pkd_dist.data.examples import Split, class_counts, is_labelled, without
from pkd_dist.data.neighbours import Neighbours
from pkd_dist.data.sources import is_file
from pkd_dist.data.tasks import Task
from pkd_dist.telemetry.log import log

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DISTILL, PARTS = "distill", "parts"


@dataclass(frozen=True)
class TokenSetSummary:
    """What a run records about one token set. `TokenSetSummary(**summary.as_dict())` is equal to `summary`.

    Attributes:
        source: file or hub split that the text comes from.
        examples: number of examples.
        labelled: number of examples with a label.
        digest, input_digest, truncated: see `TokenSet`.
        tokens: total number of tokens.
        longest: tokens of the longest example, or option of one.
        notes: what was skipped and why, for people.
        per_class: labeled examples of each class, or place of the right option, in order; None for a regression.
    """

    source: str
    examples: int
    labelled: int
    digest: str
    input_digest: str
    tokens: int
    longest: int
    truncated: int
    notes: list[str]
    per_class: list[int] | None = None

    def as_dict(self) -> dict[str, object]:
        """Return the fields as JSON values, without `per_class` for a regression."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def prepare(
    config: TaskConfig,
    task: Task,
    classes: Sequence[str] | None,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    check: Callable[[], None],
    read_embeddings: Callable[[], np.ndarray],
) -> tuple[dict[str, Split], dict[str, TokenSetSummary]]:
    """Read, tokenize and write all text of a task.

    Args:
        config: the `task` section.
        task: the resolved task.
        classes: label values in class order; None: the task's own, else those found in train.
        tokenizer: the teacher's.
        folder: receives one folder per token set.
        check: called between chunks of work; an exception it raises stops the work.
        read_embeddings: returns the teacher's word embeddings (V, H); called only for `task.augment.neighbours`.

    Returns:
        The text and the summary of each token set, by name.

    Raises:
        UserError: invalid data; the message names the file and line.
    """
    splits = text.read_all(config.data, task, classes, check)
    if is_file(config.data):
        parts.write(folder / PARTS, config.data, splits, task)
    if config.unlabeled or config.augment:
        more = list(_unlabelled_splits(config, task, splits, tokenizer, read_embeddings))
        augmented = len(more[-1]) if config.augment else 0
        splits[DISTILL] = dataclasses.replace(_concatenate([splits["train"], *more]), augmented=augmented)
    return splits, write_tokens(splits, tokenizer, config.max_length, folder, check)


def write_tokens(
    splits: Mapping[str, Split],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    folder: Path,
    check: Callable[[], None],
    mask_token: str | None = None,
) -> dict[str, TokenSetSummary]:
    """Tokenize splits, each into FOLDER/NAME, and return their summaries; `mask_token`: see `tokens.tokenize`."""
    return {
        name: _tokenize(split, tokenizer, max_length, folder / name, check, mask_token)
        for name, split in splits.items()
    }


def _unlabelled_splits(
    config: TaskConfig,
    task: Task,
    splits: dict[str, Split],
    tokenizer: PreTrainedTokenizerBase,
    read_embeddings: Callable[[], np.ndarray],
) -> Iterator[Split]:
    """Yield the unlabeled and the augmented text, without repeats and without texts of the splits."""
    unlabeled = []
    if config.unlabeled:
        classes = splits["train"].classes
        unlabeled = [without(text.read_unlabeled(config.unlabeled, task, classes), *splits.values())]
        yield from unlabeled
    if config.augment:

        def make_neighbours(words: Iterable[str]) -> Neighbours:
            return Neighbours(tokenizer, read_embeddings(), words)

        others = [split for name, split in splits.items() if name != "train"] + unlabeled
        yield augment(splits["train"], config.augment, tokenizer.mask_token, make_neighbours, others)


def _concatenate(splits: Sequence[Split]) -> Split:
    return Split(
        np.concatenate([split.ids_N for split in splits]),
        tuple(TextColumn(itertools.chain(*columns)) for columns in zip(*(s.texts for s in splits), strict=True)),
        np.concatenate([split.labels_N for split in splits]),
        splits[0].classes,
        " + ".join(split.source for split in splits),
        tuple(note for split in splits[1:] for note in split.notes),
        choices=splits[0].choices,
    )


def _tokenize(
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    folder: Path,
    check: Callable[[], None],
    mask_token: str | None,
) -> TokenSetSummary:
    token_set = tokens.tokenize(split, tokenizer, max_length, folder, check, mask_token)
    labelled_N = is_labelled(split.labels_N)
    per_class = None
    if split.classes:
        per_class = class_counts(split.labels_N, len(split.classes)).tolist()
    summary = TokenSetSummary(
        source=split.source,
        examples=len(token_set),
        labelled=int(labelled_N.sum()),
        digest=token_set.digest,
        input_digest=token_set.input_digest,
        tokens=len(token_set.input_ids_T),
        longest=int(token_set.lengths_N.max()),
        truncated=token_set.truncated,
        notes=list(split.notes),
        per_class=per_class,
    )
    _log(summary, max_length)
    return summary


def _log(summary: TokenSetSummary, max_length: int) -> None:
    unlabelled = summary.examples - summary.labelled
    log.info(
        "data: %s: %d examples%s, %d tokens%s",
        summary.source,
        summary.examples,
        f" ({unlabelled} unlabeled)" if unlabelled else "",
        summary.tokens,
        f" ({summary.truncated} examples truncated to {max_length} tokens)" if summary.truncated else "",
    )
    for note in summary.notes:
        log.info("data: %s: %s", summary.source, note)
