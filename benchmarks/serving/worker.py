"""One model in one process of its own, which answers when it is asked to: thread pools of several would disturb each other.

Reads a JSON line {"rows": [...], "batch": n}, answers with {"seconds": [one for each batch]}, first {"ready": true} and, of
the first line {"score": true}, {"logits": [...]}.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pkd_dist.data.batches import collate
from pkd_dist.data.tokens import open_tokens
from pkd_dist.evaluation.scoring import predict_logits_single
from pkd_dist.export.runtime import OnnxModel
from pkd_dist.model.encoder import accepted, load_model, load_tokenizer


def forward_of(path: Path, threads: int) -> Any:
    """A tokenizer's outputs -> logits: of a Hugging Face folder by PyTorch, of an .onnx file by ONNX Runtime."""
    torch.set_num_threads(threads)
    if path.suffix == ".onnx":
        return OnnxModel(path, threads)
    model = load_model(str(path), "model")
    return lambda inputs: model(**accepted(model, inputs)).logits


@torch.inference_mode()
def main() -> None:
    path, tokenizer, data, threads = sys.argv[1:]
    forward = forward_of(Path(path), int(threads))
    pad_id, dev = load_tokenizer(tokenizer).pad_token_id, open_tokens(Path(data))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "score" in asked:
            told: dict[str, Any] = {"logits": predict_logits_single(forward, dev, 1, pad_id).tolist()}
        else:
            rows, seconds = np.asarray(asked["rows"]), []
            for start in range(0, len(rows), asked["batch"]):
                part = rows[start : start + asked["batch"]]
                inputs = collate(dev, part, np.ones(len(part)), pad_id).inputs
                before = time.perf_counter()
                forward(inputs)
                seconds.append(time.perf_counter() - before)
            told = {"seconds": seconds}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
