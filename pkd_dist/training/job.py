"""What one training needs (`Job`) and how far it is (`Progress`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pkd_dist.config.schema import Checkpoint, Evaluate, Train
from pkd_dist.data.batches import Batch
from pkd_dist.data.tasks import Task
from pkd_dist.data.tokens import TokenSet
from pkd_dist.metric_names import DIVERGENCE, MAIN_METRIC
from pkd_dist.model.encoder import Encoder
from pkd_dist.model.outputs import Forward

DeepSpeedJson = dict[str, Any]
"""A DeepSpeed JSON as `load_deepspeed` returns it: checked, with DeepSpeed's own types."""
LossTerms = Callable[[Forward, Batch], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        name: for messages: `teacher` or `distill`.
        module: trained in place.
        losses: (module or engine, batch) -> per-example terms (B,), named as in `LOSS_TERMS`; `total` is required. It must use
            tensor operations only, because a GPU captures and replays it.
        settings: the optimizer's settings and the batch size.
        deepspeed: the DeepSpeed JSON.
        folder: where checkpoints are written.
        records: the metrics file.
        fingerprint: identity of everything that decides the result. A checkpoint with another fingerprint is rejected.
        teacher_outputs: adds the teacher's outputs to a batch; None if the losses need none.
        teacher_dev_NC: float32 logits of the teacher on `dev`, with which evaluations compare the student; None: they do not.
    """

    name: str
    module: Encoder
    losses: LossTerms
    train: TokenSet
    dev: TokenSet
    task: Task
    pad_id: int
    seed: int
    settings: Train
    evaluate: Evaluate
    checkpoint: Checkpoint
    deepspeed: DeepSpeedJson
    folder: Path
    records: Path
    fingerprint: str
    teacher_outputs: Callable[[Batch], Batch] | None = None
    teacher_dev_NC: np.ndarray | None = None


@dataclass
class Progress:
    """The position of a training, equal on all ranks. A checkpoint stores it as JSON."""

    step: int = 0
    evaluated_epochs: int = 0
    samples: int = 0
    tokens: int = 0
    best_step: int = 0
    best_epoch: int = 0
    best_metric: float = float("-inf")
    best_divergence: float | None = None
    best_file: str | None = None
    best_sha256: str | None = None
    history: list[dict[str, float]] = field(default_factory=list)

    def forget_evaluation(self) -> None:
        """Have the last epoch evaluated again, which was the best, so that its weights are written again."""
        self.history.pop()
        self.evaluated_epochs = int(self.history[-1]["epoch"]) if self.history else 0
        self.best_metric, self.best_divergence = float("-inf"), None

    def improves(self, figures: Mapping[str, float], best_by: str) -> bool:
        """Return whether an evaluation is better than the best so far, by the score that `evaluate.best_by` names."""
        if best_by == "metric":
            return figures[MAIN_METRIC] > self.best_metric
        return self.best_divergence is None or figures[DIVERGENCE] < self.best_divergence

    def out_of_patience(self, epochs: int | None) -> bool:
        """Return whether no evaluation has been the best so far for a number of epochs; None: there is no limit."""
        return epochs is not None and self.evaluated_epochs - self.best_epoch >= epochs
