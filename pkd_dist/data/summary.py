"""Tables that describe a data set, for `pkd prepare`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from rich.table import Table

from pkd_dist.data.duplicates import Hashed, Overlap
from pkd_dist.data.examples import Split, class_counts, is_labelled
from pkd_dist.data.tasks import Task
from pkd_dist.telemetry.markup import printable, table

_MAX_CLASSES = 20
TokenLengths = Callable[[Split], np.ndarray]
"""Split -> number of tokens of each example (N,), not truncated."""


def splits_table(splits: Mapping[str, Split], max_length: int, token_lengths: TokenLengths | None) -> Table:
    """Return a table with one row per split: size, lengths, repeated texts, and texts that are also in train.

    Args:
        splits: by name; includes train.
        max_length: longest input, in tokens.
        token_lengths: None: without the column of token counts.
    """
    made = table("", "examples", "words p50, p95, max", "repeated", "also in train", "labels")
    if token_lengths:
        made.add_column(f"tokens p50, p95; over {max_length}", justify="right")
    hashed = {name: Hashed(split) for name, split in splits.items()}
    for name, split in splits.items():
        words_N = np.sum([[len(text.split()) for text in column] for column in split.texts], axis=0)
        cells = [f"{len(split):,}", f"{_quantiles(words_N)}, {words_N.max()}", _overlap(hashed[name].overlap(None))]
        cells += ["" if name == "train" else _overlap(hashed[name].overlap(hashed["train"])), _labels(split)]
        if token_lengths:
            lengths_N = token_lengths(split)
            cells.append(f"{_quantiles(lengths_N)}; {(lengths_N > max_length).mean():.1%}")
        made.add_row(name, *cells)
    return made


def classes_table(splits: Mapping[str, Split], task: Task) -> Table:
    """Return a table with one row per class, or place of the right option: count and share in each labeled split.

    Beyond 20 classes, only the most frequent are shown.
    """
    classes = splits["train"].classes
    labelled = {name: split for name, split in splits.items() if is_labelled(split.labels_N).any()}
    count_SC = np.array([class_counts(s.labels_N, len(classes)) for s in labelled.values()])
    total_S = [len(split) for split in labelled.values()]
    made = table("right option" if task.multiple_choice else "class", *labelled)

    def add(name: str, count_S: np.ndarray) -> None:
        shares = zip(count_S, total_S, strict=True)
        made.add_row(printable(name), *(f"{count:,} ({count / total:.1%})" for count, total in shares))

    names = task.names_of(classes)
    order = np.argsort(-count_SC[0], kind="stable") if len(classes) > _MAX_CLASSES else np.arange(len(classes))
    for i in order[:_MAX_CLASSES]:
        add(names[i], count_SC[:, i])
    rest = order[_MAX_CLASSES:]
    if len(rest):
        low, high = count_SC[0, rest].min(), count_SC[0, rest].max()
        rest_S = count_SC[:, rest].sum(axis=1)
        if task.multilabel:  # a text that has several of them counts once
            rest_S = np.array([int(split.labels_N[:, rest].any(axis=1).sum()) for split in labelled.values()])
        add(f"{len(rest)} more, {low:,} to {high:,} each in {next(iter(labelled))}", rest_S)
    if task.multilabel:
        add("no class", np.array([int((split.labels_N.sum(axis=1) == 0).sum()) for split in labelled.values()]))
    return made


def _quantiles(values_N: np.ndarray) -> str:
    return ", ".join(f"{value:.0f}" for value in np.percentile(values_N, [50, 95]))


def _overlap(overlap: Overlap) -> str:
    return f"{overlap.found:,}" + (f" ({overlap.relabelled:,} with another label)" if overlap.relabelled else "")


def _labels(split: Split) -> str:
    labels_N = split.labels_N
    if not is_labelled(labels_N).any():
        return "unlabeled"
    if labels_N.ndim == 2:
        return f"{int(labels_N.any(axis=0).sum())} classes, {labels_N.sum(axis=1).mean():.2f} a text"
    if labels_N.dtype.kind == "f":
        return f"{labels_N.min():g} to {labels_N.max():g}, mean {labels_N.mean():.2f}"
    return f"{split.options} options" if split.choices else f"{len(np.unique(labels_N))} classes"


def all_notes(splits: Mapping[str, Split]) -> Iterator[str]:
    """Yield lines that say where each split was read from and what was skipped."""
    for name, split in splits.items():
        yield f"{name}: {split.source}"
        yield from (f"  {note}" for note in split.notes)
