"""One model in its own process, so that thread pools of several models do not disturb each other.

First prints {"ready": true}. Then answers each JSON line: {"rows": [...], "batch": n} with {"seconds": [one for each
batch]}, {"score": true} with {"logits": [...]}.
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
from pkd_dist.evaluation.scoring import answers
from pkd_dist.export.runtime import OnnxModel
from pkd_dist.model.encoder import accepted, load_model, load_tokenizer


def forward_of(path: Path, threads: int) -> Any:
    """Return inputs -> logits: by ONNX Runtime for an .onnx file, by PyTorch for a Hugging Face folder."""
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
        request = json.loads(line)
        if "score" in request:
            response: dict[str, Any] = {"logits": answers(forward, dev, 1, pad_id).tolist()}
        else:
            rows, seconds = np.asarray(request["rows"]), []
            for start in range(0, len(rows), request["batch"]):
                part = rows[start : start + request["batch"]]
                inputs = collate(dev, part, np.ones(len(part)), pad_id).inputs
                before = time.perf_counter()
                forward(inputs)
                seconds.append(time.perf_counter() - before)
            response = {"seconds": seconds}
        print(json.dumps(response), flush=True)


if __name__ == "__main__":
    main()
