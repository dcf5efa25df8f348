"""Latency and throughput of teacher and student in turn, with PyTorch and from each ONNX file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults.tiny import ROOT, environment
from pkd_dist.data.tokens import open_tokens

BATCHES = (1, 2, 4, 8, 16, 32, 64)
WARM_UP = 5
"""Requests at the start of a turn that do not count, because the caches hold another model."""
TURN = 25
"""Requests of a turn."""


class Worker:
    """A model in its own process (see `worker.py`)."""

    def __init__(self, model: Path, tokenizer: Path, data: Path, threads: int):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving.worker", str(model), str(tokenizer), str(data), str(threads)],
            cwd=ROOT, env=environment(OMP_NUM_THREADS=str(threads)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._process.args[2:])} ended")  # type: ignore[arg-type]
        return json.loads(line)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def seconds(self, rows: np.ndarray, batch: int) -> list[float]:
        return self.ask(rows=rows.tolist(), batch=batch)["seconds"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


@contextmanager
def workers(models: dict[str, Path], *arguments: Any) -> Iterator[dict[str, Worker]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(closing(Worker(path, *arguments))) for name, path in models.items()}


def accuracies(models: dict[str, Path], tokenizer: Path, data: Path) -> dict[str, np.ndarray]:
    """Return the logits of every example, computed one at a time."""
    with workers(models, tokenizer, data, 1) as made:
        return {name: np.asarray(worker.ask(score=True)["logits"]) for name, worker in made.items()}


def measure(models: dict[str, Path], tokenizer: Path, data: Path, threads: int, requests: int) -> dict[str, Any]:
    """Return for each model `latency_ms_p50`, `_p95`, `_p99` and `per_second` at batch 1, and the rate by batch size.

    `requests` single sentences are timed for each model, the same for all, drawn from the token set `data`.
    """
    length, rng = len(open_tokens(data)), np.random.default_rng(0)
    latency: dict[str, list[float]] = {name: [] for name in models}
    rates: dict[str, dict[int, list[float]]] = {name: {batch: [] for batch in BATCHES} for name in models}
    with workers(models, tokenizer, data, threads) as made:
        for _ in range(-(-requests // TURN)):
            rows = rng.integers(length, size=WARM_UP + TURN)
            for name, worker in made.items():
                latency[name] += worker.seconds(rows, 1)[WARM_UP:]
        for batch in BATCHES:
            for _ in range(3):
                rows = rng.integers(length, size=batch * max(3, 64 // batch))
                for name, worker in made.items():
                    seconds = worker.seconds(rows, batch)[1:]
                    rates[name][batch].append(batch * len(seconds) / sum(seconds))
    return {name: _figures(latency[name], rates[name]) for name in models}


def _figures(latency: list[float], rates: dict[int, list[float]]) -> dict[str, Any]:
    by_batch = {str(batch): float(np.median(found)) for batch, found in rates.items()}
    best = max(by_batch, key=by_batch.__getitem__)
    shares = {f"latency_ms_p{p}": float(np.percentile(latency, p) * 1e3) for p in (50, 95, 99)}
    rate = {"per_second": len(latency) / sum(latency), "batches": by_batch}
    return shares | rate | {"best_batch": int(best), "best_per_second": by_batch[best]}
