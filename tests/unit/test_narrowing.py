"""A narrowed student keeps the dimensions, heads and neurons with the largest weights, and nothing else of its teacher changes."""

import numpy as np
import pytest
import torch
from families import make_folder

from pkd_dist.config.schema import Student
from pkd_dist.errors import UserError
from pkd_dist.model.encoder import load_config, load_model, load_tokenizer
from pkd_dist.model.student import create, planned_config, planned_depth

LABELS = {"num_labels": 2, "id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
LAYER = {
    "bert": ("bert.encoder.layer.{}.", [f"attention.self.{name}" for name in ("query", "key", "value")],
             "attention.output.dense", "intermediate.dense", "output.dense"),
    "distilbert": ("distilbert.transformer.layer.{}.", [f"attention.{name}_lin" for name in "qkv"],
                   "attention.out_lin", "ffn.lin1", "ffn.lin2"),
}  # fmt: skip


@pytest.fixture(params=LAYER)
def teacher(request, tmp_path):
    """A family and a classifier of 4 layers: 32 wide, 4 heads, 64 neurons; no two weights are equal."""
    folder = make_folder(tmp_path / request.param, request.param, classifier=True)
    model = load_model(folder)
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    return request.param, folder, {name: value.double().numpy() for name, value in model.state_dict().items()}


def shares(*squares):
    return sum(values / values.sum() for values in squares)


def largest(points, count):
    return np.sort(np.argsort(-points)[:count])


def test_what_is_kept_has_the_largest_weights(teacher):
    family, folder, before = teacher
    student, what = create(Student(layers=[1, 3], hidden_size=16, intermediate_size=24), folder, folder, LABELS, 1)
    assert what == "teacher layers [1, 3] (from 0), narrowed to 16 (feed-forward 24)"
    prefix, projections, out, up, down = LAYER[family]
    copied = {}
    for name, value in before.items():
        if not name.startswith(prefix.split("{")[0]):
            copied[name] = value
        for new, old in enumerate((1, 3)):
            if name.startswith(prefix.format(old)):
                copied[prefix.format(new) + name.removeprefix(prefix.format(old))] = value

    of_heads, of_neurons, hidden = {}, {}, []
    for layer in map(prefix.format, range(2)):
        in_rows = [(copied[f"{layer}{name}.weight"] ** 2).sum(1) for name in projections]
        biases = [copied[f"{layer}{name}.bias"] ** 2 for name in projections]
        points = shares(*in_rows, *biases, (copied[f"{layer}{out}.weight"] ** 2).sum(0))
        of_heads[layer] = np.repeat(largest(points.reshape(4, 8).sum(1), 2) * 8, 8) + np.tile(np.arange(8), 2)
        up_bias, up_rows = copied[f"{layer}{up}.bias"] ** 2, (copied[f"{layer}{up}.weight"] ** 2).sum(1)
        of_neurons[layer] = largest(shares(up_rows, up_bias, (copied[f"{layer}{down}.weight"] ** 2).sum(0)), 24)
    inner = {f"{layer}{name}" for layer in of_heads for name in (*projections, up)}
    for name, value in copied.items():
        base, _, kind = name.rpartition(".")
        if value.ndim == 1 and value.size == 32 and base not in inner:
            hidden.append(value**2)
        elif value.ndim == 2 and name != "classifier.weight":
            axes = [1] if base in inner or "embeddings" in base else [0]
            axes = [0, 1] if "pooler" in base or "pre_classifier" in base else axes
            hidden += [(value**2).sum(1 - axis) for axis in axes]
        elif value.ndim == 2:
            hidden.append((value**2).sum(0))
    kept = largest(shares(*hidden), 16)

    rows_cols = {}
    for layer in of_heads:
        rows_cols |= {f"{layer}{name}": (of_heads[layer], kept) for name in projections}
        rows_cols |= {f"{layer}{out}": (kept, of_heads[layer]), f"{layer}{up}": (of_neurons[layer], kept)}
        rows_cols |= {f"{layer}{down}": (kept, of_neurons[layer])}
    for name, value in student.state_dict().items():
        base, wanted = name.rpartition(".")[0], copied[name]
        rows, cols = rows_cols.get(base, (kept, kept))
        if wanted.ndim == 2:
            wanted = wanted[:, cols]
        if wanted.shape[0] == 32 and "embeddings" not in base or base in rows_cols:
            wanted = wanted[rows]
        if "LayerNorm" in base and wanted.shape[0] == 32:
            wanted = wanted[kept]
        assert np.array_equal(value.double().numpy(), wanted), name


def test_neurons_without_weights_are_the_first_to_go(teacher):
    """And the logits stay as they were."""
    family, folder, _ = teacher
    model = load_model(folder)
    prefix, _, _, up, down = LAYER[family]
    dead = torch.randperm(64)[:40]
    with torch.no_grad():
        for layer in range(4):
            for name in (up, down):
                linear = model.get_submodule(prefix.format(layer) + name)
                (linear.weight if name == up else linear.weight.T)[dead] = 0
            model.get_submodule(prefix.format(layer) + up).bias[dead] = 0
    model.save_pretrained(folder)
    student, _ = create(Student(layers=[0, 1, 2, 3], intermediate_size=24), folder, folder, LABELS, 1)
    given = load_tokenizer(folder)(["a good film", "bad"], padding=True, return_tensors="pt")
    given = {name: value for name, value in given.items() if family == "bert" or name != "token_type_ids"}
    with torch.inference_mode():
        torch.testing.assert_close(student.eval()(**given).logits, model.eval()(**given).logits)


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
@pytest.mark.parametrize("init", ["teacher_layers", "first_k", "random"])
def test_every_start_has_the_planned_shape(family, init, tmp_path):
    fields = {"embedding_size": 24} if family == "electra" else {}
    folder = make_folder(tmp_path / family, family, classifier=True, **fields)
    settings = Student(init=init, num_layers=2, hidden_size=16, intermediate_size=40)
    planned = planned_config(settings, load_config(folder))
    assert planned_depth(settings, load_config(folder), load_tokenizer(folder), 16) == 2
    made = create(settings, folder, folder, LABELS, 1)[0]
    for config in (made.config, planned):
        assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (16, 2, 2)
    inner = "hidden_dim" if family == "distilbert" else "intermediate_size"
    assert getattr(made.config, inner) == getattr(planned, inner) == 40
    text = load_tokenizer(folder)("a good film", return_tensors="pt")
    assert made(input_ids=text["input_ids"]).logits.shape == (1, 2)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("bert", {"hidden_size": 20}, "student.hidden_size: 20 is not possible: the teacher has a head size of 8"),
        ("bert", {"hidden_size": 40}, "student.hidden_size: 40 is more than the teacher's 32, from which it is taken"),
        ("bert", {"intermediate_size": 65}, "student.intermediate_size: 65 is more than the teacher's 64"),
        ("electra", {"hidden_size": 16}, "student.hidden_size: 16 is the size of the teacher's embeddings"),
        ("albert", {"hidden_size": 16}, "student.hidden_size: is not possible: only layers of BERT, RoBERTa, ELECTRA"),
        (
            "modernbert",
            {"init": "first_k", "intermediate_size": 16},
            "student.intermediate_size: is not possible: only",
        ),
    ],
)
def test_sizes_that_cannot_be_taken(family, settings, message, tmp_path):
    folder = make_folder(tmp_path / family, family, classifier=True)
    with pytest.raises(UserError) as error:
        planned_depth(Student(**settings), load_config(folder), load_tokenizer(folder), 16)
    assert str(error.value).startswith(message)
