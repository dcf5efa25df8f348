"""TextBrewer 0.2.1 (Yang et al. 2020), the package itself: its `GeneralDistiller` with its own losses, in float32.

It is from 2022. What today's torch and transformers ask for in its use, all through its public interface:

- batches are plain dictionaries (its test is `type(batch) is dict`, and a collator of transformers makes another type);
- its half precision needs NVIDIA's apex, which has been given up: float32 is all that it has;
- on several CPU processes it asks DistributedDataParallel for devices, which that refuses: one process is all that it has;
- the optimizer is torch's, since transformers has none any more.

Weights of its terms are such that their sum is the loss of the others: its KL has neither T^2 nor a mean over classes,
and its patience term is summed over width.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.peers.authors import WARMUP
from benchmarks.peers.subject import Clock, Measured, Subject, Tally, shape_of

with warnings.catch_warnings():  # `is` with a text, which today's Python warns of
    warnings.simplefilter("ignore")
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig


def distillation(subject: Subject) -> DistillationConfig:
    d, teacher = subject.config.distill, subject.teacher().config
    matches = [
        {"layer_T": theirs, "layer_S": ours, "feature": "hidden", "loss": "pkd",
         "weight": d.beta / (len(subject.pairs) * teacher.hidden_size)}
        for ours, theirs in subject.pairs
    ]  # fmt: skip
    return DistillationConfig(
        temperature=d.temperature, kd_loss_type="ce", kd_loss_weight=d.alpha * d.temperature**2 / teacher.num_labels,
        hard_label_weight=1 - d.alpha, intermediate_matches=matches,
    )  # fmt: skip


def adaptor(batch: dict[str, torch.Tensor], out: Any) -> dict[str, Any]:
    """A model's outputs by TextBrewer's names."""
    return {"logits": out.logits, "hidden": out.hidden_states, "losses": out.loss}


def measure(subject: Subject, steps: int | None = None, padded: bool = True) -> Measured:
    """Trains whole epochs, or `steps` steps alone."""
    teacher, student, tally, clock = subject.teacher(), subject.student(), Tally(), Clock()
    passes = ((shape_of(student.config), 3), (shape_of(teacher.config), 1))
    collate = subject.collator(padded)
    loader: Any = DataLoader(
        subject.train, subject.config.train.batch_size, shuffle=True, collate_fn=lambda rows: dict(collate(rows))
    )

    def student_adaptor(batch: dict[str, torch.Tensor], out: Any) -> dict[str, Any]:
        tally.add(batch["attention_mask"], *passes)
        return adaptor(batch, out)

    measured = Measured(0.0, tally)

    def scored(model: Any, step: int) -> None:
        with clock.paused():
            measured.accuracies.append(subject.accuracy(model))

    optimizer = subject.optimizer(student)
    arguments: dict[str, Any] = {
        "max_grad_norm": subject.config.train.max_grad_norm, "output_hidden_states": True,
        "scheduler": subject.schedule(optimizer),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingConfig(
            output_dir=str(Path(scratch)), log_dir=None, device=subject.device, ckpt_steps=10**9, ckpt_frequency=1
        )
        distiller = GeneralDistiller(settings, distillation(subject), teacher, student, adaptor, student_adaptor)
        with distiller:
            if steps is None:
                with clock.running():
                    distiller.train(
                        optimizer, loader, num_epochs=subject.config.train.epochs, callback=scored, **arguments
                    )
            else:
                distiller.train(optimizer, loader, num_steps=WARMUP, **arguments)
                vars(tally).update(vars(Tally()))
                with clock.running():
                    distiller.train(optimizer, loader, num_steps=steps, **arguments)
    measured.training_seconds = clock.seconds
    return measured
