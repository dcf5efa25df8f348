"""`pkd predict`: sentences in, one JSON object a line out, with any fine-tuned folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pkd_dist.errors import UserError
from pkd_dist.evaluation.answer import answer, is_empty
from pkd_dist.model import encoder
from pkd_dist.model.compatibility import longest_input


def lines(file: str) -> Iterator[tuple[str, str]]:
    """(where, text) of each line of a file, or of standard input (`-`); blank lines are left out.

    Raises:
        UserError: it cannot be read, or a line is not UTF-8.
    """
    name = "standard input" if file == "-" else file
    try:
        source = sys.stdin.buffer if file == "-" else Path(file).open("rb")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"--file: {file} cannot be read ({error.strerror})") from None
    with source:
        for number, line in enumerate(source, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{name}:{number}: byte 0x{line[error.start]:02x} is not valid UTF-8; save the text as UTF-8"
                ) from None
            if text.strip():
                yield f"{name}:{number}", text


def predict(
    model: str, texts: Iterable[tuple[str, str]], pair: bool, max_length: int | None, batch_size: int
) -> Iterator[str]:
    """Answers in the order of the texts, as JSON: `text` (and `text_pair`), then `label`, `probability` and
    `probabilities` by class name, or `value` of a regression.

    Args:
        model: folder or hub name of a fine-tuned sequence classifier.
        texts: (where it stands, text); of a pair the two halves are separated by a tab.
        max_length: tokens; longer texts are cut. None: 128, or what the model can read where that is less.

    Raises:
        UserError: the model cannot be used, or a text is empty or not a pair.
    """
    folder = encoder.locate(model, "--model")
    classifier: Any = encoder.load_model(folder, "--model")
    tokenizer = encoder.load_tokenizer(folder, "--model")
    if tokenizer.pad_token_id is None:
        raise UserError(f"--model: the tokenizer of {model} has no padding token; give it one (pad_token)")
    longest = longest_input(classifier.config)
    max_length = max_length or min(128, longest or 128)
    if longest and max_length > longest:
        raise UserError(f"--max-length: {max_length} is more than {model} can read; give at most {longest}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier.to(device)
    for batch in _batches(texts, pair, batch_size):
        columns = [list(column) for column in zip(*batch, strict=True)]
        inputs = tokenizer(*columns, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        with torch.inference_mode():
            logits_BC = classifier(**encoder.accepted(classifier, inputs.to(device))).logits.float().cpu()
        for parts, logits_C in zip(batch, logits_BC, strict=True):
            given = dict(zip(("text", "text_pair"), parts, strict=False))
            yield json.dumps(given | answer(logits_C.numpy(), classifier.config.id2label), ensure_ascii=False)


def _batches(texts: Iterable[tuple[str, str]], pair: bool, size: int) -> Iterator[list[Sequence[str]]]:
    """Of checked texts; what stands before one that cannot be answered is answered before that is said."""
    batch: list[Sequence[str]] = []
    try:
        for where, text in texts:
            batch.append(_checked(where, text, pair))
            if len(batch) == size:
                yield batch
                batch = []
    except UserError as error:
        if batch:
            yield batch
        raise error
    if batch:
        yield batch


def _checked(where: str, text: str, pair: bool) -> Sequence[str]:
    parts = text.split("\t") if pair else [text]
    if pair and len(parts) != 2:
        raise UserError(f"{where}: --pair needs two texts separated by one tab, here are {len(parts)}")
    if any(map(is_empty, parts)):
        raise UserError(f"{where}: the text is empty; every line needs one")
    if any("\ud800" <= letter <= "\udfff" for part in parts for letter in part):
        raise UserError(f"{where}: the text is not UTF-8")
    return parts
