"""An export as it is served: verified, loaded, texts in and answers out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pkd_dist.errors import UserError
from pkd_dist.evaluation.answer import answer
from pkd_dist.export import manifest
from pkd_dist.export.runtime import ONNX_FILES, OnnxModel
from pkd_dist.model.encoder import load_tokenizer


class ServedModel:
    """The ONNX file of an export, with its tokenizer and its class names.

    Args:
        folder: of the export; verified first.
        format: `onnx`, `onnx-fp16` or `onnx-int8`; None: int8 where it is there, else float32, else float16.
        threads: of ONNX Runtime; None: one for each core.

    Attributes:
        pair: whether a text has two halves.
        about: what `/healthz` says of it.

    Raises:
        UserError: the export is damaged, or has no such file.
    """

    def __init__(self, folder: Path, format: str | None = None, threads: int | None = None):
        made = manifest.verify(folder)
        if absent := {"task", "max_length", "pair"} - made.keys():
            raise UserError(f"{folder / manifest.MANIFEST}: does not say {sorted(absent)[0]}; export it again")
        there = [name for name in ("onnx-int8", "onnx", "onnx-fp16") if ONNX_FILES[name] in made["files"]]
        if not there or (format and format not in there):
            wanted = format or "onnx"
            raise UserError(
                f"{folder}: holds no file of the format {wanted} that can be served (it has {', '.join(made.get('formats', []))}; "
                f"served are {', '.join(ONNX_FILES)}); export it with one of them in export.formats"
            )
        chosen = format or there[0]
        self._model = OnnxModel(folder / ONNX_FILES[chosen], threads, gpu=True)
        self._tokenizer = load_tokenizer(str(folder), "DIR")
        names = json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"]
        self._names = {int(number): name for number, name in names.items()}
        self._max_length, self.pair = int(made["max_length"]), bool(made["pair"])
        self.about = {"file": ONNX_FILES[chosen], "sha256": made["files"][ONNX_FILES[chosen]], "task": made["task"]}
        self.answer([("warm", "up")[: 1 + self.pair]])

    def answer(self, texts: Sequence[tuple[str, ...]]) -> list[dict[str, Any]]:
        """What `pkd predict` says of each, in order."""
        columns = [list(column) for column in zip(*texts, strict=True)]
        inputs = self._tokenizer(
            *columns, truncation=True, max_length=self._max_length, padding=True, return_tensors="np"
        )
        return [answer(logits_C, self._names) for logits_C in self._model(inputs)]
