"""Fine-tunes a teacher on the gold labels alone, with the student's training loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from pkd_dist.config.schema import Config
from pkd_dist.data.batches import Batch
from pkd_dist.data.target_scale import TargetScale
from pkd_dist.data.tasks import Task
from pkd_dist.data.tokens import TokenSet
from pkd_dist.distillation.losses import hard_loss
from pkd_dist.distributed.world import World
from pkd_dist.files import folder_written_atomically, require_unaltered
from pkd_dist.model.encoder import Encoder, load_config, load_model, save_model
from pkd_dist.model.outputs import Forward
from pkd_dist.model.regression_head import has_trained_head, restore, standardize
from pkd_dist.telemetry import Telemetry
from pkd_dist.training.job import DeepSpeedJson, Job, Progress
from pkd_dist.training.trainer import train


@dataclass(frozen=True)
class GoldLoss:
    """Cross-entropy with the labels alone; see `hard_loss`."""

    class_weights_C: torch.Tensor | None

    def __call__(self, model: Forward, batch: Batch) -> dict[str, torch.Tensor]:
        ce_B = hard_loss(model(batch.inputs).logits_BC, batch.labels_B, self.class_weights_C)
        return {"total": ce_B, "ce": ce_B}


@dataclass(frozen=True)
class TeacherJob:
    """One fine-tuning. `config.teacher.finetune` is given.

    Attributes:
        base: folder or hub name of the model to start from.
        seed: of the new head, the batches and the dropout.
        labels: fields of the model configuration about the classes (`num_labels`, `id2label`, ...).
        class_weights_C: see `hard_loss`.
        scale: of a regression's targets, which are standardized in `train`; the folder predicts in the user's unit.
        used_V: token ids that occur in `train` or `dev`.
        deepspeed: the DeepSpeed JSON.
        output: the Hugging Face folder to write; its name is that of the job. Checkpoints and metrics are beside it.
        fingerprint: see `Job`.
    """

    config: Config
    base: str
    seed: int
    tokenizer: PreTrainedTokenizerBase
    labels: dict[str, Any]
    task: Task
    train: TokenSet
    dev: TokenSet
    class_weights_C: torch.Tensor | None
    scale: TargetScale | None
    used_V: np.ndarray
    deepspeed: DeepSpeedJson
    output: Path
    fingerprint: str

    @property
    def checkpoints(self) -> Path:
        return self.output.with_name(f"{self.output.name}_checkpoints")


def finetune(teacher: TeacherJob, world: World, telemetry: Telemetry) -> Progress:
    """Train a teacher and write the weights of its best epoch as a Hugging Face folder; collective.

    The folder appears complete or not at all.

    Raises:
        DivergedError, Preempted, UserError: see `trainer.train`.
    """
    progress = train(lambda: training_job(teacher), world, telemetry)
    world.on_main(lambda: _write(teacher, progress))
    return progress


def training_job(teacher: TeacherJob) -> Job:
    """Return the training of a teacher, with its model loaded."""
    config, settings = teacher.config, teacher.config.teacher.finetune
    assert settings is not None
    torch.manual_seed(teacher.seed)  # the new head is the same on every rank
    trained_head = has_trained_head(load_config(teacher.base))
    model = load_model(teacher.base, new_head=True, dropout=settings.dropout, **teacher.labels)
    standardize(model, teacher.scale, trained_head)
    own = settings.model_dump(include={"epochs", "batch_size", "learning_rate", "weight_decay", "warmup_ratio"})
    own |= {"schedule": "linear", "decay_ratio": None, "patience_epochs": None}
    return Job(
        name=teacher.output.name,
        module=Encoder(model, used_V=teacher.used_V),
        losses=GoldLoss(teacher.class_weights_C),
        train=teacher.train,
        dev=teacher.dev,
        task=teacher.task,
        pad_id=teacher.tokenizer.pad_token_id,
        seed=teacher.seed,
        settings=config.train.model_copy(update=own),
        evaluate=config.evaluate.model_copy(update={"every_epochs": 1, "best_by": "metric"}),
        checkpoint=config.checkpoint,
        deepspeed=teacher.deepspeed,
        folder=teacher.checkpoints,
        records=teacher.output.with_name(f"{teacher.output.name}_metrics.jsonl"),
        fingerprint=teacher.fingerprint,
    )


def _write(teacher: TeacherJob, progress: Progress) -> None:
    assert progress.best_file is not None and progress.best_sha256 is not None
    best = teacher.checkpoints / progress.best_file
    require_unaltered(best, progress.best_sha256)
    model = standardize(load_model(teacher.base, new_head=True, **teacher.labels), teacher.scale)
    model.load_state_dict({name.removeprefix("model."): weight for name, weight in load_file(best).items()})
    restore(model)
    with folder_written_atomically(teacher.output) as temporary:
        save_model(model, teacher.tokenizer, temporary, teacher.config.task.max_length)
