"""The computation of the authors' code (github.com/intersun/PKD-for-BERT), as a plain loop in float32.

Every text is padded to the maximum length. First the teacher runs over the training set and computes the states of all
layers and tokens; the logits and the [CLS] states of the paired layers are kept in memory. Then the student is trained
from them. Unlike their code, it uses today's torch and transformers, fused AdamW and fused attention.
"""

import torch
from torch.utils.data import DataLoader

from benchmarks.peers.subject import WARMUP, Clock, Measured, Subject, Tally, shape_of


def measure(subject: Subject, steps: int | None = None) -> Measured:
    """Train all epochs, or `steps` steps (with the teacher's pass over as many examples)."""
    config, batch_size, collate = subject.config, subject.config.train.batch_size, subject.collator(padded=True)
    teacher, clock, tally = subject.teacher(), Clock(), Tally()
    ours, theirs = zip(*subject.pairs, strict=True)
    rows = subject.train if steps is None else subject.train[: steps * batch_size]
    logits, states, teacher_flops = [], [], 0.0
    with clock.running(), torch.no_grad():
        for batch in DataLoader(rows, batch_size, collate_fn=collate):
            inputs = subject.moved({name: value for name, value in batch.items() if name != "labels"})
            out = teacher(**inputs, output_hidden_states=True)
            logits.append(out.logits)
            states.append(subject.first_states(out.hidden_states, theirs))
            teacher_flops += shape_of(teacher.config).forward_flops(*inputs["input_ids"].shape, cls_only=False)
    teacher_logits_NC, teacher_states_NMH = torch.cat(logits), torch.cat(states)
    measured = Measured(0.0, tally, clock.seconds, len(rows), teacher_flops)

    student, clock = subject.student(), Clock()
    optimizer = subject.optimizer(student)
    schedule, shape = subject.schedule(optimizer), shape_of(student.config)
    numbered = [row | {"place": i} for i, row in enumerate(rows)]
    loader = DataLoader(numbered, batch_size, shuffle=True, collate_fn=collate)

    def step(batch: dict[str, torch.Tensor]) -> None:
        batch = subject.moved(batch)
        place_B, labels_B = batch.pop("place"), batch.pop("labels")
        out = student(**batch, output_hidden_states=True)
        states_BMH = subject.first_states(out.hidden_states, ours)
        targets = teacher_logits_NC[place_B], teacher_states_NMH[place_B]
        subject.loss(out.logits, states_BMH, *targets, labels_B).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.train.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tally.add(batch["attention_mask"], (shape, 3))

    if steps is not None:
        for _, batch in zip(range(WARMUP), loader, strict=False):
            step(batch)
        measured.tally = tally = Tally()
        with clock.running():
            for _, batch in zip(range(steps), loader, strict=False):
                step(batch)
    for _ in range(config.train.epochs if steps is None else 0):
        with clock.running():
            for batch in loader:
                step(batch)
        measured.score(subject, student)
    measured.training_seconds = clock.seconds
    return measured
