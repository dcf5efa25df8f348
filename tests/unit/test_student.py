"""How a student is created: where its tensors come from, and what its export leaves out."""

import numpy as np
import pytest
import torch
from conftest import make_body
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2ForSequenceClassification, pipeline
from typer.testing import CliRunner

from pkd_dist.cli.main import app
from pkd_dist.config.schema import Student
from pkd_dist.errors import UserError
from pkd_dist.export.hf import best_student
from pkd_dist.files import sha256
from pkd_dist.model.encoder import load_model, load_tokenizer, save_model
from pkd_dist.model.student import create, open_student

LABELS = {"num_labels": 2, "id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
DEPTH = 12


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A 12-layer body."""
    return str(make_body(tmp_path_factory.mktemp("deep") / "bert", layers=DEPTH, hidden=16))


@pytest.fixture(scope="module")
def teacher(deep, tmp_path_factory):
    """The body as if fine-tuned: every weight changed, and a classifier."""
    folder = tmp_path_factory.mktemp("teacher")
    model = load_model(deep, new_head=True, **LABELS)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_model(model, load_tokenizer(deep), folder)
    return str(folder)


def weights(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def is_made_of(student, source, layers, but=()):
    """Assert that layer i of a student is layer layers[i] of the source, and that all other weights are the source's."""
    mine = student.state_dict()
    prefix = "bert.encoder.layer."
    assert student.config.num_hidden_layers == len(layers)
    assert {int(name.split(".")[3]) for name in mine if name.startswith(prefix)} == set(range(len(layers)))
    for name, value in mine.items():
        if name.startswith(prefix):
            number, rest = name.removeprefix(prefix).split(".", 1)
            assert torch.equal(value, source[f"{prefix}{layers[int(number)]}.{rest}"]), name
        else:
            assert torch.equal(value, source[name]) != name.startswith(but), name


def test_chosen_layers_of_the_teacher(teacher, deep):
    student, what = create(Student(layers=[2, 6, 10]), teacher, deep, LABELS, 42)
    is_made_of(student, weights(teacher), [2, 6, 10])
    assert what == "teacher layers [2, 6, 10] (from 0)"
    assert student.config.id2label == LABELS["id2label"]
    assert {name.split(".")[0] for name in student.state_dict()} == {"bert", "classifier"}


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({}, [1, 3, 5, 7, 9, 11]),
        ({"num_layers": 3}, [3, 7, 11]),
        ({"num_layers": 5}, [1, 4, 6, 9, 11]),
        ({"num_layers": 1}, [11]),
        ({"layers": [0]}, [0]),
        ({"layers": list(range(12))}, list(range(12))),
    ],
)
def test_default_layers_are_at_even_distance(teacher, deep, settings, layers):
    student, _ = create(Student(**settings), teacher, deep, LABELS, 42)
    is_made_of(student, weights(teacher), layers)


def init_student(teacher, layers, output):
    """`pkd init-student`, in this process."""
    arguments = ["init-student", "--teacher", str(teacher), "--layers", layers, "--output", str(output)]
    return CliRunner().invoke(app, arguments)


def test_pkd_init_student_writes_chosen_layers_bit_for_bit(teacher, tmp_path):
    done = init_student(teacher, "2,6,10", tmp_path / "student")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{tmp_path / 'student'}: 9,106 parameters, teacher layers [2, 6, 10] (from 0)\n"
    is_made_of(AutoModelForSequenceClassification.from_pretrained(tmp_path / "student"), weights(teacher), [2, 6, 10])
    assert pipeline("text-classification", str(tmp_path / "student"))("a good film")[0]["label"] in ("no", "yes")


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("3,12", "--layers: layer 12 is out of range; the teacher has 12 layers, counted 0 to 11"),
        ("6,2", "--layers must be increasing without repeats, not [6, 2]"),
        ("a,b", "--layers: 'a,b' is not a list of integers of at least 0, such as 2,6,10"),
        ("", "--layers: '' is not a list of integers"),
        (",", "--layers: ',' is not a list of integers"),
    ],
)
def test_pkd_init_student_rejects_layers(teacher, tmp_path, layers, message):
    done = init_student(teacher, layers, tmp_path / "student")
    assert done.exit_code == 2 and message in done.output and done.output.count("\n") == 1, done.output
    assert not (tmp_path / "student").exists()


def test_pkd_init_student_rejects_folders(teacher, deep, tmp_path):
    decoder = tmp_path / "gpt2"
    GPT2ForSequenceClassification(
        GPT2Config(vocab_size=60, n_embd=16, n_layer=4, n_head=2, n_positions=64)
    ).save_pretrained(decoder)
    load_tokenizer(deep).save_pretrained(decoder)
    for source, output, message in (
        (decoder, tmp_path / "student", f"--teacher: {decoder} is a gpt2, which predicts the next token"),
        (deep, tmp_path / "student", "lacks the weights of classifier.bias; it is not fine-tuned"),
        (tmp_path / "none", tmp_path / "student", f"--teacher: no such folder: {tmp_path / 'none'}"),
        (teacher, tmp_path / "none/student", f"--output: no such folder: {tmp_path / 'none'}"),
        (teacher, decoder, f"--output: {decoder} exists; choose a new folder"),
    ):
        done = init_student(source, "1,3", output)
        assert done.exit_code == 2 and message in done.output, done.output
    assert not (tmp_path / "student").exists()


def test_the_first_layers_before_fine_tuning(teacher, deep):
    student, what = create(Student(init="first_k", num_layers=4), teacher, deep, LABELS, 42)
    wanted = load_model(deep, new_head=True, **LABELS).state_dict()  # its head is drawn anew at each loading
    is_made_of(student, wanted, [0, 1, 2, 3], but=("classifier.weight",))
    assert what.startswith("the first 4 layers of ") and student.config.id2label == LABELS["id2label"]
    default, _ = create(Student(init="first_k"), teacher, deep, LABELS, 42)
    assert default.config.num_hidden_layers == DEPTH // 2


def test_random_weights_of_the_teachers_shape(teacher, deep):
    student, what = create(Student(init="random", num_layers=3), teacher, deep, LABELS, 42)
    assert what == "3 layers of random weights, 16 wide" and student.config.num_hidden_layers == 3
    source = weights(teacher)
    for name, value in student.state_dict().items():
        assert value.shape == source[name].shape
        if value.ndim > 1:
            assert not torch.equal(value, source[name]), name


@pytest.mark.parametrize("init", ["random", "first_k"])
def test_random_weights_follow_the_seed_and_leave_the_global_generator_alone(teacher, deep, init):
    settings = Student(init=init, num_layers=2)
    before = torch.get_rng_state()
    first, again, other = (create(settings, teacher, deep, LABELS, seed)[0].state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [3, 12]}, "student.layers: layer 12 is out of range; the teacher has 12 layers, counted 0 to 11"),
        ({"num_layers": 13}, "student.num_layers: 13 is more than the teacher's 12 layers"),
        ({"init": "first_k", "num_layers": 13}, "student.num_layers: 13 is more than the teacher's 12 layers"),
        ({"init": "./nowhere"}, "student.init: no such folder: ./nowhere"),
    ],
)
def test_layers_or_folders_that_do_not_exist(teacher, deep, settings, message):
    with pytest.raises(UserError) as error:
        create(Student(**settings), teacher, deep, LABELS, 42)
    assert message in str(error.value)


def test_a_folder_of_another_width_learns_a_projection_that_is_not_exported(teacher, deep, tmp_path):
    own = make_body(tmp_path / "own", layers=3, hidden=8)
    model, what = create(Student(init=str(own), num_layers=2), teacher, deep, LABELS, 42)
    assert what == "the folder own" and model.config.num_hidden_layers == 2
    model.save_pretrained(tmp_path / "init")
    used = np.arange(20)
    student = open_student(tmp_path / "init", None, "auto", 16, 42, used, False)
    assert student.projection is not None and student.projection.weight.shape == (16, 8)
    _, states, *_ = student({"input_ids": torch.tensor([[2, 7, 3]]), "attention_mask": torch.ones(1, 3)}, (1,))
    assert states.shape == (1, 1, 16), "as wide as the teacher's"
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    trained = {name: p.detach().clone() for name, p in student.named_parameters()}
    save_file(student.with_full_vocabulary(trained, 1.0), tmp_path / "best.safetensors")
    plain = best_student(tmp_path / "init", tmp_path / "best.safetensors", sha256(tmp_path / "best.safetensors"))
    assert type(plain) is type(model) and not plain.training
    start = model.state_dict()
    assert plain.state_dict().keys() == start.keys(), "no projection"
    for name, value in plain.state_dict().items():
        if name == "bert.embeddings.word_embeddings.weight":
            assert torch.equal(value[used], start[name][used] + 1) and torch.equal(value[20:], start[name][20:])
        else:
            assert torch.equal(value, start[name] + 1), name


def test_equal_widths_need_no_projection(teacher, deep, tmp_path):
    create(Student(layers=[1, 2]), teacher, deep, LABELS, 42)[0].save_pretrained(tmp_path)
    student = open_student(tmp_path, 0.3, "auto", 16, 42, np.arange(20), False)
    assert student.projection is None
    dropouts = {m.p for m in student.modules() if isinstance(m, torch.nn.Dropout)}
    assert dropouts == {0.3}
    again = open_student(tmp_path, None, "auto", 24, 42, np.arange(20), False).projection
    assert torch.equal(
        again.weight, open_student(tmp_path, None, "auto", 24, 42, np.arange(20), False).projection.weight
    )
