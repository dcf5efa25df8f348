"""Fine-tunes a teacher with the same loop as the student's, on the gold labels alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from pkd_dist.config.schema import Config
from pkd_dist.data.batches import Batch
from pkd_dist.data.tasks import Task
from pkd_dist.data.tokens import TokenSet
from pkd_dist.distillation.losses import hard_loss
from pkd_dist.distributed.world import World
from pkd_dist.files import remove, require_unaltered
from pkd_dist.model.encoder import Encoder, load_model, save_model
from pkd_dist.telemetry import Telemetry
from pkd_dist.training.trainer import Job, Progress, Trainer


@dataclass(frozen=True)
class GoldLoss:
    """Cross-entropy with the labels alone; see `hard_loss`."""

    class_weights_C: torch.Tensor | None

    def __call__(self, model: Callable[..., Any], batch: Batch) -> dict[str, torch.Tensor]:
        ce_B = hard_loss(model(batch.inputs)[0], batch.labels_B, self.class_weights_C)
        return {"total": ce_B, "ce": ce_B}


def finetune(
    config: Config,
    base: str,
    tokenizer: Any,
    labels: dict[str, Any],
    task: Task,
    train: TokenSet,
    dev: TokenSet,
    class_weights_C: torch.Tensor | None,
    used_V: np.ndarray,
    deepspeed: dict[str, Any],
    output: Path,
    fingerprint: str,
    world: World,
    telemetry: Telemetry,
) -> Progress:
    """Trains `base` on the gold labels and writes its best epoch to `output`, a Hugging Face folder; collective.

    Args:
        base: folder or hub name to start from.
        labels: configuration fields of the classes.
        class_weights_C: see `hard_loss`.
        used_V: token ids that occur in train or dev.
        output: made whole at the end, or not at all. Checkpoints live beside it until then.
    """
    settings = config.teacher.finetune
    assert settings is not None
    torch.manual_seed(config.run.seed)  # the new head is the same on every rank
    model = load_model(base, new_head=True, dropout=settings.dropout, **labels)
    checkpoints = output.with_name(f"{output.name}_checkpoints")
    job = Job(
        name="teacher",
        module=Encoder(model, used_V=used_V),
        losses=GoldLoss(class_weights_C),
        train=train,
        dev=dev,
        task=task,
        pad_id=tokenizer.pad_token_id,
        seed=config.run.seed,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        micro_batch_size=config.train.micro_batch_size,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_ratio=settings.warmup_ratio,
        max_grad_norm=config.train.max_grad_norm,
        adam_epsilon=config.train.adam_epsilon,
        eval_batch_size=config.evaluate.batch_size,
        eval_every_epochs=1,
        log_every_steps=config.train.log_every_steps,
        checkpoint=config.checkpoint,
        deepspeed=deepspeed,
        folder=checkpoints,
        records=output.with_name(f"{output.name}_metrics.jsonl"),
        fingerprint=fingerprint,
    )
    progress = Trainer(job, world, telemetry).run()

    def write() -> None:
        assert progress.best_file is not None and progress.best_sha256 is not None
        require_unaltered(checkpoints / progress.best_file, progress.best_sha256)
        best = load_model(base, new_head=True, **labels)
        best.load_state_dict(
            {k.removeprefix("model."): v for k, v in load_file(checkpoints / progress.best_file).items()}
        )
        temporary = output.with_name(f".{output.name}.tmp")
        remove(temporary)
        save_model(best, tokenizer, temporary)
        remove(output)
        os.replace(temporary, output)

    world.on_main(write)
    return progress
