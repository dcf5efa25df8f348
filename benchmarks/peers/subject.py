"""What every contestant trains with, in plain transformers and torch: data, teacher, student, loss, optimizer, scoring.

The settings come from `movie-reviews.yaml`, which our run reads as well. Each contestant times itself with a `Clock`.

Shapes: B examples, L tokens, C classes, M patience pairs, H hidden size.
"""

from __future__ import annotations

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
from pkd_dist.data.examples import Split
from pkd_dist.model.encoder import load_model, load_tokenizer
from pkd_dist.model.layers import paired_layers
from pkd_dist.model.student import take_layers


class Clock:
    """A stopwatch that can be stopped and started again."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        _wait_for_gpu()
        self._since = time.perf_counter()

    def stop(self) -> None:
        if self._since is not None:
            _wait_for_gpu()
            self.seconds += time.perf_counter() - self._since
            self._since = None

    @contextmanager
    def running(self) -> Iterator[None]:
        self.start()
        try:
            yield
        finally:
            self.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time inside."""
        was_running = self._since is not None
        self.stop()
        try:
            yield
        finally:
            if was_running:
                self.start()


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclass
class Tally:
    """Counts of timed steps: steps, rows, real tokens, and FLOPs of matrix products (2 per multiply-add)."""

    steps: int = 0
    rows: int = 0
    tokens: int = 0
    flops: float = 0.0

    def add(self, mask_BL: torch.Tensor, *passes: tuple[Shape, int]) -> None:
        """Add one batch, padding included.

        Args:
            passes: (shape of a model, number of forward passes its work equals: 1 for the teacher, 3 for the student).
        """
        rows, length = mask_BL.shape
        self.steps += 1
        self.rows += rows
        self.tokens += int(mask_BL.sum())
        self.flops += sum(times * shape.forward_flops(rows, length, cls_only=False) for shape, times in passes)


@dataclass
class Measured:
    """The result of a contestant.

    Attributes:
        training_seconds: of the steps in `tally`.
        teacher_seconds: of a separate pass over `teacher_rows` examples; 0 if the teacher runs in every step.
        accuracies: on dev, after each epoch; empty if only some steps were done.
    """

    training_seconds: float
    tally: Tally
    teacher_seconds: float = 0.0
    teacher_rows: int = 0
    teacher_flops: float = 0.0
    accuracies: list[float] = field(default_factory=list)


def shape_of(config: Any) -> Shape:
    """Return the shape of a model from its configuration."""
    return Shape(
        config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads,
        config.vocab_size, config.max_position_embeddings, config.type_vocab_size, config.num_labels,
    )  # fmt: skip


def adamw(model: torch.nn.Module, weight_decay: float, learning_rate: float, epsilon: float) -> torch.optim.AdamW:
    """Return torch's fused AdamW, with weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, eps=epsilon, fused=True)


class Subject:
    """Data and models of one seed.

    Attributes:
        train, dev: one dictionary for each example, as the tokenizer returns it, with `labels`.
        pairs: (student layer, teacher layer) of the patience term, from 1.
        device: the GPU if there is one (`CUDA_VISIBLE_DEVICES` hides it).
    """

    def __init__(self, config: Config):
        self.config = config
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = load_tokenizer(config.teacher.model)
        task = tasks.resolve(config.task)
        self.train, self.dev = (
            self._encode(text.read(config.task.data, split, task, task.classes)) for split in ("train", "dev")
        )
        self._teacher = load_model(config.teacher.model)
        layers = config.student.layers
        assert layers is not None
        chosen = paired_layers(config.distill.patience, self._teacher.config.num_hidden_layers, len(layers))
        self.pairs = tuple(enumerate(chosen, start=1))

    def _encode(self, split: Split) -> list[dict[str, Any]]:
        encoded = self.tokenizer(*map(list, split.texts), truncation=True, max_length=self.config.task.max_length)
        rows = (dict(zip(encoded, row, strict=True)) for row in zip(*encoded.values(), strict=True))
        return [row | {"labels": int(label)} for row, label in zip(rows, split.labels_N, strict=True)]

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.train) // self.config.train.batch_size)

    @property
    def total_steps(self) -> int:
        return self.config.train.epochs * self.steps_per_epoch

    def collator(self, padded: bool) -> DataCollatorWithPadding:
        """Return a collator that pads to the maximum length if `padded`, else to the longest of a batch."""
        length = self.config.task.max_length if padded else None
        return DataCollatorWithPadding(self.tokenizer, padding="max_length" if padded else True, max_length=length)

    def teacher(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return self._teacher.to(self.device, dtype).requires_grad_(False).eval()

    def student(self) -> PreTrainedModel:
        """Seed all generators; return a student made of the teacher's layers, with its dropout."""
        seed = self.config.run.seed
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        student = take_layers(load_model(self.config.teacher.model), self.config.student.layers or ())
        return student.to(self.device).train()

    def moved(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a batch as a plain dictionary on the device."""
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def optimizer(self, model: torch.nn.Module) -> torch.optim.AdamW:
        settings = self.config.train
        return adamw(model, settings.weight_decay, settings.learning_rate, settings.adam_epsilon)

    def schedule_arguments(self) -> dict[str, int]:
        return {
            "num_warmup_steps": int(self.total_steps * self.config.train.warmup_ratio),
            "num_training_steps": self.total_steps,
        }

    def schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        return get_linear_schedule_with_warmup(optimizer, **self.schedule_arguments())

    def loss(
        self,
        logits_BC: torch.Tensor,
        states_BMH: torch.Tensor,
        teacher_logits_BC: torch.Tensor,
        teacher_states_BMH: torch.Tensor,
        labels_B: torch.Tensor,
    ) -> torch.Tensor:
        """Return the loss of the authors' code: (1 - alpha) CE + alpha T^2 KL (mean over examples and classes) + beta
        times the mean squared error of the normalised states."""
        d = self.config.distill
        soft = F.kl_div(
            F.log_softmax(logits_BC.float() / d.temperature, dim=1),
            F.softmax(teacher_logits_BC.float() / d.temperature, dim=1),
            reduction="none",
        ).mean() * (d.temperature**2)
        hard = F.cross_entropy(logits_BC.float(), labels_B)
        patience = F.mse_loss(
            F.normalize(teacher_states_BMH.float(), p=2, dim=2), F.normalize(states_BMH.float(), p=2, dim=2)
        )
        return (1 - d.alpha) * hard + d.alpha * soft + d.beta * patience

    @staticmethod
    def first_states(hidden_states: Sequence[torch.Tensor], layers: Sequence[int]) -> torch.Tensor:
        """Return the [CLS] states of the given layers (0: the embeddings), (B, M, H)."""
        return torch.stack([hidden_states[layer][:, 0] for layer in layers], dim=1)

    @torch.inference_mode()
    def accuracy(self, model: PreTrainedModel) -> float:
        """Return the accuracy on dev; the training mode of the model is restored."""
        mode, collate = model.training, self.collator(padded=False)
        model.eval()
        order = sorted(range(len(self.dev)), key=lambda i: len(self.dev[i]["input_ids"]))
        right = 0
        for start in range(0, len(order), 64):
            batch = self.moved(collate([self.dev[i] for i in order[start : start + 64]]))
            labels_B = batch.pop("labels")
            right += int((model(**batch).logits.argmax(dim=1) == labels_B).sum())
        model.train(mode)
        return right / len(self.dev)
