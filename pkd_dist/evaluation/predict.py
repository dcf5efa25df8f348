"""`pkd predict`: examples in, one answer each out, with any fine-tuned classifier.

examples -> batches -> tokens, truncated as in training -> logits -> answers, in the order of the examples
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch

from pkd_dist.data.choices import Choices
from pkd_dist.data.class_mapping import (
    is_multilabel,
    is_regression_by_default,
    output_names,
    require_distinct_names,
    require_supported_outputs,
)
from pkd_dist.data.json_rows import as_json
from pkd_dist.data.tokens import encode
from pkd_dist.errors import UserError
from pkd_dist.evaluation.answer import Answer, answer, choice
from pkd_dist.evaluation.inputs import Example
from pkd_dist.evaluation.scoring import forward_of
from pkd_dist.model import encoder
from pkd_dist.model.compatibility import longest_input, usual_length
from pkd_dist.model.head import is_multiple_choice

TEXTS = ("text", "text_pair")
OWN_KEYS = (*TEXTS, "label", "probability", "probabilities", "value", "labels", "scores", "truncated")
CHOICE_KEYS = (*TEXTS, "options", "choice", "option", "probability", "probabilities", "truncated")
"""Keys of an answer, and of one that is a choice; a column of the same name becomes `input_NAME`."""


class Predictor:
    """A fine-tuned classifier that answers examples, or a model that chooses among their options.

    Args:
        model: Its folder or hub name.
        max_length: Tokens; longer texts are truncated. None: see `usual_length`.
        choices: How options become pairs of texts; None: examples have none.

    Attributes:
        answered, truncated: Number of examples so far.
        regression_by_default: see `is_regression_by_default`.

    Raises:
        UserError: The model cannot be used.
    """

    def __init__(self, model: str, max_length: int | None = None, choices: Choices | None = None):
        folder = encoder.locate(model, "--model")
        config = encoder.load_config(folder, "--model")
        if is_multiple_choice(config) and not choices:
            raise UserError(
                f"is missing; {model} chooses among options: name their column, or one for each", "--options"
            )
        encoder.require_classifier(folder, model, "--model", multiple_choice=choices is not None)
        self._choices, self._names = choices, dict(enumerate(output_names(config)))
        self.regression_by_default, self._multilabel = False, is_multilabel(config)
        if not choices:
            kind = getattr(config, "problem_type", None)
            require_supported_outputs(kind, len(self._names), model, "--model", multilabel=True)
            require_distinct_names(list(self._names.values()), model, "--model")
            self.regression_by_default = is_regression_by_default(config)
        classifier = encoder.load_model(folder, "--model")
        self._tokenizer = encoder.load_tokenizer(folder, "--model")
        if self._tokenizer.pad_token_id is None:
            raise UserError(f"the tokenizer of {model} has no padding token; give it one (pad_token)", "--model")
        longest = longest_input(classifier.config)
        if max_length and longest and max_length > longest:
            raise UserError(f"{max_length} is more than {model} can read; give at most {longest}", "--max-length")
        self.max_length = max_length or usual_length(classifier.config, self._tokenizer)
        self.answered = self.truncated = 0
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.nn.Module.to(classifier, self._device)
        self._forward = forward_of(classifier)

    def __call__(self, examples: Iterable[Example], batch_size: int) -> Iterator[dict[str, object]]:
        """Yield an answer for each example, in order: `text` (and `text_pair`, `options`), its other columns, the keys of `answer` or
        `choice`.

        Raises:
            UserError: `examples` raised it; those before it are answered first.
        """
        for batch in _batches(examples, batch_size):
            yield from self._answers(batch)

    def _answers(self, batch: Sequence[Example]) -> Iterator[dict[str, object]]:
        names = ("input_ids", "token_type_ids")[: 1 + ("token_type_ids" in self._tokenizer.model_input_names)]
        columns = [list(column) for column in zip(*(example.texts for example in batch), strict=True)]
        if self._choices:
            columns = self._choices.pairs(columns)
        encoded, long = encode(
            self._tokenizer, columns, len(names), self.max_length, only_first=self._choices is not None
        )
        each = len(encoded[0]) // len(batch)  # the options of an example follow each other
        truncated = {row // each for row in long}
        given = dict(zip(names, encoded, strict=True))
        inputs = self._tokenizer.pad(given, return_attention_mask=True, return_tensors="pt")
        with torch.inference_mode():
            on_device = {name: value.to(self._device) for name, value in inputs.items()}
            if self._choices:
                on_device = {name: value.unflatten(0, (-1, each)) for name, value in on_device.items()}
            logits_BC = self._forward(on_device).float().cpu().numpy()
        self.answered += len(batch)
        self.truncated += len(truncated)
        for row, (example, logits_C) in enumerate(zip(batch, logits_BC, strict=True)):
            yield self._answer(example, logits_C, row in truncated)

    def _answer(self, example: Example, logits_C: np.ndarray, truncated: bool) -> Answer:
        if not self._choices:
            texts = dict(zip(TEXTS, example.texts, strict=False))
            found = answer(logits_C, self._names, truncated, self._multilabel)
            return {**texts, **_kept(example.columns, OWN_KEYS), **found}
        options = list(self._choices.options(example.texts))
        texts = dict(zip(TEXTS, example.texts[: -len(options)], strict=False))
        return {
            **texts, "options": options, **_kept(example.columns, CHOICE_KEYS), **choice(logits_C, options, truncated)
        }  # fmt: skip


def _batches(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    """Yield batches; the examples before an invalid one come before its error."""
    batch: list[Example] = []
    try:
        for example in examples:
            batch.append(example)
            if len(batch) == size:
                yield batch
                batch = []
    except UserError as error:
        if batch:
            yield batch
        raise error
    if batch:
        yield batch


def _kept(columns: Mapping[str, object], own_keys: Sequence[str]) -> dict[str, object]:
    """Return the other columns of a row as JSON can hold them, under names that no answer has."""
    kept: dict[str, object] = {}
    for column, value in columns.items():
        name = column
        while name in own_keys or (name != column and name in columns):
            name = f"input_{name}"
        kept[name] = as_json(value)
    return kept
