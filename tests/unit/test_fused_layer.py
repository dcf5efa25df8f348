"""A fused encoder layer with dropout and in low precision; `test_encoder.py` compares it to the plain layer without."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForSequenceClassification, BertConfig, DistilBertConfig
from transformers.models.bert.modeling_bert import BertLayer

from pkd_dist.model.dropout import CpuDropout, dropout_mask
from pkd_dist.model.encoder import Encoder
from pkd_dist.model.families import encoder_layers
from pkd_dist.model.first_token import only_first_token
from pkd_dist.model.fused_layer import FusedLayer, fuse_layers
from pkd_dist.model.specialize import unspecialize

pytestmark = pytest.mark.usefixtures("one_thread")
BERT = BertConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
    hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2,
)  # fmt: skip


def model_of(config=BERT, dtype=torch.float64):
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config).to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():  # else biases are 0 and gains 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_a_mask_has_the_given_probability_and_scale(dtype, p):
    torch.manual_seed(1)
    mask = dropout_mask((1000, 1001), p, dtype)
    assert mask.dtype == dtype and mask.shape == (1000, 1001)
    scale = torch.tensor(1 / (1 - p), dtype=dtype)
    assert set(mask.unique().tolist()) == {0.0, scale.item()}
    kept = (mask > 0).double()
    sigma = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 4 * sigma + 2**-15
    assert abs((kept[:, 1:] * kept[:, :-1]).mean() - (1 - p) ** 2) < 5 * sigma + 2**-14, "neighbors are independent"
    for lane in range(4):  # of one 64-bit random number
        assert abs(kept.flatten()[lane::4].mean() - (1 - p)) < 8 * sigma + 2**-15


def test_the_seed_of_torch_determines_the_mask():
    masks = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        masks.append(torch.stack([dropout_mask((64,), 0.5, torch.float32) for _ in range(2)]))
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0][0], masks[0][1])


def test_dropout_is_off_in_evaluation():
    layer, x = CpuDropout(0.5), torch.ones(50)
    assert torch.equal(layer.eval()(x), x) and (layer.train()(x) == 0).any()
    assert torch.equal(CpuDropout(0.0).train()(x), x)


def formula(layer, hidden, mask, dropouts, queries=None):
    """A layer of BERT as in its paper, in plain torch operations with the same dropout masks, for the first `queries` tokens."""
    attention, after = layer.attention.self, layer.attention.output
    B, L, H = hidden.shape
    q, k, v = (
        F.linear(hidden, part.weight, part.bias).view(B, L, 4, -1).transpose(1, 2)
        for part in (attention.query, attention.key, attention.value)
    )
    Q, hidden = queries or L, hidden[:, :queries]
    p = torch.softmax(q[:, :, :Q] @ k.mT / (H // 4) ** 0.5 + mask, -1)
    keys = max(L, 16)
    shape = (B, 4, Q, keys)  # one row of each head for one query, else a head of each example
    p = p * dropout_mask(shape, dropouts[0], hidden.dtype)[..., :L]
    context = (p @ v).transpose(1, 2).reshape(B, Q, H)
    attended = F.linear(context, after.dense.weight, after.dense.bias)
    attended = attended * dropout_mask((B * Q, H), dropouts[1], hidden.dtype).view_as(attended)
    norm = after.LayerNorm(hidden + attended)
    inner = F.gelu(F.linear(norm, layer.intermediate.dense.weight, layer.intermediate.dense.bias))
    out = F.linear(inner, layer.output.dense.weight, layer.output.dense.bias)
    out = out * dropout_mask((B * Q, H), dropouts[2], hidden.dtype).view_as(out)
    return layer.output.LayerNorm(norm + out)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("length", [7, 19])
def test_a_fused_layer_with_dropout_is_the_formula(length, first):
    model, queries = model_of(), 1 if first else None
    plain, fused = copy.deepcopy(model).bert.encoder.layer[-1], model.bert.encoder.layer[-1]
    assert fuse_layers(model, encoder_layers(model)[1], first)
    hidden = torch.randn(3, length, 32, dtype=torch.float64)
    mask = torch.zeros(3, 1, 1, length, dtype=torch.float64)
    mask[1, ..., 4:] = torch.finfo(torch.float64).min
    target = torch.randn(3, queries or length, 32, dtype=torch.float64)
    found = []
    for run in (lambda x: formula(plain, x, mask, (0.2, 0.1, 0.1), queries), lambda x: fused(x, mask)):
        torch.manual_seed(8)
        x = hidden.clone().requires_grad_()
        out = run(x)
        (out * target).sum().backward()
        found.append((out, x.grad))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)
    for (name, mine), (_, its) in zip(fused.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad, rtol=0, atol=1e-11, msg=name)


@pytest.mark.parametrize(
    "config", [BERT, DistilBertConfig(vocab_size=60, dim=32, n_layers=3, n_heads=4, hidden_dim=64)]
)
def test_bfloat16_is_as_accurate_as_autocast(config):
    exact = model_of(config).eval()
    ids = torch.from_numpy(np.random.default_rng(0).integers(5, 60, (8, 24)))
    inputs = {"input_ids": ids, "attention_mask": (ids > 8).long().index_fill(1, torch.tensor([0]), 1)}

    def gradient(model, forward):
        model.zero_grad()
        forward().logsumexp(-1).sum().backward()
        return torch.cat([p.grad.double().flatten() for p in model.parameters()])

    truth = gradient(exact, lambda: exact(**inputs).logits)
    errors = []
    for fused in (False, True):
        model = copy.deepcopy(exact).float()
        module = Encoder(model).eval() if fused else None
        # as in training, where dropout excludes the other attention kernels
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            mine = gradient(model, lambda m=module, p=model: m(inputs)[0] if m else p(**inputs).logits)
        errors.append(float((mine - truth).norm() / truth.norm()))
    assert errors[1] < 1.25 * errors[0] < 0.05, errors


def test_results_are_the_same_without_gradients():
    module = Encoder(model_of()).eval()
    inputs = {"input_ids": torch.arange(5, 25).view(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.int64)}
    with_gradient = module(inputs)[0]
    with torch.inference_mode():
        without = module(inputs)[0]
    assert module.fused and with_gradient.requires_grad and not without.requires_grad
    torch.testing.assert_close(without, with_gradient.detach(), rtol=0, atol=1e-14)


def test_a_layer_with_another_activation_is_unchanged():
    config = copy.deepcopy(BERT)
    config.hidden_act = "relu"
    model = model_of(config)
    assert not fuse_layers(model, encoder_layers(model)[1])
    assert type(model.bert.encoder.layer[0]) is BertLayer


def test_unspecialize_takes_only_the_given_mixins_away():
    model = model_of()
    layers = encoder_layers(model)[1]
    only_first_token(model, layers)
    first_token_layer = type(layers[-1])
    fuse_layers(model, layers, True)
    for layer in layers:
        unspecialize(layer, FusedLayer)
    assert type(layers[0]) is BertLayer and type(layers[-1]) is first_token_layer
