"""The contestants of benchmarks/peers on a tiny model: one loss, all of the work, and the counting."""

import time

import numpy as np
import pytest
import torch
from textbrewer.distiller_utils import post_adaptor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import authors, brewer, collect, hf
from benchmarks.peers.subject import Subject, Tally, peak, shape_of
from pkd_dist.config.load import load
from pkd_dist.distillation.losses import hard_loss, patience_loss, soft_loss
from pkd_dist.model.encoder import Encoder

ROWS, BATCH, EPOCHS = 203, 32, 2
STEPS = EPOCHS * 7


@pytest.fixture
def subject(teacher, data, one_thread):
    return Subject(config_of(teacher, data))


def config_of(teacher, data):
    overrides = [f"teacher.model={teacher}", f"task.data={data}", "task.max_length=32", "student.layers=[1,2,3]"]
    overrides += [f"train.batch_size={BATCH}", f"train.epochs={EPOCHS}", "train.learning_rate=0.003"]
    return load("benchmarks/peers/movie-reviews.yaml", overrides)


def batch_of(subject):
    return dict(subject.collator(padded=False)(subject.train[:8]))


def answers(subject, model, layers):
    inputs = {name: value for name, value in batch_of(subject).items() if name != "labels"}
    out = model(**inputs, output_hidden_states=True)
    return out.logits, subject.first_states(out.hidden_states, layers), out


def test_one_loss(subject):
    """That of the authors' code, ours with the preset `authors`, and TextBrewer's."""
    ours, theirs = zip(*subject.pairs, strict=True)
    student = subject.student().eval()
    labels = batch_of(subject)["labels"]
    with torch.no_grad():
        logits, states, out = answers(subject, student, ours)
        teacher_logits, teacher_states, teacher_out = answers(subject, subject.teacher(), theirs)
        expected = subject.loss(logits, states, teacher_logits, teacher_states, labels)
    d = subject.config.distill
    terms = (
        (1 - d.alpha) * hard_loss(logits, labels)
        + d.alpha * soft_loss(logits, teacher_logits, d.temperature, d.ds_reduction)
        + d.beta * patience_loss(states, teacher_states, d.normalize, d.pt_reduction)
    )
    assert d.beta == 100 and d.ds_reduction == "mean", "the preset"
    assert float(terms.mean()) == pytest.approx(float(expected), rel=1e-6)

    out.loss = torch.nn.functional.cross_entropy(logits, labels)
    distiller = brewer.GeneralDistiller(
        brewer.TrainingConfig(log_dir=None), brewer.distillation(subject), None, None, None, None
    )
    adapted = [post_adaptor(brewer.adaptor({}, found)) for found in (out, teacher_out)]
    total, _ = distiller.compute_loss(*adapted)
    entropy = -(soft := torch.softmax(teacher_logits / d.temperature, 1)).mul(soft.log()).sum(1).mean()
    constant = d.alpha * d.temperature**2 / 2 * float(entropy)  # cross-entropy in place of KL: the same gradient
    assert float(total) - constant == pytest.approx(float(expected), rel=1e-5)


def test_the_students_are_the_teachers_layers(subject):
    student, teacher = subject.student(), subject.teacher()
    for i, layer in enumerate((1, 2, 3)):
        mine, theirs = (m.bert.encoder.layer for m in (student, teacher))
        assert torch.equal(mine[i].output.dense.weight, theirs[layer].output.dense.weight)
    assert student.config.hidden_dropout_prob > 0 and student.training


CONTESTANTS = {
    "authors": authors.measure,
    "textbrewer-padded": brewer.measure,
    "textbrewer-dynamic": lambda s, steps=None: brewer.measure(s, steps, "dynamic"),
    "hf-float32": hf.measure,
    "hf-bfloat16": lambda s, steps=None: hf.measure(s, steps, "bfloat16"),
}


@pytest.mark.parametrize("name", CONTESTANTS)
def test_a_contestant_trains_all_epochs(subject, name, monkeypatch):
    made = []
    monkeypatch.setattr(subject, "student", lambda: made.append(Subject.student(subject)) or made[-1])
    before = Subject.student(subject).bert.embeddings.word_embeddings.weight
    measured = CONTESTANTS[name](subject)
    assert measured.tally.steps == STEPS and measured.tally.rows == EPOCHS * ROWS
    assert measured.tally.tokens == EPOCHS * sum(len(row["input_ids"]) for row in subject.train)
    assert len(measured.epochs) == EPOCHS and all(0.3 < epoch["accuracy"] <= 1 for epoch in measured.epochs)
    assert measured.epochs[0]["at"] < measured.epochs[1]["at"] < time.time() - measured.scoring_seconds
    assert measured.training_seconds > 0 and (measured.teacher_seconds > 0) == (name == "authors")
    after = made[0].bert.embeddings.word_embeddings.weight
    assert not torch.equal(before, after), "it has learned something"
    assert subject.scores(made[0]).items() <= measured.epochs[-1].items()
    assert subject.scores(subject.teacher())["agreement"] == 1


@pytest.mark.parametrize("name", CONTESTANTS)
def test_a_slice_counts_its_own_steps_alone(subject, name):
    measured = CONTESTANTS[name](subject, 3)
    assert measured.tally.steps == 3 and measured.tally.rows == 3 * BATCH and not measured.epochs
    student, teacher = (shape_of(model.config) for model in (subject.student(), subject.teacher()))
    whole = 3 * student.forward_flops(96, 32, cls_only=False) + teacher.forward_flops(96, 32, cls_only=False)
    if name == "textbrewer-padded":
        assert measured.tally.flops == pytest.approx(whole)
    elif name == "authors":
        assert measured.tally.flops + measured.teacher_flops == pytest.approx(whole)
    else:
        assert measured.tally.flops < whole, "padded to the longest of the batch"


@pytest.mark.parametrize("cls_only", [True, False])
def test_products_are_counted_as_torch_counts_them(subject, cls_only):
    """A forward pass against torch's own counter; backward is worth two of them."""
    config = subject.student().config
    model = Subject.student(subject).eval()
    model.set_attn_implementation("eager")
    inputs = {name: value for name, value in batch_of(subject).items() if name != "labels"}
    encoder = Encoder(model, all_tokens=not cls_only).train()
    with FlopCounterMode(display=False) as forward:
        logits = encoder(inputs)[0]
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    shape, size = shape_of(config), inputs["input_ids"].shape
    assert forward.get_total_flops() == pytest.approx(shape.forward_flops(*size, cls_only=cls_only), rel=1e-6)
    assert backward.get_total_flops() == pytest.approx(2 * forward.get_total_flops(), rel=0.01)


def test_useful_work_is_that_of_real_tokens(subject):
    from pkd_dist.data.tokens import TokenSet

    shape = shape_of(subject.teacher().config)
    tokens = TokenSet(np.zeros(12), None, np.array([0, 3, 8, 12]), np.arange(3), np.zeros(3), "", "", 0)
    teacher, student = collect.useful(shape, shape, tokens, 4)
    assert teacher == sum(shape.forward_flops(1, length) for length in (3, 5, 4))
    assert student == 3 * 4 * teacher


def test_the_peak_is_above_what_one_product_reaches():
    assert peak(torch.float32, seconds=0.01) > 1e8


def test_a_tally_counts_padding_as_work():
    shape, tally = shape_of_tiny(), Tally()
    tally.add(torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), (shape, 3))
    assert (tally.steps, tally.rows, tally.tokens) == (1, 2, 6)
    assert tally.flops == 3 * shape.forward_flops(2, 4, cls_only=False)


def shape_of_tiny():
    from benchmarks.scaling.model import Shape

    return Shape(2, 8, 16, 2)
