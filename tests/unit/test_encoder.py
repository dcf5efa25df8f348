"""The savings of an encoder are exact: same logits, states, gradients, and weights after 20 optimizer steps."""

import copy

import numpy as np
import pytest
import torch
from transformers import AlbertConfig, AutoModelForSequenceClassification, BertConfig, ElectraConfig, RobertaConfig

from pkd_dist.model.compatibility import longest_input
from pkd_dist.model.encoder import Encoder
from pkd_dist.model.vocabulary import used_vocabulary

SHAPE = {
    "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 48, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")
FAMILIES = [BertConfig, RobertaConfig, ElectraConfig]


def pair(family, dtype=torch.float64):
    """A plain model, an Encoder of a copy, and inputs with padding and unused vocabulary."""
    torch.manual_seed(1)
    config = family(**SHAPE, **({"summary_last_dropout": 0.0} if family is ElectraConfig else {}))
    config.classifier_dropout = 0.0
    plain = AutoModelForSequenceClassification.from_config(config).to(dtype).train()
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 90, (6, 16), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((16, 3, 9, 16, 1, 12)):
        ids[row, length:], mask[row, length:] = config.pad_token_id, 0
    used = used_vocabulary([ids.numpy().ravel()], 200, config.pad_token_id)
    encoder = Encoder(copy.deepcopy(plain), used_V=used).train()
    return plain, encoder, {"input_ids": ids, "attention_mask": mask}, used


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_states_and_gradients(family):
    plain, encoder, inputs, _ = pair(family)
    assert encoder.first_token_only and encoder.vocabulary is not None
    out = plain(**inputs, output_hidden_states=True)
    logits, states, *_ = encoder(inputs, (1, 2))
    torch.testing.assert_close(logits, out.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(states, torch.stack([out.hidden_states[i][:, 0] for i in (1, 2)], 1), rtol=0, atol=1e-12)
    out.logits.square().sum().backward()
    logits.square().sum().backward()
    gradients = {name: p.grad for name, p in encoder.model.named_parameters()}
    for name, p in plain.named_parameters():
        mine = gradients[name]
        if name == encoder.vocabulary.name:
            torch.testing.assert_close(mine, p.grad[encoder.vocabulary.used], rtol=0, atol=1e-12)
        elif p.grad is not None:
            torch.testing.assert_close(mine, p.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_after_20_steps_of_adamw_with_decay(family, dtype, tolerance):
    plain, encoder, inputs, _ = pair(family, dtype)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    rates = np.linspace(1e-3, 1e-4, 20)
    decay = 0.1
    for model, forward in ((plain, lambda: plain(**inputs).logits), (encoder, lambda: encoder(inputs)[0])):
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=decay)
        for rate in rates:
            optimizer.param_groups[0]["lr"] = float(rate)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(forward(), labels).backward()
            optimizer.step()
    weights = {name: p.detach() for name, p in encoder.named_parameters()}
    restored = encoder.with_full_vocabulary(weights, float(np.prod(1 - rates * decay)))
    for name, p in plain.named_parameters():
        if name.endswith("key.bias"):
            continue  # softmax cancels it: AdamW makes steps of the rounding error of its zero gradient
        torch.testing.assert_close(restored[f"model.{name}"], p.detach(), rtol=tolerance, atol=tolerance, msg=name)


def test_an_unknown_family_is_unchanged():
    torch.manual_seed(0)
    config = AlbertConfig(vocab_size=60, embedding_size=16, hidden_size=32, num_attention_heads=4, intermediate_size=64)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    inputs = {"input_ids": torch.arange(5, 15)[None], "attention_mask": torch.ones(1, 10, dtype=torch.int64)}
    before = model(**inputs).logits
    encoder = Encoder(model)
    assert not encoder.first_token_only
    torch.testing.assert_close(encoder(inputs)[0], before)


def test_states_of_all_tokens_need_the_full_last_layer():
    plain, _, inputs, _ = pair(BertConfig)
    encoder = Encoder(copy.deepcopy(plain), all_tokens=True)
    _, states, *_ = encoder(inputs, (1, 3), tokens=True)
    hidden = plain(**inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[:, :, 1], hidden[3], rtol=0, atol=1e-12)


def test_a_padding_token_with_a_high_id_keeps_no_others():
    config = BertConfig(**SHAPE, pad_token_id=190)
    plain = AutoModelForSequenceClassification.from_config(config).double().eval()
    ids = torch.tensor([[5, 80, 190], [7, 9, 6]])
    used = used_vocabulary([ids.numpy().ravel()], 200, 190)
    encoder = Encoder(copy.deepcopy(plain), used_V=used)
    assert encoder.vocabulary.used.tolist() == [5, 6, 7, 9, 80, 190]
    inputs = {"input_ids": ids, "attention_mask": (ids != 190).long()}
    torch.testing.assert_close(encoder(inputs)[0], plain(**inputs).logits, rtol=0, atol=1e-12)
    encoder(inputs)[0].sum().backward()
    table = encoder.model.get_input_embeddings().weight
    assert not table.grad[5].any() and table.grad[:5].any(1).all(), "padding is not trained"


def test_a_token_outside_the_table_raises():
    _, encoder, inputs, _ = pair(BertConfig)
    with pytest.raises(IndexError):
        encoder({**inputs, "input_ids": torch.full((6, 16), 199)})


def test_longest_input():
    assert longest_input(BertConfig(max_position_embeddings=512)) == 512
    assert longest_input(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
