"""An exported ONNX graph as a function, on ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pkd_dist.errors import UserError

ONNX_FILES = {"onnx": "onnx/model.onnx", "onnx-fp16": "onnx/model.fp16.onnx", "onnx-int8": "onnx/model.int8.onnx"}
"""Where an export holds the graph of each format."""


class OnnxModel:
    """A tokenizer's outputs -> logits_BC, float32.

    Args:
        path: of the graph.
        threads: None: one for each core of this process.
        gpu: use one where ONNX Runtime finds it.

    Raises:
        UserError: this is no graph that ONNX Runtime can run.
    """

    def __init__(self, path: Path, threads: int | None = None, gpu: bool = False):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
        options.inter_op_num_threads = 1
        # Between two calls the cores are another's: as fast, and no thread waits for one that only turns.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.dynamic_block_base", "4")  # a slow core takes less of a product
        options.log_severity_level = 3
        on_gpu = gpu and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=[*(["CUDAExecutionProvider"] if on_gpu else []), "CPUExecutionProvider"]
            )
        except Exception as error:  # its own kinds, not exported
            first = str(error).strip().partition("\n")[0]
            raise UserError(f"{path}: ONNX Runtime cannot load it ({first}); export it again") from None
        self.inputs = [given.name for given in self._session.get_inputs()]

    def __call__(self, inputs: Mapping[str, Any]) -> np.ndarray:
        return self._session.run(["logits"], {name: np.asarray(inputs[name]) for name in self.inputs})[0]
