"""An export, whole or not at all: the Hugging Face folder, the files to serve it from, and what proves them.

student -> safetensors, ONNX (float32 -> float16, int8), torch.export, Triton -> every file on all of dev
        -> model card -> manifest -> the folder gets its name
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from pkd_dist.data.batches import collate, scoring_batches
from pkd_dist.data.tasks import Task
from pkd_dist.data.tokens import TokenSet
from pkd_dist.errors import UserError
from pkd_dist.evaluation.metrics import agreement, scores
from pkd_dist.evaluation.scoring import answers
from pkd_dist.evaluation.speed import machine, speed
from pkd_dist.export import hf, manifest, onnx, triton
from pkd_dist.export.runtime import ONNX_FILES, OnnxModel
from pkd_dist.files import remove, require_space, write_atomically
from pkd_dist.model.encoder import accepted, save_model
from pkd_dist.telemetry.log import log

TOLERANCE = 1e-4
"""Largest difference between a logit of a float32 file and PyTorch's."""
LOSS_ALLOWED = 0.005
"""Of the main metric, by a file of lower precision; or one example, where dev has fewer than 200."""
CALIBRATION = (32, 8)
"""Batches of training text and the examples of each, from which static quantisation learns the ranges."""
TORCH_FILE = "torch_export/model.pt2"


@dataclass(frozen=True)
class Subject:
    """What is exported, and on what it is proved.

    Attributes:
        student: in float32, on the CPU.
        labels: class names in the order of the logits; none: a regression.
        dev: on whose every example each file answers.
        train: calibrates static quantisation.
        texts: some of dev's texts, in order.
        requests: of single sentences, timed for each file.
    """

    student: PreTrainedModel
    tokenizer: Any
    task: Task
    labels: list[str]
    dev: TokenSet
    train: TokenSet
    texts: tuple[list[str], ...]
    max_length: int
    batch_size: int
    requests: int


class _Builder:
    def __init__(self, subject: Subject, folder: Path, tick: Callable[[], None]):
        self.subject, self.folder, self.tick = subject, folder, tick
        self.pad_id = subject.tokenizer.pad_token_id
        self.forwards: dict[str, Callable[[Any], Any]] = {"PyTorch": self._student}
        self.found: dict[str, dict[str, Any]] = {}
        self.logits_NC = self._answers(self._student)
        self.main_metric = self._score(self.logits_NC)

    def _student(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.subject.student(**accepted(self.subject.student, inputs)).logits

    @torch.inference_mode()
    def _answers(self, forward: Callable[[Any], Any]) -> np.ndarray:
        def answer(inputs: dict[str, torch.Tensor]) -> Any:
            self.tick()
            return forward(inputs)

        return answers(answer, self.subject.dev, self.subject.batch_size, self.pad_id)

    def _score(self, logits_NC: np.ndarray) -> float:
        return scores(logits_NC, self.subject.dev, self.subject.task)["main_metric"]

    def build(self, formats: Sequence[str]) -> None:
        """Writes and verifies all but the card and the manifest."""
        (self.folder / "onnx").mkdir()
        source = self.folder / ONNX_FILES["onnx"]
        if any(name.startswith("onnx") for name in formats):
            onnx.write(self.subject.student, self.subject.tokenizer, source)
            if "onnx-fp16" in formats:
                half = self.folder / ONNX_FILES["onnx-fp16"]
                onnx.write_half(source, half)
                self._prove(ONNX_FILES["onnx-fp16"], self._judge(OnnxModel(half)), exact=False)
            onnx.split_norms(source)
            self._prove(ONNX_FILES["onnx"], self._judge(OnnxModel(source)), exact=True)
        if "onnx-int8" in formats:
            self._int8(source)
        if "torch-export" in formats:
            (self.folder / "torch_export").mkdir()
            onnx.write_program(self.subject.student, self.subject.tokenizer, self.folder / TORCH_FILE)
            program = torch.export.load(self.folder / TORCH_FILE).module()
            self.forwards[TORCH_FILE] = lambda inputs: program(**accepted(self.subject.student, inputs))
            self._prove(TORCH_FILE, self._judge(self.forwards[TORCH_FILE]), exact=True)
        if "triton" in formats:
            self._triton(formats)
        if "onnx" not in formats:
            source.unlink(missing_ok=True)
            self.found.pop(ONNX_FILES["onnx"], None)
        if not any((self.folder / "onnx").iterdir()):
            (self.folder / "onnx").rmdir()

    def _judge(self, forward: Callable[[Any], Any]) -> dict[str, float]:
        logits_NC = self._answers(forward)
        return {
            "largest_difference": float(np.abs(logits_NC - self.logits_NC).max()),
            "agreement": agreement(logits_NC, self.logits_NC),
            "main_metric": self._score(logits_NC),
        }

    def _prove(self, name: str, found: dict[str, float], exact: bool) -> None:
        """Raises UserError where a file's answers are not the student's, by how much, and what to do."""
        metric, lost = self.subject.task.main_metric, self.main_metric - found["main_metric"]
        remedy = f"the export is not written; leave its format out of export.formats ({name})"
        if exact and not found["largest_difference"] <= TOLERANCE:
            raise UserError(
                f"export: {name}: logits differ from PyTorch's by {found['largest_difference']:.2g} on dev, more than "
                f"{TOLERANCE:.0e}; {remedy}"
            )
        allowed = max(LOSS_ALLOWED, 1 / len(self.subject.dev))
        if not exact and not lost <= allowed + 1e-9:
            raise UserError(
                f"export: {name}: {metric} on dev is {100 * lost:.2f} points below PyTorch's {100 * self.main_metric:.2f}, "
                f"more than {100 * allowed:.2f}; {remedy}"
            )
        self.found[name] = found | {"bytes": (self.folder / name).stat().st_size}
        log.info("export: %s: largest difference of a logit %.1e, %s %.4f", name, found["largest_difference"],
                 metric, found["main_metric"])  # fmt: skip

    def _int8(self, source: Path) -> None:
        """Of the ways to int8, the one that agrees best with float32 on dev."""
        path = self.folder / ONNX_FILES["onnx-int8"]
        tried: dict[str, dict[str, float]] = {}
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            for number, how in enumerate(onnx.QUANTISATIONS):
                self.tick()
                onnx.write_int8(source, Path(scratch) / f"{number}.onnx", how, self._calibration())
                tried[how] = self._judge(OnnxModel(Path(scratch) / f"{number}.onnx"))
            best = max(tried, key=lambda how: (tried[how]["agreement"], -tried[how]["largest_difference"]))
            os.replace(Path(scratch) / f"{onnx.QUANTISATIONS.index(best)}.onnx", path)
        self._prove(ONNX_FILES["onnx-int8"], tried[best], exact=False)
        self.found[ONNX_FILES["onnx-int8"]] |= {"quantisation": best, "tried": tried}

    def _calibration(self) -> Iterator[dict[str, np.ndarray]]:
        batches, size = CALIBRATION
        every = scoring_batches(self.subject.train, size, 0, 1)
        for rows in every[:: -(-len(every) // batches)]:
            batch = collate(self.subject.train, rows, np.ones(len(rows)), self.pad_id)
            yield {name: value.numpy() for name, value in accepted(self.subject.student, batch.inputs).items()}

    def _triton(self, formats: Sequence[str]) -> None:
        names = {"onnx": "student", "onnx-fp16": "student_fp16", "onnx-int8": "student_int8"}
        graphs = {names[f]: self.folder / ONNX_FILES[f] for f in ONNX_FILES if f in formats}
        inputs = list(accepted(self.subject.student, dict.fromkeys(self.subject.tokenizer.model_input_names)))
        triton.write(
            self.folder / "triton", graphs, inputs, self.subject.labels, len(self.subject.texts) > 1, self.subject.max_length
        )  # fmt: skip

    def measure(self) -> dict[str, dict[str, float]]:
        """Latency and throughput of each file and of PyTorch, on one core, so that thread pools do not meet."""
        graphs: dict[str, Callable[[Any], Any]] = {
            name: OnnxModel(self.folder / name, threads=1) for name in self.found if name != TORCH_FILE
        }
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                timings = speed(
                    self.forwards | graphs, self.subject.dev, torch.device("cpu"), self.subject.batch_size, self.subject.requests,
                    self.subject.requests, self.pad_id, repeats=1, check=self.tick,
                )  # fmt: skip
            return {name: timing.figures for name, timing in timings.items()}
        finally:
            torch.set_num_threads(threads)


def export(
    subject: Subject,
    formats: Sequence[str],
    output: Path,
    card: Callable[[dict[str, Any]], str],
    about: dict[str, Any],
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Writes `output` whole or not at all, after every file has answered all of dev.

    Args:
        formats: as of `export.formats`.
        card: what it is told of the files -> the model card, README.md.
        about: what else the manifest says.
        tick: called often; what it raises ends the export, with nothing left behind.

    Returns:
        The manifest.

    Raises:
        UserError: a file does not answer as the student does, a format cannot be written, or the disk is full.
    """
    temporary = output.with_name(f".{output.name}.tmp")
    remove(temporary)
    try:
        save_model(subject.student, subject.tokenizer, temporary)
        weights = (temporary / "model.safetensors").stat().st_size
        with require_space(output.absolute().parent, weights * len(formats), output.name):
            builder = _Builder(subject, temporary, tick)
            difference = hf.verify(
                temporary, builder.logits_NC, subject.dev, subject.texts, subject.max_length, subject.batch_size
            )
            builder.build(formats)
        speeds = builder.measure()
        files = {"model.safetensors": {"largest_difference": difference, "agreement": 1.0, "bytes": weights,
                 "main_metric": builder.main_metric, **speeds.pop("PyTorch")}}  # fmt: skip
        files |= {name: found | speeds[name] for name, found in builder.found.items()}
        told = {
            "formats": formats,
            "opset": onnx.OPSET,
            "files_on_dev": files,
            "measured_on": machine() | {"threads": 1},
        }
        text = card(told)
        write_atomically(temporary / "README.md", lambda tmp: tmp.write_text(text, encoding="utf-8"), len(text))
        made = manifest.write(
            temporary, about | told | {"max_length": subject.max_length, "pair": len(subject.texts) > 1}
        )
        remove(output)
        os.replace(temporary, output)
    finally:
        remove(temporary)
    return made
