"""Several teachers as one: their mean answer, and what they must share."""

import numpy as np
import pytest
import torch
from families import BERT_SPECIAL, ROBERTA_SPECIAL, make_folder, make_tokenizer

from pkd_dist.config.schema import Teacher
from pkd_dist.distillation.teacher import LiveTeacher
from pkd_dist.errors import UserError
from pkd_dist.model.encoder import load_model
from pkd_dist.model.ensemble import mean_logits, require_same_tokenizer


def plain_mean(logits):
    """The mean of the probabilities, (B, C) float64, exponential by exponential."""
    total = np.zeros(logits[0].shape)
    for each in logits:
        exponentials = np.exp(each - each.max(axis=1, keepdims=True))
        total += exponentials / exponentials.sum(axis=1, keepdims=True)
    return total / len(logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_softmax_of_the_mean_logits_is_the_mean_probability(dtype, scale, count):
    generator = torch.Generator().manual_seed(count)
    logits = [(scale * torch.randn(64, 7, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(count)]
    found = mean_logits(logits)
    expected = plain_mean([each.double().numpy() for each in logits])
    assert found.dtype == torch.float64 and found.shape == (64, 7)
    np.testing.assert_allclose(found.softmax(-1).numpy(), expected, rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(found.numpy(), np.log(expected), rtol=1e-12, atol=1e-12)


def test_far_apart_logits_stay_finite():
    found = mean_logits([torch.tensor([[900.0, -900.0]]), torch.tensor([[-900.0, 900.0]])])
    np.testing.assert_allclose(found.numpy(), np.log([[0.5, 0.5]]), rtol=1e-12)
    assert torch.isfinite(mean_logits([torch.tensor([[900.0, -900.0]])] * 2)).all()


def test_a_regression_is_averaged():
    logits = [torch.tensor([[1.0], [4.0]]), torch.tensor([[2.0], [-1.0]]), torch.tensor([[6.0], [0.0]])]
    assert mean_logits(logits).tolist() == [[3.0], [1.0]]


@torch.no_grad()
def test_a_teacher_of_several_gives_their_mean_and_the_states_of_the_first(tmp_path):
    folders = [make_folder(tmp_path / family, family, classifier=True) for family in ("bert", "electra", "deberta-v2")]
    first, *others = map(load_model, folders)
    inputs = dict(make_tokenizer(BERT_SPECIAL)(["good film", "a dull plot it is"], padding=True, return_tensors="pt"))
    plain = [model(**inputs, output_hidden_states=True) for model in (first, *others)]
    expected = plain_mean([out.logits.double().numpy() for out in plain])
    states = torch.stack([plain[0].hidden_states[layer][:, 0] for layer in (1, 3)], dim=1)
    teacher = LiveTeacher(first, (1, 3), "float32", "float32", False, torch.device("cpu"), others)
    found, found_states = teacher(inputs)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.double().softmax(-1).numpy(), expected, atol=1e-6)
    torch.testing.assert_close(found_states, states, rtol=0, atol=1e-5)


def test_tokenizers_must_be_alike():
    first, padded, other = make_tokenizer(BERT_SPECIAL), make_tokenizer(BERT_SPECIAL), make_tokenizer(ROBERTA_SPECIAL)
    padded(["good", "a film"], padding="max_length", truncation=True, max_length=9)
    require_same_tokenizer(("a", first), ("b", padded), "teacher.model")
    with pytest.raises(
        UserError, match=r"^teacher\.model: c has another tokenizer than a; several teachers must share one"
    ):
        require_same_tokenizer(("a", first), ("c", other), "teacher.model")


def test_the_setting():
    assert Teacher(model="a").models == ("a",) and Teacher(model=["a", "b"]).models == ("a", "b")
    for wrong in ({"model": []}, {"model": ["a", "a"]}, {"finetune": {"seeds": []}}, {"finetune": {"seeds": [1, 1]}}):
        with pytest.raises(ValueError, match="each once, not"):
            Teacher(**wrong)
    with pytest.raises(ValueError, match=r"teacher\.finetune\.seeds is for one teacher\.model"):
        Teacher(model=["a", "b"], finetune={"seeds": [1, 2]})
