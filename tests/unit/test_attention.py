"""Queries, keys and values of each family, and the whole loss of a step, against the modules of the plain model."""

import copy

import numpy as np
import pytest
import torch
import transformers as hf
from families import DEEP, FAMILIES, SIZE, shape_of
from scipy.special import log_softmax, softmax

from pkd_dist.config.distill import Distill
from pkd_dist.data.batches import Batch
from pkd_dist.distillation.losses import attention_loss, gram_loss, patience_loss, relation_loss, soft_loss
from pkd_dist.distillation.objective import DistillationLoss
from pkd_dist.errors import UserError
from pkd_dist.model.attention import require_comparable, teacher_attention
from pkd_dist.model.encoder import Encoder
from pkd_dist.model.layers import layer_map

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = [
    ["query", "key", "value"],
    ["q_lin", "k_lin", "v_lin"],
    ["q", "k", "v"],
    ["query_proj", "key_proj", "value_proj"],
]
SHAPES = {
    **{family: shape_of(family) for family in FAMILIES},
    "albert, two groups": shape_of("albert", num_hidden_groups=2),
    "mpnet": hf.MPNetConfig(**DEEP | {"max_position_embeddings": 66}),
}


def plain_model(config, layers=4):
    torch.manual_seed(1)
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    model = hf.AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    return model


def inputs():
    ids = torch.randint(5, SIZE, (3, 8), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    for row, length in enumerate((8, 3, 6)):
        ids[row, length:], mask[row, length:] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def recorded(model):
    """The outputs of a plain model's own projections: for each layer, queries, keys and values, (B, L, 3, H)."""
    found = {name: [] for names in NAMES for name in names} | {"Wqkv": []}
    named = [(path.rpartition(".")[2], module) for path, module in model.named_modules()]

    def record(name, out):
        if out.shape[:2] == (3, 8):  # DeBERTa projects its relative positions too
            found[name].append(out)

    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: record(name, out))
        for name, module in named
        if name in found
    ]
    with torch.no_grad():
        model(**inputs())
    for hook in hooks:
        hook.remove()
    if found["Wqkv"]:
        return [fused.unflatten(-1, (3, -1)) for fused in found["Wqkv"]]
    (own,) = (names for names in NAMES if found[names[0]])
    return [torch.stack(parts, 2) for parts in zip(*(found[name] for name in own), strict=True)]


@pytest.mark.parametrize("family", SHAPES)
def test_they_are_those_that_the_layers_compute(family):
    """Through an encoder with all its savings, and from the hidden states of a teacher."""
    plain = plain_model(SHAPES[family])
    wanted = recorded(plain)
    assert len(wanted) == 4
    encoder = Encoder(copy.deepcopy(plain)).eval()
    with torch.no_grad():
        out = encoder(inputs(), (1,), False, (4, 1, 3))
        hidden = plain(**inputs(), output_hidden_states=True).hidden_states
    real = inputs()["attention_mask"].bool()
    assert out.states.shape == (3, 1, 32) and out.attention.shape == (3, 8, 3, 3, 32)
    for place, layer in enumerate((4, 1, 3)):
        torch.testing.assert_close(out.attention[:, :, place][real], wanted[layer - 1][real], rtol=0, atol=1e-5)
    teacher = teacher_attention(plain, (4, 2), torch.float32, torch.device("cpu"))
    again = teacher([hidden[3], hidden[1]])
    assert teacher.heads == 4 and not again.requires_grad
    for place, layer in enumerate((4, 2)):
        torch.testing.assert_close(again[:, :, place][real], wanted[layer - 1][real], rtol=0, atol=1e-5)


def test_gradients_reach_the_students_projections_and_the_layers_below():
    encoder = Encoder(plain_model(SHAPES["bert"], 2)).train()
    encoder(inputs(), (), False, (2,)).attention.square().sum().backward()
    given = {name for name, p in encoder.model.bert.encoder.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"layer.1.attention.self.query.weight", "layer.1.attention.self.value.bias"} <= given
    assert "layer.0.output.dense.weight" in given and "layer.1.output.dense.weight" not in given


TERMS = Distill(
    alpha=0.3, beta=2, gram=3, relations=4, attention=5, relation_heads=2, relation_layer=3, patience=[2], normalize=False,
)  # fmt: skip


@pytest.mark.parametrize("states", ["cls", "tokens"])
def test_the_loss_of_a_step_is_the_weighted_sum_of_its_terms(states):
    """The terms from plain models and their recorded projections, of a student with a layer pair and a last layer."""
    distill = TERMS.model_copy(update={"states": states})
    teacher, student = plain_model(SHAPES["bert"]), plain_model(SHAPES["distilbert"], 2)
    given, layers = inputs(), layer_map(distill, 4, 2)
    assert layers.teacher_states == (2, 1) and layers.attention == ((1, 2), (2, 3))
    labels = torch.tensor([1, 0, 1])
    with torch.no_grad():
        its, mine = (model(**given, output_hidden_states=True) for model in (teacher, student))
    batch = Batch(
        rows_B=np.arange(3), ids_B=np.arange(3), input_ids_BL=given["input_ids"], attention_mask_BL=given["attention_mask"],
        type_ids_BL=None, labels_B=labels, weight_B=torch.ones(3), tokens=0, teacher_logits_BC=its.logits,
        teacher_states=torch.stack([its.hidden_states[layer] for layer in layers.teacher_states], 2),
    )  # fmt: skip
    attention = teacher_attention(teacher, [t for _, t in layers.attention], torch.float32, torch.device("cpu"))
    loss = DistillationLoss(distill, layers, None, attention)
    with torch.no_grad():
        got = loss(Encoder(copy.deepcopy(student), all_tokens=True).eval(), batch)
    s, t, mask = mine.hidden_states[1][:, :, None], its.hidden_states[2][:, :, None], given["attention_mask"]
    ours, theirs = recorded(student), recorded(teacher)
    expected = {
        "ce": torch.tensor(-log_softmax(mine.logits, 1)[range(3), labels]),
        "ds": soft_loss(mine.logits, its.logits, 5.0),
        "pt": patience_loss(s, t, False, "mean", mask)
        if states == "tokens"
        else patience_loss(s[:, 0], t[:, 0], False),
        "gram": gram_loss(s, t, mask),
        "rel": relation_loss(ours[1], theirs[2], 2, mask),
        "att": attention_loss(torch.stack(ours, 2), torch.stack(theirs[1:3], 2), 4, mask),
    }
    expected["total"] = sum(weight * expected[name] for name, weight in distill.weights.items())
    assert list(got) == ["total", "ce", "ds", "pt", "gram", "rel", "att"]
    for name, values in expected.items():
        torch.testing.assert_close(got[name], values, rtol=1e-4, atol=1e-5, msg=name)


def test_scores_are_those_of_the_attention_itself():
    """The softmax of the products is what the model attends with."""
    model = plain_model(SHAPES["bert"])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(**inputs(), output_attentions=True).attentions[1]
    query, key = (recorded(model)[1][:, :, i].unflatten(-1, (4, -1)).transpose(1, 2) for i in (0, 1))
    scores = (query @ key.transpose(-2, -1) / 8**0.5).numpy()
    np.testing.assert_allclose(softmax(scores[0], -1), weights[0], atol=1e-6)


def test_terms_without_a_weight_are_not_computed():
    encoder = Encoder(plain_model(SHAPES["bert"], 2)).eval()
    given = inputs()
    batch = Batch(
        rows_B=np.arange(3), ids_B=np.arange(3), input_ids_BL=given["input_ids"], attention_mask_BL=given["attention_mask"],
        type_ids_BL=None, labels_B=torch.tensor([1, 0, 1]), weight_B=torch.ones(3), tokens=0,
        teacher_logits_BC=torch.zeros(3, 2), teacher_states=torch.zeros(3, 1, 32),
    )  # fmt: skip
    assert list(DistillationLoss(Distill(), layer_map(Distill(), 4, 2))(encoder, batch)) == ["total", "ce", "ds", "pt"]
    labels_alone = Distill(alpha=0, beta=0)
    assert list(DistillationLoss(labels_alone, layer_map(labels_alone, 4, 2))(encoder, batch)) == ["total", "ce"]
    assert labels_alone.formula == "L = 1 CE" and Distill().formula == "L = 0.5 CE + 0.5 DS + 100 PT"
    assert TERMS.formula == "L = 0.7 CE + 0.3 DS + 2 PT + 3 GRAM + 4 REL + 5 ATT"


@pytest.mark.parametrize(
    ("distill", "teacher", "student", "message"),
    [
        (Distill(relations=1), hf.FNetConfig(hidden_size=32), SHAPES["bert"],
         r"distill\.relations: the teacher is a fnet, whose queries, keys and values are not known; it works for bert, roberta,"),
        (Distill(attention=1), SHAPES["bert"], SHAPES["modernbert"],
         r"distill\.attention: the student is a modernbert, whose attention scores depend on positions as well; it works for b"),
        (Distill(relations=1, relation_heads=5), SHAPES["bert"], SHAPES["bert"],
         r"distill\.relation_heads: 5 does not divide the teacher's width, 32; give a number that divides the widths of both"),
        (Distill(relations=1), SHAPES["bert"], shape_of("bert", hidden_size=18, num_attention_heads=2),
         r"distill\.relation_heads: 4 does not divide the student's width, 18"),
        (Distill(attention=1), SHAPES["bert"], shape_of("bert", hidden_size=16, num_attention_heads=2),
         r"distill\.attention: the teacher has 4 attention heads, the student 2; use distill\.relations, which"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_compared(distill, teacher, student, message):
    with pytest.raises(UserError, match=message):
        require_comparable(distill, teacher, student)


def test_models_that_can_be_compared():
    require_comparable(Distill(relations=1), SHAPES["modernbert"], shape_of("deberta-v2", hidden_size=16))
    require_comparable(Distill(attention=1), SHAPES["bert"], SHAPES["distilbert"])
