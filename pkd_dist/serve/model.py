"""The served model: a verified export, loaded; texts in, answers out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pkd_dist.data.choices import Choices
from pkd_dist.data.class_mapping import MULTI_LABEL, require_distinct_names, require_supported_outputs
from pkd_dist.errors import UserError
from pkd_dist.evaluation.answer import Answer, answer, choice
from pkd_dist.export import manifest
from pkd_dist.export.runtime import ONNX_FILES, PREFERRED, OnnxModel
from pkd_dist.serve.tokenizer import ServingTokenizer, Texts

_OMITTED_NAMES = {"0": "LABEL_0", "1": "LABEL_1"}
"""transformers leaves these class names, its default, out of config.json."""


class ServedModel:
    """An ONNX file of an export, with the export's tokenizer and class names.

    Args:
        folder: The export; every file is verified first.
        format: `onnx`, `onnx-fp16` or `onnx-int8`; None: int8 if the export has it, else float32, else float16.
        threads: Threads of ONNX Runtime; None: one per core.

    Attributes:
        pair: Whether an input is a pair of texts.
        choices: How the options of an input become pairs of texts; None: it has no options.
        about: What `/healthz` reports.

    Raises:
        UserError: The export is damaged, has no such file, or its model gives something else than a class or a number.
    """

    def __init__(self, folder: Path, format: str | None = None, threads: int | None = None):
        made = manifest.verify(folder)
        if missing := {"task", "max_length", "pair"} - made.keys():
            raise UserError(f"{folder / manifest.MANIFEST}: {sorted(missing)[0]} is missing; export it again")
        available = [name for name in PREFERRED if ONNX_FILES[name] in made["files"]]
        if not available or (format and format not in available):
            raise UserError(
                f"{folder}: has no file of the format {format or 'onnx'} (it has {', '.join(made.get('formats', []))}; pkd serve "
                f"takes {', '.join(ONNX_FILES)}); add one of them to export.formats and export again"
            )
        self.pair = bool(made["pair"])
        self.choices = Choices(self.pair, made.get("gap")) if "options" in made else None
        self._names, self._multilabel = ({}, False) if self.choices else _classes(folder)
        file = ONNX_FILES[format or available[0]]
        figures: Mapping[str, object] = made.get("files_on_dev", {}).get(file, {})
        # int8 files of 0.1.0 have one scale for a batch: the texts beside it would change the answer to a text.
        self._one_by_one = file == ONNX_FILES["onnx-int8"] and "batch_effect" not in figures
        self._model = OnnxModel(folder / file, threads, gpu=True)
        self._tokenizer = ServingTokenizer(folder, int(made["max_length"]), only_first=self.choices is not None)
        self.about = {
            "file": file, "sha256": made["files"][file], "task": made["task"], "max_length": made["max_length"],
        }  # fmt: skip
        self.answer([(*("warm", "up")[: 1 + self.pair], *(("a", "b") if self.choices else ()))])

    def answer(self, texts: Sequence[Texts]) -> list[Answer]:
        """Return the answers to the texts, in order; each is the one that `pkd predict` gives."""
        if self._one_by_one and len(texts) > 1:
            return [self.answer([text])[0] for text in texts]
        if self.choices:
            return self._choose(self.choices, texts)
        inputs, truncated = self._tokenizer.encode(texts)
        return [
            answer(row_C, self._names, cut, self._multilabel)
            for row_C, cut in zip(self._model(inputs), truncated, strict=True)
        ]

    def _choose(self, choices: Choices, texts: Sequence[Texts]) -> list[Answer]:
        """Return the answers to examples with options, in order; those with equally many run together."""
        found: dict[int, Answer] = {}
        for count in sorted({choices.count(text) for text in texts}):
            rows = [row for row, text in enumerate(texts) if choices.count(text) == count]
            contexts, seconds = choices.pairs(list(zip(*(texts[row] for row in rows), strict=True)))
            inputs, cut = self._tokenizer.encode(list(zip(contexts, seconds, strict=True)))
            logits_BC = self._model({name: ids.reshape(-1, count, ids.shape[1]) for name, ids in inputs.items()})
            for i, row in enumerate(rows):
                truncated = any(cut[i * count : (i + 1) * count])
                found[row] = choice(logits_BC[i], choices.options(texts[row]), truncated)
        return [found[row] for row in range(len(texts))]


def _classes(folder: Path) -> tuple[dict[int, str], bool]:
    """Return the class names by index, and whether a text can have several of them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = {int(number): name for number, name in config.get("id2label", _OMITTED_NAMES).items()}
    kind = config.get("problem_type")
    require_supported_outputs(kind, len(names), str(folder), None, multilabel=True)
    require_distinct_names(list(names.values()), str(folder), None)
    return names, kind == MULTI_LABEL
