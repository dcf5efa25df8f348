"""TextBrewer 0.2.1 (Yang et al. 2020): its `GeneralDistiller` with its own losses, in float32.

The package dates from 2022. To run it with today's torch and transformers, through its public interface:

- batches are plain dictionaries (it tests `type(batch) is dict`, and transformers' collators return another type);
- training is in float32, because its 16-bit precision needs NVIDIA's apex, which is no longer maintained;
- training uses one process, because on several CPU processes it passes devices to DistributedDataParallel, an error;
- the optimizer is torch's, because transformers no longer has one.

The weights of its terms make their sum equal to the loss of the other contestants: its KL has neither T^2 nor a mean
over classes, and its patience term is summed over the width.
"""

import tempfile
import warnings
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.peers.subject import WARMUP, Clock, Measured, Subject, Tally, shape_of

with warnings.catch_warnings():  # it compares strings with `is`
    warnings.simplefilter("ignore")
    from textbrewer import DistillationConfig, GeneralDistiller, TrainingConfig


def distillation(subject: Subject) -> DistillationConfig:
    d, teacher = subject.config.distill, subject.teacher().config
    weight = d.beta / (len(subject.pairs) * teacher.hidden_size)
    matches = [{"layer_T": theirs, "layer_S": ours, "feature": "hidden", "loss": "pkd", "weight": weight}
               for ours, theirs in subject.pairs]  # fmt: skip
    return DistillationConfig(
        temperature=d.temperature, kd_loss_type="ce", kd_loss_weight=d.alpha * d.temperature**2 / teacher.num_labels,
        hard_label_weight=1 - d.alpha, intermediate_matches=matches,
    )  # fmt: skip


def adaptor(batch: dict[str, torch.Tensor], out: Any) -> dict[str, Any]:
    """Return the outputs of a model under TextBrewer's names."""
    return {"logits": out.logits, "hidden": out.hidden_states, "losses": out.loss}


def measure(subject: Subject, steps: int | None = None, padding: str = "padded") -> Measured:
    """Train all epochs, or `steps` steps. `padding`: padded | dynamic."""
    teacher, student, tally, clock = subject.teacher(), subject.student(), Tally(), Clock()
    passes = ((shape_of(student.config), 3), (shape_of(teacher.config), 1))
    collate, measured, train = subject.collator(padding == "padded"), Measured(0.0, tally), subject.config.train
    loader: Any = DataLoader(subject.train, train.batch_size, shuffle=True, collate_fn=lambda rows: dict(collate(rows)))

    def student_adaptor(batch: dict[str, torch.Tensor], out: Any) -> dict[str, Any]:
        tally.add(batch["attention_mask"], *passes)
        return adaptor(batch, out)

    def scored(model: Any, step: int) -> None:
        clock.stop()
        measured.score(subject, model)
        clock.start()

    optimizer = subject.optimizer(student)
    arguments: dict[str, Any] = {"max_grad_norm": train.max_grad_norm, "output_hidden_states": True,
                                 "scheduler": subject.schedule(optimizer)}  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingConfig(
            output_dir=scratch, log_dir=None, device=subject.device, ckpt_steps=10**9, ckpt_frequency=1
        )
        distiller = GeneralDistiller(settings, distillation(subject), teacher, student, adaptor, student_adaptor)
        with distiller:
            if steps is not None:
                distiller.train(optimizer, loader, num_steps=WARMUP, **arguments)
                vars(tally).update(vars(Tally()))
                arguments |= {"num_steps": steps}
            else:
                arguments |= {"num_epochs": train.epochs, "callback": scored}
            with clock.running():
                distiller.train(optimizer, loader, **arguments)
    measured.training_seconds = clock.seconds
    return measured
