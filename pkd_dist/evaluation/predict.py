"""`pkd predict`: texts in, one JSON object per line out, with any fine-tuned classifier.

lines of a file -> checked texts -> batches -> logits -> JSON lines, in the order of the texts
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from pkd_dist.data.class_mapping import output_names, require_supported_outputs
from pkd_dist.errors import UserError
from pkd_dist.evaluation.answer import answer, is_empty
from pkd_dist.evaluation.scoring import forward_of
from pkd_dist.model import encoder
from pkd_dist.model.compatibility import longest_input


def lines(file: str) -> Iterator[tuple[str, str]]:
    """Yield (place, text) for each non-blank line of a file, or of standard input (`-`).

    Raises:
        UserError: The file cannot be read, or a line is not UTF-8.
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
    """Yield one JSON object for each text, in order: `text` (and `text_pair`), then the keys of `answer`.

    Args:
        model: Folder or hub name of a fine-tuned sequence classifier.
        texts: (place, text), where the place is for error messages; a tab separates the two texts of a pair.
        max_length: Tokens; longer texts are truncated. None: 128, or the model's limit if that is lower.

    Raises:
        UserError: The model cannot be used, or a text is empty or not a pair. Earlier texts are answered first.
    """
    folder = encoder.locate(model, "--model")
    encoder.require_classifier(folder, model, "--model")
    require_supported_outputs(encoder.load_config(folder, "--model"), model, "--model")
    classifier = encoder.load_model(folder, "--model")
    tokenizer = encoder.load_tokenizer(folder, "--model")
    if tokenizer.pad_token_id is None:
        raise UserError(f"the tokenizer of {model} has no padding token; give it one (pad_token)", "--model")
    longest = longest_input(classifier.config)
    max_length = max_length or min(128, longest or 128)
    if longest and max_length > longest:
        raise UserError(f"{max_length} is more than {model} can read; give at most {longest}", "--max-length")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.nn.Module.to(classifier, device)
    forward, names = forward_of(classifier), dict(enumerate(output_names(classifier.config)))
    for batch in _batches(texts, pair, batch_size):
        columns = [list(column) for column in zip(*batch, strict=True)]
        inputs = tokenizer(*columns, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        with torch.inference_mode():
            logits_BC = forward(inputs.to(device)).float().cpu().numpy()
        for halves, logits_C in zip(batch, logits_BC, strict=True):
            given = dict(zip(("text", "text_pair"), halves, strict=False))
            yield json.dumps(given | answer(logits_C, names), ensure_ascii=False)


def _batches(texts: Iterable[tuple[str, str]], pair: bool, size: int) -> Iterator[list[Sequence[str]]]:
    """Yield batches of checked texts; those before an invalid text come before its error."""
    batch: list[Sequence[str]] = []
    try:
        for place, text in texts:
            batch.append(_checked(place, text, pair))
            if len(batch) == size:
                yield batch
                batch = []
    except UserError as error:
        if batch:
            yield batch
        raise error
    if batch:
        yield batch


def _checked(place: str, text: str, pair: bool) -> Sequence[str]:
    """Return the one or two texts of a line.

    Raises:
        UserError: A text is empty or not UTF-8, or the line is not a pair.
    """
    halves = text.split("\t") if pair else [text]
    if pair and len(halves) != 2:
        raise UserError(f"{place}: --pair needs two texts separated by one tab, but this line has {len(halves)}")
    if any(map(is_empty, halves)):
        raise UserError(f"{place}: the text is empty; every line needs one")
    if any("\ud800" <= character <= "\udfff" for half in halves for character in half):
        raise UserError(f"{place}: the text is not UTF-8")
    return halves
