"""Latency and throughput of teacher and student in turn, with PyTorch and from each ONNX file.

Each model has its own process, so that the thread pools of several models do not disturb each other.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pkd_dist.data.batches import collate
from pkd_dist.data.tokens import open_tokens
from pkd_dist.evaluation.scoring import forward_of, predict_logits_single
from pkd_dist.export.runtime import OnnxModel
from pkd_dist.model.encoder import load_model, load_tokenizer

BATCHES = (1, 2, 4, 8, 16, 32, 64)
WARM_UP, TURN = 5, 25
"""Requests of a turn: first those that do not count, because the caches hold another model."""


class Subject(NamedTuple):
    """What is measured: an .onnx file or a Hugging Face folder, its tokenizer, and the examples in its tokens."""

    path: Path
    tokenizer: Path
    data: Path


class Model:
    """A model in this process: by ONNX Runtime for an .onnx file, by PyTorch for a Hugging Face folder."""

    def __init__(self, subject: Subject, threads: int):
        torch.set_num_threads(threads)
        path = subject.path
        self.forward = (
            OnnxModel(path, threads) if path.suffix == ".onnx" else forward_of(load_model(str(path), "model"))
        )
        self.pad_id, self.dev = load_tokenizer(str(subject.tokenizer)).pad_token_id, open_tokens(subject.data)

    def logits(self) -> np.ndarray:
        """Return the logits of every example, computed one at a time."""
        return predict_logits_single(self.forward, self.dev, 1, self.pad_id)

    def seconds(self, rows: np.ndarray, batch: int) -> list[float]:
        """Return the seconds of each batch of some examples."""
        found = []
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            inputs = collate(self.dev, part, np.ones(len(part)), self.pad_id).inputs
            before = time.perf_counter()
            self.forward(inputs)
            found.append(time.perf_counter() - before)
        return found


_model: Model
"""Of a worker process."""


def _open(*arguments: Any) -> None:
    global _model
    _model = Model(*arguments)


@torch.inference_mode()
def _call(method: str, *arguments: Any) -> Any:
    return getattr(_model, method)(*arguments)


@contextmanager
def workers(models: dict[str, Subject], threads: int) -> Iterator[dict[str, Callable[..., Any]]]:
    """Yield for each model a function (method of `Model`, arguments) -> result, which calls its process."""
    with ExitStack() as stack:
        made = {}
        for name, subject in models.items():
            pool = stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"), _open, (subject, threads)))
            made[name] = lambda *call, pool=pool: pool.submit(_call, *call).result()
        yield made


def accuracies(models: dict[str, Subject]) -> dict[str, np.ndarray]:
    """Return the logits of every example."""
    with workers(models, 1) as made:
        return {name: call("logits") for name, call in made.items()}


def measure(models: dict[str, Subject], threads: int, requests: int) -> dict[str, Any]:
    """Return the latency of each model for the same `requests` examples, and its rate by batch size."""
    length, rng = len(open_tokens(next(iter(models.values())).data)), np.random.default_rng(0)
    latency: dict[str, list[float]] = {name: [] for name in models}
    rates: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in BATCHES} for name in models}
    with workers(models, threads) as made:
        for _ in range(-(-requests // TURN)):
            rows = rng.integers(length, size=WARM_UP + TURN)
            for name, call in made.items():
                latency[name] += call("seconds", rows, 1)[WARM_UP:]
        for batch in BATCHES:
            for _ in range(3):
                rows = rng.integers(length, size=batch * max(3, 64 // batch))
                for name, call in made.items():
                    seconds = call("seconds", rows, batch)[1:]
                    rates[name][batch].append(batch * len(seconds) / sum(seconds))
    return {name: _figures(latency[name], rates[name]) for name in models}


def _figures(latency: list[float], rates: dict[int, list[float]]) -> dict[str, Any]:
    by_batch = {str(batch): float(np.median(found)) for batch, found in rates.items()}
    best = max(by_batch, key=by_batch.__getitem__)
    shares = {f"latency_ms_p{p}": float(np.percentile(latency, p) * 1e3) for p in (50, 95, 99)}
    rate = {"per_second": len(latency) / sum(latency), "batches": by_batch}
    return shares | rate | {"best_batch": int(best), "best_per_second": by_batch[best]}
