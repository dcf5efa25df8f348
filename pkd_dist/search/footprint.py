"""How large and how fast the int8 file of a student will be: its weights do not matter, so it is known before the training."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pkd_dist.config.sweep import Constraints
from pkd_dist.evaluation.speed import TimedInputs, machine, measure_speed
from pkd_dist.export import int8, onnx
from pkd_dist.export.runtime import OnnxModel
from pkd_dist.files import digest_of, read_object, write_json
from pkd_dist.lock import waiting_lock
from pkd_dist.model import encoder, vocabulary
from pkd_dist.stages.context import Context
from pkd_dist.stages.data import student_texts
from pkd_dist.telemetry.log import log

SHAPES = "shapes"
_BUSY = 1.25
"""Other workers are busy while a file is timed: points are left out only if they miss the limit by more than this factor."""
_REQUESTS = 100


@dataclass(frozen=True)
class Footprint:
    """What serving a student costs.

    Attributes:
        bytes: Size of the int8 file.
        latency_ms: Median time of it for one text of dev, on one thread.
        processor: What it was timed on.
    """

    bytes: int
    latency_ms: float
    processor: str

    def problem(self, limits: Constraints, slack: float = _BUSY) -> str | None:
        """Return which constraint a student does not meet; None if it meets all.

        Args:
            slack: Factor that a latency may miss its limit by.
        """
        size = self.bytes / 1e6
        if limits.size_mb is not None and size > limits.size_mb:
            return f"its int8 file has {size:.2f} MB, more than sweep.constraints.size_mb {limits.size_mb:g}"
        if limits.latency_ms is not None and self.latency_ms > slack * limits.latency_ms:
            return f"its int8 file takes {self.latency_ms:.3g} ms, more than sweep.constraints.latency_ms {limits.latency_ms:g}"
        return None


def footprint(context: Context, folder: Path) -> Footprint:
    """Return the footprint of a run's student, whose starting weights are made.

    Args:
        folder: Of the sweep; it keeps the footprint of each shape on each kind of processor.

    Raises:
        UserError: A model of this family cannot be written as an int8 file.
    """
    init = context.resolved.paths.student_init
    kept, processor = student_texts(context).kept_K, str(machine()["processor"])
    shape = json.loads((init / "config.json").read_text(encoding="utf-8"))
    name = digest_of([shape, None if kept is None else len(kept), context.resolved.student_length, processor])[:12]
    path = folder / SHAPES / f"{name}.json"
    with waiting_lock(path.parent):  # one at a time, so that they do not slow each other down
        if not path.exists():
            found = _measure(context, path.parent, processor)
            write_json(path, asdict(found))
            log.info("the int8 file of this shape: %.2f MB, %.3g ms", found.bytes / 1e6, found.latency_ms)
    content = read_object(path)
    return Footprint(int(str(content["bytes"])), float(str(content["latency_ms"])), str(content["processor"]))


def _measure(context: Context, folder: Path, processor: str) -> Footprint:
    texts, settings = student_texts(context), context.resolved.config.evaluate
    model: PreTrainedModel = encoder.load_model(str(context.resolved.paths.student_init))
    if texts.kept_K is not None:
        vocabulary.trim_embedding(model, texts.kept_K)
    with tempfile.TemporaryDirectory(dir=folder) as scratch, torch.inference_mode():
        source, path = Path(scratch, "float32.onnx"), Path(scratch, "int8.onnx")
        with torch.inference_mode(False):
            onnx.write(model.eval(), texts.tokenizer, source)
        onnx.split_norms(source)
        onnx.write_int8(source, path, int8.QUANTIZATIONS[0])
        timed = settings.model_copy(update={"latency_samples": _REQUESTS, "throughput_samples": 1})
        pad_id = texts.tokenizer.pad_token_id
        inputs = TimedInputs.choose(texts.splits["dev"], pad_id, torch.device("cpu"), timed)
        speed = measure_speed({"int8": OnnxModel(path, threads=1)}, inputs)["int8"].figures
        return Footprint(path.stat().st_size, speed["latency_ms_p50"], processor)
