"""A Hugging Face Trainer that runs the teacher in every step, as most users write it.

Batches of similar length, fused AdamW; in bfloat16 the Trainer's autocast, and a teacher with bfloat16 weights.
Evaluation and saving are not timed.
"""

import tempfile
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from benchmarks.peers.subject import WARMUP, Clock, Measured, Subject, Tally, shape_of


class OnlineTeacher(Trainer):
    """Trains with the teacher's outputs for the same batch."""

    def __init__(self, subject: Subject, dtype: torch.dtype, tally: Tally, **arguments: Any):
        super().__init__(**arguments)
        self.subject, self.tally, self.teacher = subject, tally, subject.teacher(dtype)
        self.passes = ((shape_of(self.model.config), 3), (shape_of(self.teacher.config), 1))

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        ours, theirs = zip(*self.subject.pairs, strict=True)
        inputs = dict(inputs)
        labels_B = inputs.pop("labels")
        with torch.no_grad():
            taught = self.teacher(**inputs, output_hidden_states=True)
        out = model(**inputs, output_hidden_states=True)
        self.tally.add(inputs["attention_mask"], *self.passes)
        states_BMH = self.subject.first_states(out.hidden_states, ours)
        targets_BMH = self.subject.first_states(taught.hidden_states, theirs)
        loss = self.subject.loss(out.logits, states_BMH, taught.logits, targets_BMH, labels_B)
        return (loss, out) if return_outputs else loss


class Timing(TrainerCallback):
    """Starts the clock, after the warm-up steps of a slice, and stops it while dev is scored."""

    def __init__(self, subject: Subject, clock: Clock, measured: Measured, sliced: bool):
        self.subject, self.clock, self.measured, self.sliced = subject, clock, measured, sliced

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if not self.sliced:
            self.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.sliced and state.global_step == WARMUP:
            vars(self.measured.tally).update(vars(Tally()))
            self.clock.start()

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.sliced and state.is_world_process_zero:
            self.clock.stop()
            self.measured.score(self.subject, model)
            self.clock.start()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.clock.stop()


def measure(subject: Subject, steps: int | None = None, precision: str = "float32") -> Measured:
    """Train all epochs, or `steps` steps, on as many ranks as torchrun started."""
    bf16 = precision == "bfloat16"
    settings, clock, measured = subject.config.train, Clock(), Measured(0.0, Tally())
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, use_cpu=subject.device.type == "cpu", bf16=bf16, seed=subject.config.run.seed,
            num_train_epochs=settings.epochs, max_steps=-1 if steps is None else WARMUP + steps,
            learning_rate=settings.learning_rate, weight_decay=settings.weight_decay, adam_epsilon=settings.adam_epsilon,
            max_grad_norm=settings.max_grad_norm, warmup_steps=subject.warmup_steps, optim="adamw_torch_fused",
            train_sampling_strategy="group_by_length", save_strategy="no", logging_strategy="no", report_to="none",
            disable_tqdm=True,
        )  # fmt: skip
        share, left = divmod(settings.batch_size, arguments.world_size)
        if left:
            raise ValueError(f"batch size {settings.batch_size} is not a multiple of {arguments.world_size} ranks")
        arguments.per_device_train_batch_size = share
        OnlineTeacher(
            subject, getattr(torch, precision), measured.tally, model=subject.student(), args=arguments,
            train_dataset=subject.train, data_collator=subject.collator(padded=False),
            callbacks=[Timing(subject, clock, measured, steps is not None)],
        ).train()  # fmt: skip
    measured.training_seconds = clock.seconds
    return measured
