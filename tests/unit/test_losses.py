"""The losses against formulas written independently in float64 numpy."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from pkd_dist.distillation.losses import (
    attention_loss,
    gram_loss,
    hard_loss,
    patience_loss,
    relation_loss,
    soft_loss,
)

RNG = np.random.default_rng(0)
B, C, M, H, L = 7, 4, 3, 16, 5


def as_tensor(array):
    return torch.tensor(array, dtype=torch.float64)


def test_hard_loss_is_cross_entropy():
    logits, labels = RNG.normal(size=(B, C)), RNG.integers(C, size=B)
    expected = [-log_softmax(row)[label] for row, label in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(hard_loss(as_tensor(logits), torch.tensor(labels)), expected, rtol=1e-12)


def test_hard_loss_of_a_regression_is_the_squared_error():
    predicted, gold = RNG.normal(size=(B, 1)), RNG.normal(size=B)
    np.testing.assert_allclose(hard_loss(as_tensor(predicted), as_tensor(gold)), (predicted[:, 0] - gold) ** 2)


def test_an_example_without_a_label_has_no_hard_loss_and_no_gradient():
    logits = as_tensor(RNG.normal(size=(3, C))).requires_grad_()
    loss = hard_loss(logits, torch.tensor([2, -1, 0]))
    loss.sum().backward()
    assert loss[1] == 0 and not logits.grad[1].any() and logits.grad[0].any()
    predicted = as_tensor(RNG.normal(size=(2, 1))).requires_grad_()
    loss = hard_loss(predicted, as_tensor([np.nan, 2.0]))
    loss.sum().backward()
    assert loss[0] == 0 and predicted.grad[0] == 0 and torch.isfinite(predicted.grad).all()


def test_class_weights_multiply_the_loss_of_their_class():
    logits, labels = as_tensor(RNG.normal(size=(4, 3))), torch.tensor([2, 0, -1, 1])
    weights = torch.tensor([0.5, 2.0, 7.0])
    expected = hard_loss(logits, labels) * torch.tensor([7.0, 0.5, 0.0, 2.0])
    torch.testing.assert_close(hard_loss(logits, labels, weights), expected)


@pytest.mark.parametrize("temperature", [1.0, 5.0, 20.0])
def test_soft_loss_reductions(temperature):
    student, teacher = RNG.normal(size=(B, C)) * 3, RNG.normal(size=(B, C)) * 3
    p = softmax(teacher / temperature, axis=1)
    log_p, log_q = np.log(p), log_softmax(student / temperature, axis=1)
    kl = (p * (log_p - log_q)).sum(axis=1)
    expected = {
        "batchmean": kl * temperature**2,
        "mean": kl * temperature**2 / C,
        "soft_ce": -(p * log_q).sum(axis=1),
        "soft_ce_mean": -(p * log_q).sum(axis=1) / C,
    }
    for reduction, values in expected.items():
        got = soft_loss(as_tensor(student), as_tensor(teacher), temperature, reduction)
        np.testing.assert_allclose(got, values, rtol=1e-10, err_msg=reduction)


def test_soft_loss_has_temperature_squared():
    """The gradient keeps its size as T grows, which it does not without T^2."""
    teacher = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    sizes = []
    for temperature in (10.0, 100.0):
        student = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
        soft_loss(student, teacher, temperature).sum().backward()
        sizes.append(float(student.grad.norm()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)


def test_soft_loss_is_zero_for_equal_logits():
    logits = as_tensor(RNG.normal(size=(B, C)))
    assert soft_loss(logits, logits.clone(), 5.0).abs().max() < 1e-12


@pytest.mark.parametrize("normalize", [True, False])
def test_patience_reductions(normalize):
    student, teacher = RNG.normal(size=(B, M, H)), RNG.normal(size=(B, M, H))
    s, t = student, teacher
    if normalize:
        s = student / np.linalg.norm(student, axis=-1, keepdims=True)
        t = teacher / np.linalg.norm(teacher, axis=-1, keepdims=True)
    total = np.array([sum(((s[b, m] - t[b, m]) ** 2).sum() for m in range(M)) for b in range(B)])
    got_sum = patience_loss(as_tensor(student), as_tensor(teacher), normalize, "sum")
    got_mean = patience_loss(as_tensor(student), as_tensor(teacher), normalize, "mean")
    np.testing.assert_allclose(got_sum, total, rtol=1e-10)
    np.testing.assert_allclose(got_mean, total / (M * H), rtol=1e-10)
    got_pair_sum = patience_loss(as_tensor(student), as_tensor(teacher), normalize, "pair_sum")
    np.testing.assert_allclose(got_pair_sum, total / H, rtol=1e-10)


def test_patience_of_all_tokens_leaves_padding_out():
    student, teacher = RNG.normal(size=(2, L, M, H)), RNG.normal(size=(2, L, M, H))
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    got = patience_loss(as_tensor(student), as_tensor(teacher), False, "mean", torch.tensor(mask))
    expected = [((student[b, :n] - teacher[b, :n]) ** 2).mean() for b, n in ((0, 5), (1, 2))]
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    teacher[1, 3] = 1e9
    again = patience_loss(as_tensor(student), as_tensor(teacher), False, "mean", torch.tensor(mask))
    assert torch.equal(got, again)


def grams(states, n):
    """The Gram matrices of one example's n real tokens, entry by entry: of each layer, then of each and the next."""
    layers = range(states.shape[1])
    for a, b in [*((m, m) for m in layers), *zip(layers, layers[1:], strict=False)]:
        yield [[sum(states[i, a] * states[j, b]) / states.shape[-1] for j in range(n)] for i in range(n)]


def padded(*shape):
    """Two examples, of 5 and 2 real tokens; and the mask."""
    return RNG.normal(size=(2, L, *shape)), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])


def test_gram_matrices_of_other_widths():
    (student, mask), (teacher, _) = padded(M, H), padded(M, 2 * H)
    got = gram_loss(as_tensor(student), as_tensor(teacher), mask)
    expected = [
        np.mean([(np.array(s) - t) ** 2 for s, t in zip(grams(student[b], n), grams(teacher[b], n), strict=True)])
        for b, n in ((0, 5), (1, 2))
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    rotation = np.linalg.qr(RNG.normal(size=(H, H)))[0]
    assert gram_loss(as_tensor(student @ rotation), as_tensor(student), mask).abs().max() < 1e-24, "of any basis"
    one = gram_loss(as_tensor(student[:, :, :1]), as_tensor(teacher[:, :, :1]), mask)
    assert one.shape == (2,) and (one > 0).all(), "one pair has no neighbor"


def assert_padding_is_left_out(loss, student, teacher, mask):
    """Neither longer padding nor what it holds changes the values or the gradients."""
    found = []
    for fill, length in ((0.0, L), (1e9, L), (np.nan, L + 3)):
        ours, theirs = (np.full((2, length, *x.shape[2:]), fill) for x in (student, teacher))
        for padded_states, states in ((ours, student), (theirs, teacher)):
            for b, n in enumerate(mask.sum(1)):
                padded_states[b, :n] = states[b, :n]
        wide = torch.nn.functional.pad(mask, (0, length - L))
        inputs = as_tensor(ours).requires_grad_()
        values = loss(inputs, as_tensor(theirs), wide)
        values.sum().backward()
        assert not inputs.grad[wide == 0].any() and inputs.grad[wide == 1].any()
        found.append([*values.detach(), *inputs.grad[wide == 1].flatten()])
    np.testing.assert_allclose(found[1:], found[:1] * 2, rtol=1e-12)


def test_gram_matrices_leave_padding_out():
    (student, mask), (teacher, _) = padded(M, H), padded(M, H)
    assert_padding_is_left_out(gram_loss, student, teacher, mask)


def products(left, right, head, heads):
    """The scaled products of two sequences (n, width), of one head, pair by pair."""
    size = left.shape[-1] // heads
    part = slice(head * size, (head + 1) * size)
    return (
        np.array([[sum(a * b for a, b in zip(x[part], y[part], strict=True)) for y in right] for x in left]) / size**0.5
    )


@pytest.mark.parametrize("heads", [1, 4])
def test_relations_of_queries_keys_and_values_of_other_widths(heads):
    (student, mask), (teacher, _) = padded(3, H), padded(3, 2 * H)
    expected = np.zeros(2)
    for b, n in ((0, 5), (1, 2)):
        for kind in range(3):
            for head in range(heads):
                s, t = (products(x[b, :n, kind], x[b, :n, kind], head, heads) for x in (student, teacher))
                for row in range(n):
                    p, log_q = softmax(t[row]), log_softmax(s[row])
                    expected[b] += np.sum(p * (np.log(p) - log_q)) / (heads * n)
    got = relation_loss(as_tensor(student), as_tensor(teacher), heads, mask)
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    assert relation_loss(as_tensor(student), as_tensor(student), heads, mask).abs().max() < 1e-14


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_scores_of_several_layers(heads):
    (student, mask), (teacher, _) = padded(2, 3, H), padded(2, 3, 2 * H)
    expected = []
    for b, n in ((0, 5), (1, 2)):
        squares = [
            (np.subtract(*(products(x[b, :n, layer, 0], x[b, :n, layer, 1], head, heads) for x in (student, teacher))))
            ** 2
            for layer in range(2)
            for head in range(heads)
        ]
        expected.append(np.mean(squares))
    got = attention_loss(as_tensor(student), as_tensor(teacher), heads, mask)
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    student[..., 2, :] += 1
    assert torch.equal(attention_loss(as_tensor(student), as_tensor(teacher), heads, mask), got), "values are not read"


@pytest.mark.parametrize(("loss", "shape"), [(relation_loss, (3, H)), (attention_loss, (2, 3, H))])
def test_attention_leaves_padding_out(loss, shape):
    (student, mask), (teacher, _) = padded(*shape), padded(*shape)
    assert_padding_is_left_out(lambda mine, its, real: loss(mine, its, 4, real), student, teacher, mask)


def test_half_precision_inputs_are_widened():
    student = torch.randn(B, C).bfloat16()
    assert soft_loss(student, student, 5.0).dtype == torch.float32
    assert hard_loss(student, torch.zeros(B, dtype=torch.int64)).dtype == torch.float32
    assert patience_loss(student[:, None], student[:, None]).dtype == torch.float32
    tokens, mask = torch.randn(B, L, 3, H).bfloat16(), torch.ones(B, L)
    assert gram_loss(tokens, tokens, mask).dtype == torch.float32
    assert relation_loss(tokens, tokens, 4, mask).dtype == torch.float32
    assert attention_loss(tokens[:, :, None], tokens[:, :, None], 4, mask).dtype == torch.float32
