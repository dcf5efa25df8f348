"""`pkd prepare`: what is in a data folder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from pkd_dist.cli.options import (
    DEMO_DATA,
    FileSplitSettings,
    Gap,
    LabelColumn,
    LabelIs,
    LabelSeparator,
    OptionColumns,
    TaskKind,
    TextColumns,
    columns_of,
    data_or_demo,
    named_as_options,
    run_command,
    split_overrides,
    task_overrides,
)
from pkd_dist.data.tasks import GLUE

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from pkd_dist.data.examples import Split


def prepare(
    task: Annotated[str, typer.Option(help=f"A GLUE task ({', '.join(GLUE)}), race, or `custom`.")] = "sst2",
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder with train, dev (or validation) and optionally test as .tsv, .csv, .jsonl, .json or .parquet, all "
            "but the last also as .gz, or in the layout of GLUE or RACE; one such file, which is split; or "
            f"hub:NAME or hub:NAME:CONFIGURATION. Default, for sst2 only: the demo data, {DEMO_DATA}."
        ),
    ] = None,
    text: TextColumns = None,
    label: LabelColumn = None,
    kind: TaskKind = None,
    label_separator: LabelSeparator = None,
    options: OptionColumns = None,
    label_is: LabelIs = None,
    gap: Gap = None,
    split_setting: FileSplitSettings = None,
    duplicates: Annotated[
        str, typer.Option(help="Texts in several splits: keep and report them, drop them, or refuse.")
    ] = "keep",
    model: Annotated[
        str | None,
        typer.Option(
            help="Teacher (folder, hub name or package:NAME): also count tokens, and those that student.vocabulary used "
            "keeps. Default: count words only."
        ),
    ] = None,
    max_length: Annotated[
        int, typer.Option(help="With --model: maximum input length in tokens; longer inputs are truncated.")
    ] = 128,
) -> None:
    """Check a data folder, or a file and how it is split: counts, classes, lengths, rows left out, duplicates.

    Example: pkd prepare --task sst2 --data data/movie-reviews

    Example: pkd prepare --task custom --data tickets.csv --text body --label queue --split-setting group=customer_id
    """

    def work() -> None:
        folder = data_or_demo(data, task)
        settings = {
            "name": task, "data": folder, "text": text, "label": columns_of(label), "kind": kind,
            "label_separator": label_separator, "options": columns_of(options), "label_is": label_is, "gap": gap,
            "duplicates": duplicates,
        }  # fmt: skip
        overrides = [*task_overrides(settings), *split_overrides(split_setting)]
        if task == "custom" and not label:
            overrides.append("task.label=null")
        with named_as_options():
            _prepare(folder, [*overrides, f"task.max_length={max_length}"], model, max_length)

    run_command(work)


def _prepare(data: str, overrides: list[str], model: str | None, max_length: int) -> None:
    from pkd_dist.config.load import load
    from pkd_dist.data import summary, tasks, text
    from pkd_dist.telemetry.markup import console

    task = tasks.resolve(load(None, ["run.dir=unused", *overrides]).task)
    if not task.multilabel:
        task = replace(task, unlabelled_train="accept")
    token_lengths = _token_lengths(model) if model is not None else None
    splits = text.read_all(data, task)
    print("\n".join(summary.all_notes(splits)) + "\n")
    terminal = console()
    terminal.width = max(terminal.width, 0 if terminal.is_terminal else 140)
    terminal.print(summary.splits_table(splits, max_length, token_lengths))
    if not task.regression and task.has_labels:
        terminal.print()
        terminal.print(summary.classes_table(splits, task))
    if model is not None:
        print("\n" + _vocabulary_line(model, splits["train"], max_length))


def _token_lengths(model: str) -> Callable[[Split], np.ndarray]:
    """Return a function from a split to the number of tokens of each example, (N,)."""
    import numpy as np

    from pkd_dist.model import encoder

    tokenizer = encoder.load_tokenizer(encoder.locate(model, "--model"))

    def lengths(split: Split) -> np.ndarray:
        encoded = tokenizer(*split.inputs(), truncation=False, verbose=False)["input_ids"]
        return np.array([len(ids) for ids in encoded]).reshape(-1, split.options).max(axis=1)

    return lengths


def _vocabulary_line(model: str, train: Split, max_length: int) -> str:
    """Say how many tokens a student of `student.vocabulary: used` keeps, and how large their embedding is."""
    import numpy as np

    from pkd_dist.data import tokens, trimming
    from pkd_dist.errors import UserError
    from pkd_dist.model import encoder, vocabulary

    folder = encoder.locate(model, "--model")
    config, tokenizer = encoder.load_config(folder, "--model"), encoder.load_tokenizer(folder, "--model")
    try:
        trimming.require_trimmable(tokenizer)
    except UserError as refused:
        return str(refused)
    encoded, _ = tokens.encode(tokenizer, train.inputs(), 1, max_length, only_first=train.choices is not None)
    counts_V = trimming.count_tokens([np.concatenate(encoded[0])], config.vocab_size)
    kept = len(trimming.kept_ids(tokenizer, counts_V, 1, vocabulary.required_ids(config)))
    width = getattr(config, "embedding_size", None) or config.hidden_size
    before, after = (4e-6 * width * count for count in (config.vocab_size, kept))
    return (
        f"student.vocabulary: used keeps {kept:,} of {len(tokenizer):,} tokens; in float32 their embedding takes "
        f"{after:.1f} MB instead of {before:.1f}"
    )
