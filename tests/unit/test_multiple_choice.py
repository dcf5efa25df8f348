"""Multiple choice: what is read, how options are tokenized, the loss against an independent formula, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from families import FAMILIES, make_folder, shape_of, tokenizer_of
from race_folders import make_race, rows, write
from scipy.special import log_softmax, softmax
from starlette.exceptions import HTTPException
from transformers import AutoModelForMultipleChoice, DebertaConfig

from pkd_dist.config.load import load
from pkd_dist.data import answers, sources, tasks, text, tokens
from pkd_dist.data.batches import collate
from pkd_dist.data.choices import Choices
from pkd_dist.data.columns import TextColumn
from pkd_dist.data.examples import Split, example_ids
from pkd_dist.data.on_device import DeviceTokens
from pkd_dist.data.trimming import require_exact
from pkd_dist.distillation.losses import patience_loss
from pkd_dist.distillation.objective import DistillationLoss
from pkd_dist.distillation.teacher import LiveTeacher
from pkd_dist.errors import UserError
from pkd_dist.evaluation.answer import choice
from pkd_dist.evaluation.metrics import score, undefined
from pkd_dist.model.compatibility import require_compatible
from pkd_dist.model.encoder import Encoder, load_model, require_classifier
from pkd_dist.model.head import divide_logits
from pkd_dist.model.layers import LayerMap
from pkd_dist.model.outputs import Outputs
from pkd_dist.serve.requests import Limits, parse_texts

pytestmark = pytest.mark.usefixtures("one_thread")
RNG = np.random.default_rng(0)
OWN = (
    "task.name=custom",
    "task.kind=multiple_choice",
    "task.text=[context,question]",
    "task.options=options",
    "task.label=right",
)


def config(*overrides):
    return load(None, ["run.dir=unused", "task.data=unused", *OWN, *overrides])


def task(*overrides):
    return tasks.resolve(config(*overrides).task)


def race():
    return tasks.resolve(load(None, ["run.dir=unused", "task.data=unused", "task.name=RACE"]).task)


# ------------------------------------------------------------------------------------------------------------- reading

ROWS = [
    {"context": "it rains", "question": "what falls ?", "options": ["snow", "rain", "hail"], "right": 1},
    {"context": "", "question": "the sky is _ .", "options": ["blue", "red", "2"], "right": 0},
    {"context": "one and one", "question": "is", "options": ["3", "1", "2"], "right": 2},
]
LABELS = {"index": ("1", "0", "2"), "letter": ("B", "A", "C"), "text": ("rain", "blue", "2")}


def write_table(path: Path, form: str, label_is: str) -> list[str]:
    """Write the rows in a form, and return the overrides that read them."""
    labels = LABELS[label_is]
    if form in ("lists", "parquet"):
        given = [row | {"right": label} for row, label in zip(ROWS, labels, strict=True)]
        if form == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(given), path.with_suffix(".parquet"))
        else:
            path.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, given)))
        return [f"task.label_is={label_is}"]
    lines = ["context\tquestion\t" + ("a\tb\tc" if form == "columns" else "options") + "\tright"]
    for row, label in zip(ROWS, labels, strict=True):
        options = "\t".join(row["options"]) if form == "columns" else json.dumps(row["options"])
        lines.append(f"{row['context']}\t{row['question']}\t{options}\t{label}")
    path.with_suffix(".tsv").write_text("\n".join(lines) + "\n")
    return [f"task.label_is={label_is}", *(["task.options=[a,b,c]"] if form == "columns" else [])]


@pytest.mark.parametrize("label_is", LABELS)
@pytest.mark.parametrize("form", ["lists", "parquet", "columns", "lists in text"])
def test_every_form_of_options_and_labels_is_the_same_data(tmp_path, form, label_is):
    overrides = write_table(tmp_path / "train", form, label_is)
    read = text.read(str(tmp_path), "train", task(*overrides))
    assert [list(column) for column in read.texts] == [
        ["it rains", "", "one and one"], ["what falls ?", "the sky is _ .", "is"],
        ["snow", "blue", "3"], ["rain", "red", "1"], ["hail", "2", "2"],
    ]  # fmt: skip
    assert read.labels_N.tolist() == [1, 0, 2] and read.labels_N.dtype == np.int64 and read.options == 3
    assert read.classes == (("A", "B", "C") if label_is == "letter" else ("0", "1", "2"))
    assert any("context is empty in 1 line: 3" in note or "context is empty in 1 row: 2" in note or "context is empty in 1 line: 2" in note for note in read.notes)  # fmt: skip


def test_race_is_read_as_published(tmp_path):
    folder = make_race(tmp_path / "RACE")
    for split in ("train", "dev", "test"):
        read = text.read(str(folder), split, race())
        expected = []
        for level in ("high", "middle"):
            for path in sorted((folder / split / level).iterdir(), key=lambda path: int(path.stem)):
                found = json.loads(path.read_text())
                expected += [
                    (found["article"], q, *o) for q, o in zip(found["questions"], found["options"], strict=True)
                ]
        assert list(zip(*read.texts, strict=True)) == expected
        assert set(read.labels_N.tolist()) == {0, 1, 2, 3} and read.choices == Choices(True, "_")


def test_a_race_test_split_may_have_no_answers(tmp_path):
    folder = make_race(tmp_path / "RACE")
    for path in (folder / "test").rglob("*.txt"):
        found = json.loads(path.read_text())
        del found["answers"]
        write(path, found)
    found = text.read_all(str(folder), race())
    assert (found["test"].labels_N == -1).all() and found["test"].classes == ("A", "B", "C", "D")


def test_the_option_takes_the_place_of_the_gap_or_follows_the_question():
    columns = [["c1", "c2"], ["is it _ or _", "why"], ["x", "y"], ["", "z"]]
    contexts, seconds = Choices(True, "_").pairs(columns)
    assert contexts == ["c1", "c1", "c2", "c2"] and seconds == ["is it x or x", "is it  or ", "why y", "why z"]
    assert Choices(True).pairs([["c"], [""], ["x"], ["y"]])[1] == ["x", "y"], "an empty question leaves no space"
    assert Choices(False).pairs([["c"], ["x"], ["y"]]) == [["c", "c"], ["x", "y"]]


GOOD = {"article": "a", "questions": ["q"], "options": [["w", "x", "y", "z"]], "answers": ["A"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "1.txt: not valid JSON: "),
        ([], "1.txt: must be a JSON object with the keys article, questions, options and answers"),
        ({"article": "a"}, "1.txt: has no key 'questions'; its keys are 'article'"),
        (GOOD | {"answers": ["E"]}, "1.txt, question 1: answer 'E' is not one of A, B, C, D"),
        (GOOD | {"answers": ["0"]}, "1.txt, question 1: answer '0' is not one of A, B, C, D"),
        (GOOD | {"answers": [""]}, "1.txt, question 1: answer is empty, null or NaN"),
        (GOOD | {"answers": []}, "1.txt: has 1 questions, 1 options, 0 answers; each question needs"),
        (GOOD | {"options": [["w", "x"]]}, "1.txt, question 1: options has 2 options, the first example has 4"),
        (GOOD | {"options": ["w"]}, "1.txt, question 1: options 'w' is not a list of texts"),
        (GOOD | {"questions": None}, "1.txt: questions must be a list with an entry for each question"),
        (GOOD | {"options": None}, "1.txt: options must be a list with an entry for each question"),
        (GOOD | {"options": "wxyz"}, "1.txt: options must be a list with an entry for each question"),
        (GOOD | {"options": [["w", "x", "y", None]]}, "1.txt, question 1: a value of options is null or NaN"),
        (GOOD | {"article": "", "questions": [""]}, "1.txt, question 1: article and question are both empty"),
        (GOOD | {"article": ["a"]}, "1.txt, question 1: article must be text or a finite number, not a list"),
    ],
)  # fmt: skip
def test_a_damaged_race_file_is_named_with_its_question(tmp_path, content, message):
    folder = make_race(tmp_path / "RACE")
    path = folder / "train/middle/1.txt"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as refused:
        text.read_all(str(folder), race())
    assert f"train/middle/{message}" in str(refused.value) and "\n" not in str(refused.value)
    assert "task.label_is" not in str(refused.value), "RACE has no such setting"


def test_a_folder_named_as_a_text_of_race_is_no_text(tmp_path):
    folder = make_race(tmp_path / "RACE")
    before = sources.digests(str(folder), ("train",), race())
    (folder / "train/middle/9.txt").mkdir()
    assert sources.digests(str(folder), ("train",), race()) == before
    text.read_all(str(folder), race())


def test_a_table_beside_the_texts_of_race_is_refused(tmp_path):
    folder = make_race(tmp_path / "RACE")
    (folder / "dev.csv").write_text("article,question,options,answer\n")
    with pytest.raises(UserError, match=r"dev\.csv and dev both contain the split dev; keep one"):
        text.read_all(str(folder), race())


def test_lists_with_an_empty_or_a_repeated_option_are_noted(tmp_path):
    options = (["a", "b"], ["a", ""], ["b", "b"], [" ", "a"])
    given = [{"context": f"c {i}", "question": "q", "options": each, "right": 0} for i, each in enumerate(options)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, given)))
    notes = text.read(str(tmp_path), "train", task()).notes
    assert "options has an empty option in 2 lines: 2, 4" in notes
    assert "options has the same option twice in 1 line: 3" in notes


def test_a_folder_without_texts_of_race_says_what_is_expected(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"has no split 'train'; expected one of train\.tsv, .*train/middle/\*\.txt"):
        text.read_all(str(tmp_path), race())


@pytest.mark.parametrize(
    ("lines", "overrides", "message"),
    [
        (["c\tq\tx\ty\t2"], [], "train.tsv:2: right '2' is not an index from 0 to 1; task.label_is says how labels name options"),
        (["c\tq\tx\ty\t0", "c\tq\tx\t\t1"], [], "train.tsv:3: b is empty; all examples need the same number of options"),
        (["c\tq\tx\ty\tA"], [], "train.tsv:2: right 'A' is not an index from 0 to 1"),
        (["c\tq\tx\ty\ta"], ["task.label_is=letter"], "train.tsv:2: right 'a' is not one of A, B"),
        (["c\tq\tx\tx\tx"], ["task.label_is=text"], "train.tsv:2: right 'x' is the text of 2 options, 'x', 'x'"),
        (["c\tq\tx\ty\tX"], ["task.label_is=text"], "train.tsv:2: right 'X' is none of the options, 'x', 'y'"),
        (["c\tq\tx\ty\t0"], ["task.options=[a,d]"], "has no column 'd'"),
        (["c\tq\tx\ty\t0"], ["task.options=a"], "train.tsv:2: a 'x' is not a list of texts, such as"),
        (['c\tq\t["x"]\ty\t0'], ["task.options=a"], "train.tsv:2: a has 1 option(s); an example needs 2 to 26"),
        (['c\tq\t["x", 1]\ty\t0'], ["task.options=a"], "train.tsv:2: a '[\"x\", 1]' is not a list of texts"),
    ],
)  # fmt: skip
def test_bad_rows_are_refused_with_file_and_line(tmp_path, lines, overrides, message):
    (tmp_path / "train.tsv").write_text("\n".join(["context\tquestion\ta\tb\tright", *lines, ""]))
    with pytest.raises(UserError) as refused:
        text.read(str(tmp_path), "train", task("task.options=[a,b]", *overrides))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_all_splits_have_the_options_of_train(tmp_path):
    for name, count in (("train", 3), ("dev", 2)):
        given = [row | {"options": row["options"][:count], "right": 0} for row in ROWS]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, given)))
    with pytest.raises(UserError, match=r"dev\.jsonl:1: options has 2 options, the training split has 3"):
        text.read_all(str(tmp_path), task())


# -------------------------------------------------------------------------------------------------------------- tokens


def split_of(given):
    columns = [[row["context"] for row in given], [row["question"] for row in given]]
    columns += [list(column) for column in zip(*(row["options"] for row in given), strict=True)]
    texts = tuple(TextColumn(column) for column in columns)
    labels = np.array([row["right"] for row in given])
    return Split(example_ids(texts), texts, labels, tuple("0123"), "here", choices=Choices(True, "_"))


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_tokens_are_those_of_plain_transformers_truncating_the_context(tmp_path, family):
    tokenizer, given = tokenizer_of(family), rows(30)
    made = tokens.tokenize(split_of(given), tokenizer, 24, tmp_path / "set")
    assert made.options == 4 and len(made) == 30 and len(made.offsets_N1) == 121 and made.lengths_N.max() == 24
    starts, lengths = made.spans_of(np.arange(30))
    assert starts.shape == lengths.shape == (30, 4) and (made.lengths_N == lengths.max(axis=1)).all()
    truncated = 0
    for i, row in enumerate(given):
        seconds = [
            row["question"].replace("_", o) if "_" in row["question"] else f"{row['question']} {o}"
            for o in row["options"]
        ]
        plain = tokenizer([row["context"]] * 4, seconds, truncation="only_first", max_length=24)["input_ids"]
        for j in range(4):
            assert made.input_ids_T[starts[i, j] : starts[i, j] + lengths[i, j]].tolist() == plain[j]
        whole = tokenizer([row["context"]] * 4, seconds)["input_ids"]
        truncated += any(len(ids) > 24 for ids in whole)
    assert made.truncated == truncated and 0 < truncated < 30


def test_a_second_text_without_room_for_the_first_is_truncated_too(tmp_path):
    given = rows(6)
    given[2] = given[2] | {"options": ["great " * 40, *given[2]["options"][1:]], "question": "the film was _"}
    made = tokens.tokenize(split_of(given), tokenizer_of("bert"), 24, tmp_path / "set")
    starts, lengths = made.spans_of(np.array([2]))
    assert lengths[0, 0] == 24 and made.input_ids_T[starts[0, 0] + 23] == 3, "it still ends with [SEP]"


def test_batches_have_an_axis_of_options_on_the_host_and_on_a_device(tmp_path):
    made = tokens.tokenize(split_of(rows(9)), tokenizer_of("bert"), 24, tmp_path / "set")
    picked = np.array([7, 0, 3])
    batch = collate(made, picked, np.ones(3), 0)
    starts, lengths = made.spans_of(picked)
    assert batch.input_ids_BL.shape[:2] == (3, 4) and batch.tokens == lengths.sum()
    assert (batch.attention_mask_BL.sum(-1).numpy() == lengths).all()
    assert (
        batch.input_ids_BL[1, 2, : lengths[1, 2]].tolist()
        == made.input_ids_T[starts[1, 2] : starts[1, 2] + lengths[1, 2]].tolist()
    )
    gathered = DeviceTokens(made, None, 0, torch.device("cpu")).rows(picked, np.ones(3)).batch()
    for name, value in gathered.tensors.items():
        torch.testing.assert_close(value, batch.tensors[name])
    part = made.subset(np.array([7, 3]))
    again = collate(part, np.array([1, 0]), np.ones(2), 0)
    width = again.input_ids_BL.shape[-1]
    torch.testing.assert_close(again.input_ids_BL, batch.input_ids_BL[[2, 0], :, :width])


def test_trimmed_tokens_of_options_are_compared_option_by_option(tmp_path):
    made = tokens.tokenize(split_of(rows(9)), tokenizer_of("bert"), 24, tmp_path / "set")
    require_exact(made, made, np.arange(60), unknown=1)


def test_the_order_of_the_rows_does_not_change_what_the_cache_is_keyed_by(tmp_path):
    given = rows(9)
    first, second = (
        tokens.tokenize(split_of(each), tokenizer_of("bert"), 24, tmp_path / str(i))
        for i, each in enumerate((given, given[::-1]))
    )
    assert first.input_digest == second.input_digest and first.digest != second.digest
    assert sorted(first.ids_N) == sorted(second.ids_N)


# --------------------------------------------------------------------------------------------------- models and losses


def choosing(folder, family):
    """A model of multiple choice of random weights."""
    made = make_folder(folder, family)
    model = AutoModelForMultipleChoice.from_pretrained(made)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    model.save_pretrained(made)
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_states_of_each_option_are_those_of_plain_transformers(family, tmp_path):
    folder = choosing(tmp_path / "model", family)
    made = tokens.tokenize(split_of(rows(7)), tokenizer_of(family), 24, tmp_path / "set")
    batch = collate(made, np.arange(7), np.ones(7), 1 if family == "roberta" else 0)
    plain = AutoModelForMultipleChoice.from_pretrained(folder).eval()
    encoder = Encoder(load_model(folder)).eval()
    inputs = {name: value for name, value in batch.inputs.items() if name != "token_type_ids" or family not in ("roberta", "distilbert", "modernbert")}  # fmt: skip
    with torch.no_grad():
        expected = plain(**inputs, output_hidden_states=True)
        found = encoder(batch.inputs, (1, 3))
    assert found.logits_BC.shape == (7, 4) and found.states.shape == (7, 4, 2, 32)
    torch.testing.assert_close(found.logits_BC, expected.logits, atol=2e-5, rtol=1e-4)
    for i, layer in enumerate((1, 3)):
        states = expected.hidden_states[layer][:, 0].view(7, 4, -1)
        torch.testing.assert_close(found.states[:, :, i], states, atol=2e-5, rtol=1e-4)
    teacher = LiveTeacher(load_model(folder), (1, 3), "float32", "float32", False, torch.device("cpu"))
    logits, states = teacher(batch.inputs)
    torch.testing.assert_close(logits.clone(), found.logits_BC, atol=1e-6, rtol=1e-5)
    assert states.shape == (7, 4, 2, 32)
    assert LiveTeacher(load_model(folder), (), "float32", "float32", False, torch.device("cpu"))(batch.inputs)[
        1
    ].shape == (7, 4, 0, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_of_every_family_contains_the_temperature(family, tmp_path):
    model = load_model(choosing(tmp_path, family), num_labels=1).eval()
    ids = torch.tensor([[[2, 9, 12, 7, 3], [2, 8, 8, 15, 3], [2, 8, 3, 15, 3]]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        before = model(**inputs).logits.clone()
        torch.testing.assert_close(divide_logits(model, 2.5)(**inputs).logits, before / 2.5, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pt_reduction", ["mean", "sum", "pair_sum"])
@pytest.mark.parametrize("ds_reduction", ["batchmean", "mean", "soft_ce", "soft_ce_mean"])
def test_the_loss_of_four_options_is_that_of_an_independent_formula(tmp_path, ds_reduction, pt_reduction):
    B, C, M, H, T = 5, 4, 3, 8, 3.0
    made = tokens.tokenize(split_of(rows(B)), tokenizer_of("bert"), 24, tmp_path / "set")
    mine, its = RNG.normal(size=(2, B, C)) * 3
    my_states, its_states = RNG.normal(size=(2, B, C, M, H))
    batch = collate(made, np.arange(B), np.ones(B), 0)
    settings = config(
        "distill.alpha=0.3", "distill.beta=7", f"distill.temperature={T}", f"distill.ds_reduction={ds_reduction}",
        f"distill.pt_reduction={pt_reduction}",
    ).distill  # fmt: skip
    batch = type(batch)(
        **vars(batch) | {"teacher_logits_BC": torch.tensor(its), "teacher_states": torch.tensor(its_states)}
    )
    outputs = Outputs(torch.tensor(mine), torch.tensor(my_states), torch.tensor(my_states))
    layers = LayerMap(pairs=((1, 2), (2, 4), (3, 6)))
    found = DistillationLoss(settings, layers)(lambda *_: outputs, batch)
    expected = []
    for b in range(B):
        ce = -log_softmax(mine[b])[made.labels_N[b]]
        p, log_q = softmax(its[b] / T), log_softmax(mine[b] / T)
        ds = {"batchmean": T**2, "mean": T**2 / C}.get(ds_reduction, 0) * (p * (np.log(p) - log_q)).sum()
        ds += {"soft_ce": 1, "soft_ce_mean": 1 / C}.get(ds_reduction, 0) * -(p * log_q).sum()
        pt = 0.0
        for o in range(C):
            for m in range(M):
                x, y = my_states[b, o, m], its_states[b, o, m]
                square = ((x / np.linalg.norm(x) - y / np.linalg.norm(y)) ** 2).sum()
                pt += square / C / {"mean": M * H, "sum": 1, "pair_sum": H}[pt_reduction]
        expected.append(0.7 * ce + 0.3 * ds + 7 * pt)
    np.testing.assert_allclose(found["total"], expected, rtol=1e-10)
    assert found["total"].dtype == torch.float64 and set(found) == {"total", "ce", "ds", "pt"}


def test_the_patience_term_of_one_option_is_that_of_a_text():
    student, teacher = torch.tensor(RNG.normal(size=(2, 6, 3, 8)))
    torch.testing.assert_close(patience_loss(student[:, None], teacher[:, None]), patience_loss(student, teacher))


def test_answers_are_matched_by_options_that_are_numbers(tmp_path):
    given = [{"context": f"c {i}", "question": "q", "options": [1, 2.0, 0.5], "right": i} for i in range(3)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, given)))
    split = text.read(str(tmp_path), "train", task())
    rows_of = [row | {"0": 0.25, "1": 0.25, "2": 0.5} for row in given[::-1]]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, rows_of)))
    found, _ = answers.read([str(tmp_path / "answers.jsonl")], "probabilities", task(), {"train": split}, list("012"))
    np.testing.assert_allclose(found["train"], np.log([[0.25, 0.25, 0.5]] * 3), rtol=1e-6)


def test_columns_of_options_that_are_named_as_classes_are_those_of_the_answers(tmp_path):
    own = task("task.options=[A,B]", "task.label_is=letter")
    (tmp_path / "train.csv").write_text("context,question,A,B,right\nc,q,x,y,A\nd,q,x,y,B\n")
    split = text.read(str(tmp_path), "train", own)
    (tmp_path / "answers").mkdir()
    path = tmp_path / "answers/train.csv"
    path.write_text("context,question,A,B\nc,q,0.9,0.1\nd,q,0.2,0.8\n")
    found, _ = answers.read([str(path)], "probabilities", own, {"train": split}, ["A", "B"])
    np.testing.assert_allclose(np.exp(found["train"]), [[0.9, 0.1], [0.2, 0.8]], rtol=1e-6)


def test_accuracy_is_the_only_metric():
    logits, labels = RNG.normal(size=(50, 4)), RNG.integers(4, size=50)
    found = score(logits, labels, task())
    assert found == {"accuracy": (logits.argmax(1) == labels).mean(), "main_metric": found["accuracy"]}
    assert undefined(logits, np.zeros(50, np.int64), task()) == []


def test_a_choice_has_the_index_the_option_and_all_probabilities():
    found = choice(np.float32([0.1, 2, -1]), ["x", "y", "z"], truncated=True)
    assert found["choice"] == 1 and found["option"] == "y" and found["truncated"]
    assert found["probabilities"] == pytest.approx(softmax([0.1, 2, -1]), rel=1e-6)
    assert found["probability"] == found["probabilities"][1]


# ------------------------------------------------------------------------------------------------------------- serving


def test_a_request_holds_texts_and_options():
    body = {
        "texts": [
            {"text": "c", "text_pair": "q", "options": ["x", "y"]},
            {"text": "c", "text_pair": "", "options": ["x", "y", "z"]},
        ]
    }
    assert parse_texts(json.dumps(body).encode(), True, Limits(), options=True) == (
        False,
        [("c", "q", "x", "y"), ("c", "", "x", "y", "z")],
    )
    assert parse_texts(b'{"text": "c", "options": ["x", "y"]}', False, Limits(), options=True) == (
        True,
        [("c", "x", "y")],
    )


@pytest.mark.parametrize(
    ("body", "pair", "message"),
    [
        ({"text": "c", "text_pair": "q"}, True, 'each text must be {"text": ..., "text_pair": ..., "options": [..., ...]}: the model takes a pair of texts and options'),
        ({"text": "c", "options": ["x"]}, False, "options must be a list of 2 to 26 strings"),
        ({"text": "c", "options": "xy"}, False, "options must be a list of 2 to 26 strings"),
        ({"text": "c", "options": ["x", 1]}, False, "options[1] must be a string"),
        ({"text": " ", "options": ["x", "y"]}, False, "text is empty"),
        ("c", False, "the body must be"),
    ],
)  # fmt: skip
def test_other_requests_are_refused(body, pair, message):
    with pytest.raises(HTTPException) as refused:
        parse_texts(json.dumps(body).encode(), pair, Limits(), options=True)
    assert message in refused.value.detail and refused.value.status_code == 422


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.positive=A"], "task.positive cannot be used with task.kind multiple_choice: no option is the positive class"),
        (["task.class_weights=balanced"], "task.class_weights cannot be used with task.kind multiple_choice"),
        (["task.class_names={0: A, 1: B}"], "task.class_names cannot be used with task.kind multiple_choice"),
        (["task.label_separator=;"], "task.label_separator cannot be used with task.kind multiple_choice"),
        (["task.augment={copies: 2}"], "task.augment cannot be used with task.kind multiple_choice"),
        (["distill.preset=strong"], "task.augment cannot be used with task.kind multiple_choice"),
        (["task.split={stratify: true}"], "task.split.stratify cannot be used with task.kind multiple_choice"),
        (["teacher={answers: [a.csv], answers_are: labels}", "task.label_is=text", "student.init=x"], "teacher.answers_are labels cannot be used with task.kind multiple_choice"),
        (["distill.states=tokens"], "distill.states tokens cannot be used with task.kind multiple_choice"),
        (["distill.preset=seed"], "distill.states tokens cannot be used with task.kind multiple_choice"),
        (["distill.gram=1"], "distill.gram cannot be used with task.kind multiple_choice"),
        (["distill.relations=1"], "distill.relations cannot be used with task.kind multiple_choice"),
        (["distill.attention=1"], "distill.attention cannot be used with task.kind multiple_choice"),
        (["export.formats=[onnx,triton]"], "export.formats triton cannot be used with task.kind multiple_choice"),
        (["task.metric=f1"], "task.metric f1 cannot be used with task.kind multiple_choice; allowed: accuracy"),
        (["task.options=null"], "task.kind multiple_choice needs task.options"),
        (["task.options=[a]"], "task.options must name two or more different columns"),
        (["task.options=[a,a]"], "task.options must name two or more different columns"),
        (["task.options=[a,right]"], "task.options: right is also a text or label column"),
        ([f"task.options={json.dumps([f'o{i}' for i in range(27)])}"], "task.options names 27 columns; an example can have at most 26"),
        (["task.label=[a,b]"], "task.label can be a list only with task.kind multilabel"),
        (["task.text=[context,question,more]", "task.label=null"], "task.text must name one or two different columns, not"),
        (["task.text=[context,context]", "task.label=null"], "task.text must name one or two different columns, not"),
        (["task.label_is=number"], "task.label_is: 'number' is invalid"),
        (["task.label=null", "task.label_is=letter"], "task.label_is needs labels, but task.label is null"),
        (["task.gap=_", "task.text=[context]"], "task.gap is a place in the question, but task.text names a context alone"),
        (["task.split={group: options}"], "task.split.group: options is a column of options"),
        (["task.kind=classification"], "task.options is allowed only with task.kind multiple_choice"),
        (["task.kind=classification", "task.options=null", "task.label_is=index"], "task.label_is is allowed only with"),
        (["task.name=race", "task.text=null", "task.label=null", "task.kind=null"], "task.options: is allowed only with task.name custom; race defines its own"),
        (["task.name=race", "task.text=null", "task.label=null", "task.kind=null", "task.options=null", "task.positive=A"], "task.positive cannot be used with task.name race"),
        (["task.name=race", "task.text=null", "task.label=null", "task.kind=null", "task.options=null", "task.metric=mcc"], "task.metric: mcc cannot be used with race; use accuracy"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_its_key(overrides, message):
    with pytest.raises(UserError) as refused:
        task(*overrides)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_family_without_multiple_choice_is_refused():
    config = DebertaConfig(**{name: value for name, value in shape_of("bert").to_dict().items() if name in ("vocab_size", "hidden_size", "num_hidden_layers")})  # fmt: skip
    with pytest.raises(
        UserError, match=r"teacher\.model: m is a deberta, which has no multiple choice in transformers"
    ):
        require_compatible(config, tokenizer_of("bert"), 24, "m", "teacher.model", multiple_choice=True)


def test_a_given_teacher_must_score_options_and_only_for_such_a_task(tmp_path):
    classifier = make_folder(tmp_path / "classifier", "bert", classifier=True)
    with pytest.raises(
        UserError,
        match=r"a BertForSequenceClassification, which does not score options; give a \.\.\.ForMultipleChoice",
    ):
        require_classifier(classifier, "m", "teacher.model", multiple_choice=True)
    body = make_folder(tmp_path / "body", "bert")
    with pytest.raises(UserError, match="does not score options"):
        require_classifier(body, "m", "teacher.model", multiple_choice=True)
    chooser = choosing(tmp_path / "chooser", "bert")
    require_classifier(chooser, "m", "teacher.model", multiple_choice=True)
    with pytest.raises(UserError, match="is a model for multiple choice"):
        require_classifier(chooser, "m", "teacher.model")
