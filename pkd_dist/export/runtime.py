"""The files of an export that can be run, and an ONNX graph as a function, run by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from pkd_dist.errors import UserError
from pkd_dist.limits import cores

ONNX_FILES = {"onnx": "onnx/model.onnx", "onnx-fp16": "onnx/model.fp16.onnx", "onnx-int8": "onnx/model.int8.onnx"}
"""Where an export holds the graph of each format."""
PREFERRED = ("onnx-int8", "onnx", "onnx-fp16")
"""Formats to run on a CPU, best first."""
WEIGHTS_FILE = "model.safetensors"
TORCH_FILE = "torch_export/model.pt2"
TITLES = {
    WEIGHTS_FILE: "student, PyTorch",
    ONNX_FILES["onnx"]: "student, ONNX",
    ONNX_FILES["onnx-fp16"]: "student, ONNX float16",
    ONNX_FILES["onnx-int8"]: "student, ONNX int8",
    TORCH_FILE: "student, torch.export",
}
"""File of an export that can be run -> what tables call it, in their order."""


def to_deploy(files: Collection[str]) -> str:
    """Return the file to deploy among those of an export: the best for a CPU, else the weights."""
    return next((ONNX_FILES[name] for name in PREFERRED if ONNX_FILES[name] in files), WEIGHTS_FILE)


class OnnxModel:
    """A tokenizer's outputs -> logits_BC, float32.

    Args:
        path: The graph.
        threads: None: one per core of this process.
        gpu: Use a GPU if ONNX Runtime finds one.

    Raises:
        UserError: ONNX Runtime cannot load the graph.
    """

    def __init__(self, path: Path, threads: int | None = None, gpu: bool = False):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or cores()
        options.inter_op_num_threads = 1
        # Idle threads must not spin between calls: the cores are needed elsewhere, and calls are as fast without.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry(
            "session.dynamic_block_base", "4"
        )  # a slow core takes a smaller share of a matrix multiplication
        options.log_severity_level = 3
        on_gpu = gpu and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=[*(["CUDAExecutionProvider"] if on_gpu else []), "CPUExecutionProvider"]
            )
        except Exception as error:  # of types that ONNX Runtime does not export
            first = str(error).strip().partition("\n")[0]
            raise UserError(f"{path}: ONNX Runtime cannot load it ({first}); export it again") from None
        self.inputs = [given.name for given in self._session.get_inputs()]

    def __call__(self, inputs: Mapping[str, object]) -> np.ndarray:
        logits_BC: np.ndarray = self._session.run(["logits"], {n: np.asarray(inputs[n]) for n in self.inputs})[0]
        return logits_BC
