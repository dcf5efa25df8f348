"""What every contestant trains with, in plain transformers and torch: data, teacher, student, loss, optimizer, scoring.

The settings come from `movie-reviews.yaml`, which our run reads as well. Each contestant times itself with a `Clock`.
Shapes: B examples, L tokens, C classes, M patience pairs, H hidden size.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithPadding, PreTrainedModel, get_linear_schedule_with_warmup

from benchmarks.scaling.model import Shape
from pkd_dist.config.schema import Config
from pkd_dist.data import tasks, text
from pkd_dist.model.encoder import load_model, load_tokenizer
from pkd_dist.model.layers import paired_layers
from pkd_dist.model.student import take_layers
from pkd_dist.training.optimization import make_adamw

WARMUP = 2  # steps before the clock starts, if only some steps are timed


class Clock:
    """A stopwatch that can be stopped and started again; waits for the GPU, if there is one, at each of them."""

    seconds = since = 0.0

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def start(self) -> None:
        self.since = self._now()

    def stop(self) -> None:
        self.seconds += self._now() - self.since

    @contextmanager
    def running(self) -> Iterator[None]:
        self.start()
        yield
        self.stop()


@dataclass
class Tally:
    """Counts of timed steps: steps, rows, real tokens, and FLOPs of matrix multiplications (2 per multiply-add)."""

    steps: int = 0
    rows: int = 0
    tokens: int = 0
    flops: float = 0.0

    def add(self, mask_BL: torch.Tensor, *passes: tuple[Shape, int]) -> None:
        """Add one batch, padding included. `passes`: shape of a model, and forward passes (3 with backward)."""
        rows, length = mask_BL.shape
        self.steps += 1
        self.rows += rows
        self.tokens += int(mask_BL.sum())
        self.flops += sum(times * shape.forward_flops(rows, length, cls_only=False) for shape, times in passes)


@dataclass
class Measured:
    """The result of a contestant: of the steps in `tally`, of the teacher's separate pass, on dev after each full epoch.

    Attributes:
        epochs: `accuracy`, `agreement` with the teacher, and `at`: the clock at the end of the epoch, as if scoring took no time.
    """

    training_seconds: float
    tally: Tally
    teacher_seconds: float = 0.0
    teacher_rows: int = 0
    teacher_flops: float = 0.0
    epochs: list[dict[str, float]] = field(default_factory=list)
    scoring_seconds: float = 0.0

    def score(self, subject: Subject, model: PreTrainedModel) -> None:
        """Add the scores of a student at the end of an epoch."""
        began = time.time()
        self.epochs.append({**subject.scores(model), "at": began - self.scoring_seconds})
        self.scoring_seconds += time.time() - began


def shape_of(c: Any) -> Shape:
    """Return the shape of a model from its configuration."""
    return Shape(c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.num_attention_heads, c.vocab_size,
                 c.max_position_embeddings, c.type_vocab_size, c.num_labels)  # fmt: skip


_SIZES = ((1024, 384, 1536), (2048, 2048, 2048), (4096, 4096, 4096), (1024, 768, 3072))
LONGEST_SECONDS = 5.0
"""Sizes for which one multiplication would take longer are skipped."""


def peak(dtype: torch.dtype, device: torch.device | None = None, seconds: float = 0.4) -> float:
    """Return the FLOP/s of matrix multiplications on all threads or a GPU: the best of some sizes, each tried for `seconds`."""
    device, best = device or torch.device("cpu"), 0.0
    for m, k, n in _SIZES:
        if best and 2 * m * k * n / best > LONGEST_SECONDS:
            continue  # a CPU without bfloat16 instructions would take minutes
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        out, until = a @ b, time.perf_counter() + seconds
        while time.perf_counter() < until:
            start = time.perf_counter()
            for _ in range(4):
                torch.mm(a, b, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, 4 * 2 * m * k * n / (time.perf_counter() - start))
    return best


def peaks(device: torch.device) -> dict[str, float]:
    return {name: peak(getattr(torch, name), device) for name in ("float32", "bfloat16")}


class Subject:
    """Data and models of one seed.

    Attributes:
        train, dev: one dictionary for each example, as the tokenizer returns it, with `labels`.
        pairs: (student layer, teacher layer) of the patience term, from 1.
    """

    def __init__(self, config: Config):
        self.config, self.layers = config, config.student.layers or ()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(config.teacher.model)
        self.train, self.dev = self._encoded("train"), self._encoded("dev")
        self._teacher = load_model(config.teacher.model)
        chosen = paired_layers(config.distill.patience, self._teacher.config.num_hidden_layers, len(self.layers))
        self.pairs = tuple(enumerate(chosen, start=1))
        self.total_steps = config.train.epochs * -(-len(self.train) // config.train.batch_size)
        self.warmup_steps = int(self.total_steps * config.train.warmup_ratio)

    def _encoded(self, name: str) -> list[dict[str, Any]]:
        task = tasks.resolve(self.config.task)
        split = text.read(self.config.task.data, name, task, task.classes)
        encoded = self.tokenizer(*map(list, split.texts), truncation=True, max_length=self.config.task.max_length)
        rows = (dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True))
        return [row | {"labels": int(label)} for row, label in zip(rows, split.labels_N, strict=True)]

    def collator(self, padded: bool) -> DataCollatorWithPadding:
        """Return a collator that pads to the maximum length if `padded`, else to the longest of a batch."""
        length = self.config.task.max_length if padded else None
        return DataCollatorWithPadding(self.tokenizer, padding="max_length" if padded else True, max_length=length)

    def teacher(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return self._teacher.to(self.device, dtype).requires_grad_(False).eval()

    def student(self) -> PreTrainedModel:
        """Seed all generators; return a student made of the teacher's layers, with its dropout."""
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(self.config.run.seed)
        return take_layers(load_model(self.config.teacher.model), self.layers).to(self.device).train()

    def moved(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a batch as a plain dictionary on the device."""
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def optimizer(self, model: torch.nn.Module) -> torch.optim.AdamW:
        return make_adamw(model, self.config.train)

    def schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        return get_linear_schedule_with_warmup(optimizer, self.warmup_steps, self.total_steps)

    def loss(
        self, logits_BC: torch.Tensor, states_BMH: torch.Tensor, teacher_logits_BC: torch.Tensor,
        teacher_states_BMH: torch.Tensor, labels_B: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Return the loss of the authors' code: (1 - alpha) CE + alpha T^2 KL (mean over examples and classes) + beta
        times the mean squared error of the normalized states."""
        d, student, teacher = self.config.distill, logits_BC.float(), teacher_logits_BC.float()
        log_p, target = F.log_softmax(student / d.temperature, dim=1), F.softmax(teacher / d.temperature, dim=1)
        soft = F.kl_div(log_p, target, reduction="none").mean() * (d.temperature**2)
        states, targets = (F.normalize(x.float(), p=2, dim=2) for x in (states_BMH, teacher_states_BMH))
        hard, patience = F.cross_entropy(student, labels_B), F.mse_loss(targets, states)
        return (1 - d.alpha) * hard + d.alpha * soft + d.beta * patience

    @staticmethod
    def first_states(hidden_states: Sequence[torch.Tensor], layers: Sequence[int]) -> torch.Tensor:
        """Return the [CLS] states of the given layers (0: the embeddings), (B, M, H)."""
        return torch.stack([hidden_states[layer][:, 0] for layer in layers], dim=1)

    def scores(self, model: PreTrainedModel) -> dict[str, float]:
        """Return a student's `accuracy` on dev and its `agreement` with the teacher."""
        predicted_N, labels_N = self._predicted(model), torch.tensor([row["labels"] for row in self._sorted_dev])
        taught_N = self._taught_N
        return {
            "accuracy": float((predicted_N == labels_N).float().mean()),
            "agreement": float((predicted_N == taught_N).float().mean()),
        }

    @functools.cached_property
    def _taught_N(self) -> torch.Tensor:
        return self._predicted(self._teacher)

    @functools.cached_property
    def _sorted_dev(self) -> list[dict[str, Any]]:
        return sorted(self.dev, key=lambda row: len(row["input_ids"]))

    @torch.inference_mode()
    def _predicted(self, model: PreTrainedModel) -> torch.Tensor:
        """Return the predicted classes on dev; the training mode of the model is restored."""
        mode, collate, found = model.training, self.collator(padded=False), []
        model.eval()
        for start in range(0, len(self.dev), 64):
            batch = self.moved(collate(self._sorted_dev[start : start + 64]))
            batch.pop("labels")
            found.append(model(**batch).logits.argmax(dim=1).cpu())
        model.train(mode)
        return torch.cat(found)
