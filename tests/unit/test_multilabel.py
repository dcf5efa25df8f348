"""Texts with several classes: what is read, the loss, the metrics and the thresholds, against independent formulas."""

import itertools
import json

import numpy as np
import pytest
import torch
from families import FAMILIES, make_folder
from scipy.special import expit
from sklearn import metrics as sk

from pkd_dist.config.load import load
from pkd_dist.data import answers, submission, tasks, text
from pkd_dist.data.examples import is_labelled, unlabelled_like
from pkd_dist.distillation.losses import hard_loss, multilabel_soft_loss
from pkd_dist.errors import UserError
from pkd_dist.evaluation.answer import answer
from pkd_dist.evaluation.intervals import resampled_scores
from pkd_dist.evaluation.metrics import agreement, divergence, score
from pkd_dist.evaluation.thresholds import choose, class_scores, cutoffs, shifted
from pkd_dist.metric_names import MULTILABEL_METRICS
from pkd_dist.model.encoder import load_model
from pkd_dist.model.ensemble import mean_logits
from pkd_dist.model.head import shift_logits

pytestmark = pytest.mark.usefixtures("one_thread")
RNG = np.random.default_rng(0)
N, C = 60, 6


def task(*overrides, label="topics"):
    given = [
        f"task.label={json.dumps(label)}",
        "task.name=custom",
        "task.text=[text]",
        "task.kind=multilabel",
        *overrides,
    ]
    return tasks.resolve(load(None, ["run.dir=unused", "task.data=unused", *given]).task)


def skewed():
    """Return logits and labels; some rows have no class, and the classes are not equally frequent."""
    labels = (RNG.random((N, C)) < np.linspace(0.05, 0.6, C)).astype(np.float32)
    labels[:5] = 0
    logits = (2 * labels - 1.5 + RNG.normal(0, 1.2, labels.shape)).astype(np.float32)
    return logits, labels


# ---------------------------------------------------------------------------------------------------------------- data

ROWS = [("one", ["a", "b"]), ("two", []), ("three", ["c"]), ("four", ["b", "c", "a"])]
EXPECTED = [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 1, 1]]


def written(folder, form):
    """Write train and dev in one of the forms of a label, and return what `task.label` is."""
    for split in ("train", "dev"):
        if form == "lists":
            lines = [json.dumps({"text": t, "topics": c}) for t, c in ROWS]
            (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        elif form == "delimited":
            lines = ["text,topics", *(f"{t},{' | '.join(c)}" for t, c in ROWS)]
            (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
        elif form == "JSON in a table":
            lines = ["text\ttopics", *(f"{t}\t{json.dumps(c)}" for t, c in ROWS)]
            (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
        elif form == "Parquet":
            from datasets import Dataset

            Dataset.from_list([{"text": t, "topics": c} for t, c in ROWS]).to_parquet(folder / f"{split}.parquet")
        else:
            flags = [",".join([t, *("01"[name in c] for name in "abc")]) for t, c in ROWS]
            (folder / f"{split}.csv").write_text("\n".join(["text,a,b,c", *flags]) + "\n")
    return ["a", "b", "c"] if form == "columns" else "topics"


@pytest.mark.parametrize("form", ["lists", "delimited", "JSON in a table", "Parquet", "columns"])
def test_every_form_of_a_label_gives_the_same(tmp_path, form):
    label = written(tmp_path, form)
    splits = text.read_all(str(tmp_path), task(label=label))
    for split in splits.values():
        assert split.classes == ("a", "b", "c") and split.labels_N.dtype == np.float32
        assert split.labels_N.tolist() == EXPECTED and is_labelled(split.labels_N).all()
    renamed = task('task.class_names={"c": "C", "a": "A", "b": "B"}', label=label)
    train = text.read(str(tmp_path), "train", renamed)
    assert train.classes == ("c", "a", "b") and renamed.names_of(train.classes) == ["C", "A", "B"]
    assert train.labels_N.tolist() == [[row[2], *row[:2]] for row in EXPECTED]


def test_numbers_are_sorted_as_numbers_and_1_0_is_1(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "x", "topics": [10, 2.0]}\n{"text": "y", "topics": "2;1.0"}\n')
    train = text.read(str(tmp_path), "train", task("task.label_separator=;"))
    assert train.classes == ("1", "2", "10") and train.labels_N.tolist() == [[0, 1, 1], [1, 1, 0]]


def test_a_test_split_without_labels_and_unlabeled_text(tmp_path):
    for label in ("topics", ["a", "b", "c"]):
        form = "columns" if isinstance(label, list) else "delimited"
        written(tmp_path, form)
        (tmp_path / "test.csv").write_text("text\nfive\n")
        (tmp_path / "more.txt").write_text("six\nseven\n")
        splits = text.read_all(str(tmp_path), task(label=label))
        assert splits["test"].labels_N.shape == (1, 3) and not is_labelled(splits["test"].labels_N).any()
        more = text.read_unlabeled([str(tmp_path / "more.txt")], task(label=label), splits["train"].classes)
        assert more.labels_N.shape == (2, 3) and not is_labelled(more.labels_N).any()
    assert not is_labelled(torch.from_numpy(np.array(unlabelled_like(splits["train"].labels_N, 4)))).any()


@pytest.mark.parametrize(
    ("label", "train", "message"),
    [
        ("topics", "text,topics\nx,a|b\ny,\"['a']\"\n", "train.csv:3: topics \"['a']\" is not a JSON list"),
        (
            "topics",
            "text,topics\nx,a\ny,a\n",
            "train.csv: topics has one class, 'a'; a multilabel task needs at least two",
        ),
        ("topics", "text,topics\nx,\ny,\n", "train.csv: topics has no class; a multilabel task needs at least two"),
        ("topics", "text,topics\nx,a|b\ny,b|a\n", "train.csv: every example has the same classes, or none"),
        (["a", "b"], "text,a,b\nx,1,0\ny,2,0\n", "train.csv:3: a '2' is not 0 or 1; a column of a class needs 0 or 1"),
        (
            ["a", "b"],
            "text,a,b\nx,1,0\ny,,0\n",
            "train.csv:3: a is empty, null or NaN; a column of a class needs 0 or 1",
        ),
        (["a", "b"], "text,a\nx,1\n", "has no column 'b'"),
    ],
)
def test_bad_rows_are_named_with_file_and_line(tmp_path, label, train, message):
    (tmp_path / "train.csv").write_text(train)
    with pytest.raises(UserError) as refused:
        text.read(str(tmp_path), "train", task(label=label))
    assert message in str(refused.value)


def test_a_class_that_train_does_not_have_is_named(tmp_path):
    written(tmp_path, "delimited")
    (tmp_path / "dev.csv").write_text("text,topics\nx,a\ny,a|d\n")
    with pytest.raises(UserError, match=r"dev.csv:3: topics 'd' is not one of the labels seen in training: a, b, c"):
        text.read_all(str(tmp_path), task())
    for value, message in (
        ('["a", null]', "null or NaN"),
        ('["a", {}]', "not an object"),
        ("[true, []]", "not a list"),
    ):
        (tmp_path / "dev.jsonl").write_text(f'{{"text": "x", "topics": {value}}}\n')
        (tmp_path / "dev.csv").unlink(missing_ok=True)
        with pytest.raises(UserError, match=rf"dev.jsonl:1: a value of topics .*{message}"):
            text.read_all(str(tmp_path), task())


def test_a_class_that_cannot_be_written_is_refused(tmp_path):
    """Before the training, and not when the report is written."""
    for labels in ('["a", "b\\ud800"]', '"a|b\\ud800"'):
        (tmp_path / "train.jsonl").write_text(
            f'{{"text": "x", "topics": {labels}}}\n{{"text": "y", "topics": ["a"]}}\n'
        )
        with pytest.raises(UserError, match=r"train.jsonl:1: topics contains an unpaired surrogate"):
            text.read(str(tmp_path), "train", task())


def test_classes_that_a_split_lacks_are_noted_and_dev_needs_some(tmp_path):
    for form in ("delimited", "columns"):
        label = written(tmp_path, form)
        none = ["x,b|c"] if form == "delimited" else ["x,0,1,1"]
        head = (tmp_path / "dev.csv").read_text().splitlines()[0]
        (tmp_path / "dev.csv").write_text("\n".join([head, *none]) + "\n")
        splits = text.read_all(str(tmp_path), task(label=label))
        assert splits["train"].notes == () and splits["dev"].notes == ("has no example of a",)
        empty = ["x,", "y,"] if form == "delimited" else ["x,0,0,0"]
        (tmp_path / "dev.csv").write_text("\n".join([head, *empty]) + "\n")
        with pytest.raises(UserError, match=r"dev.csv: no example has a class; dev selects the best epoch"):
            text.read_all(str(tmp_path), task(label=label))


def test_the_classes_of_a_teacher_are_named(tmp_path):
    written(tmp_path, "delimited")
    with pytest.raises(
        UserError, match=r"topics 'a' is not one of the labels of the teacher: x, y; task.class_names maps"
    ):
        text.read(str(tmp_path), "train", task(), ("x", "y"))


def test_a_submission_can_be_read_back(tmp_path):
    logits = np.array([[1, 1, -1], [-1, -1, -1], [-1, 1, 1]])
    for classes, expected in (
        (("a", "b", "c d"), ["a|b", "", "b|c d"]),
        (("a", "b|c", "d"), ['"[""a"", ""b|c""]"', "[]", '"[""b|c"", ""d""]"']),
    ):
        lines = submission.write(tmp_path, "test", task(), logits, classes).read_text().splitlines()
        assert lines == ["index\tprediction", *(f"{i}\t{each}" for i, each in enumerate(expected))]
        rows = [f"text {i}\t{each}" for i, each in enumerate(expected)]
        (tmp_path / "train.tsv").write_text("\n".join(["text\ttopics", *rows]) + "\n")
        assert text.read(str(tmp_path), "train", task(), classes).labels_N.tolist() == (logits > 0).tolist()


def test_a_separator_that_looks_wrong_is_noted(tmp_path):
    (tmp_path / "train.csv").write_text('text,topics\nx,"a,b"\ny,c\n')
    train = text.read(str(tmp_path), "train", task())
    assert "no text has more than one class; is task.label_separator '|' right?" in train.notes
    assert not text.read(str(tmp_path), "train", task("task.label_separator=','")).notes


def test_parts_of_one_file_and_duplicates(tmp_path):
    lines = ["text,topics", *(f"text {i},{['a', 'a|b', '', 'b'][i % 4]}" for i in range(40)), "text 0,a", "text 1,b"]
    (tmp_path / "all.csv").write_text("\n".join(lines) + "\n")
    splits = text.read_all(str(tmp_path / "all.csv"), task())
    assert sum(map(len, splits.values())) == 42 and splits["dev"].labels_N.shape[1] == 2
    repeated = [note for split in splits.values() for note in split.notes if "repeated texts" in note]
    assert len(repeated) == 1 and "'text 1'" in repeated[0]


# ------------------------------------------------------------------------------------------------- a teacher's answers


def answered(folder, kind, head, rows):
    """Return the answers of a table to the examples of train, as logits."""
    train = text.read(str(folder), "train", task())
    lines = [["text", *head], *([name, *row] for (name, _), row in zip(ROWS, rows, strict=True))]
    (folder / "answers.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    found, notes = answers.read([str(folder / "answers.csv")], kind, task(), {"train": train}, ["a", "b", "c"])
    assert not notes and found["train"].dtype == np.float32
    return found["train"].astype(np.float64)


def test_probabilities_and_logits_of_several_classes_need_no_sum(tmp_path):
    written(tmp_path, "lists")
    shares = [[0.9, 0.8, 0.7], [0, 0.1, 0], [1, 0.5, 1e-9], [0.2, 0.3, 0.4]]
    found = answered(tmp_path, "probabilities", "abc", shares)
    np.testing.assert_allclose(expit(found), np.clip(shares, 1e-6, 1 - 1e-6), rtol=1e-5)
    logits = np.random.default_rng(1).normal(0, 5, (4, 3)).astype(np.float32)
    assert (answered(tmp_path, "logits", "cab", logits[:, [2, 0, 1]].tolist()) == logits).all()
    with pytest.raises(
        UserError, match=r"answers.csv:2: 2, 0, 0 are not probabilities.*set teacher.answers_are to logits$"
    ):
        answered(tmp_path, "probabilities", "abc", [[2, 0, 0], *shares[1:]])


@pytest.mark.parametrize("form", ["lists", "delimited", "JSON in a table", "Parquet", "columns"])
def test_labels_as_answers_have_every_form_of_the_data(tmp_path, form):
    own = task(label=written(tmp_path, form))
    train = text.read(str(tmp_path), "train", own)
    [path] = tmp_path.glob("train.*")
    found, notes = answers.read([str(path)], "labels", own, {"train": train}, ["a", "b", "c"])
    np.testing.assert_allclose(expit(found["train"]), np.where(EXPECTED, 0.999, 0.001), rtol=1e-4)
    assert notes == ["the class of an answer counts as a probability of 0.999, any other as 0.001"]


# ---------------------------------------------------------------------------------------------------------------- loss


def test_the_loss_on_labels_is_the_mean_binary_cross_entropy():
    logits, labels = skewed()
    logits = logits.astype(np.float64)
    p = expit(logits)
    expected = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean(axis=1)
    labels[3] = np.nan
    x = torch.tensor(logits, requires_grad=True)
    found = hard_loss(x, torch.from_numpy(labels))
    expected[3] = 0
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-10)
    found.sum().backward()
    assert not x.grad[3].any() and torch.isfinite(x.grad).all() and x.grad[4].any()


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_the_soft_loss_is_the_mean_of_binary_divergences(temperature):
    student, teacher = RNG.normal(size=(2, N, C)) * 3
    q, p = expit(student / temperature), expit(teacher / temperature)
    kl = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean(axis=1)
    cross = -(p * np.log(q) + (1 - p) * np.log(1 - q)).mean(axis=1)
    expected = {
        "batchmean": kl * temperature**2,
        "mean": kl * temperature**2 / 2,
        "soft_ce": cross,
        "soft_ce_mean": cross / 2,
    }
    for reduction, values in expected.items():
        found = multilabel_soft_loss(torch.from_numpy(student), torch.from_numpy(teacher), temperature, reduction)
        np.testing.assert_allclose(found, values, rtol=1e-9, err_msg=reduction)
    np.testing.assert_allclose(divergence(teacher, student, multilabel=True), _kl(teacher, student), rtol=1e-9)


def _kl(teacher, student):
    p, q = expit(teacher), expit(student)
    return (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "soft_ce", "soft_ce_mean"])
def test_gradients(reduction):
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher, labels = (
        torch.randn(3, 4, dtype=torch.float64),
        torch.tensor(RNG.integers(0, 2, (3, 4)), dtype=torch.float64),
    )
    assert torch.autograd.gradcheck(lambda x: multilabel_soft_loss(x, teacher, 3.0, reduction), student)
    assert torch.autograd.gradcheck(lambda x: hard_loss(x, labels), student)


# ------------------------------------------------------------------------------------------------------------- metrics


def of_scikit_learn(logits, labels):
    true, given = labels.astype(int), (expit(logits.astype(np.float64)) > 0.5).astype(int)
    return {
        "f1_micro": sk.f1_score(true, given, average="micro", zero_division=0),
        "f1_macro": sk.f1_score(true, given, average="macro", zero_division=0),
        "f1_samples": sk.f1_score(true, given, average="samples", zero_division=1.0),
        "mAP": np.mean([sk.average_precision_score(true[:, i], logits[:, i]) for i in range(true.shape[1])]),
        "subset_accuracy": sk.accuracy_score(true, given),
    }


@pytest.mark.parametrize("metric", ["f1_micro", "f1_macro", "f1_samples", "map", "subset_accuracy"])
def test_metrics_equal_scikit_learn(metric):
    logits, labels = skewed()
    asked = task(f"task.metric={metric}")
    found, expected = score(logits, labels, asked), of_scikit_learn(logits, labels)
    assert {key: found[key] for key in MULTILABEL_METRICS} == pytest.approx(expected, abs=1e-12)
    assert found["main_metric"] == found["mAP" if metric == "map" else metric]


@pytest.mark.parametrize("metric", ["f1_micro", "f1_macro", "f1_samples", "map", "subset_accuracy"])
def test_a_resample_has_the_score_of_the_drawn_examples(metric):
    """Weights of a resample equal the examples, repeated."""
    from pkd_dist.evaluation.intervals import weighted_scores

    logits, labels = skewed()
    logits[:, 0] = np.round(logits[:, 0])  # equal logits are one threshold
    asked = task(f"task.metric={metric}")
    weights = np.random.default_rng(2).multinomial(N, np.full(N, 1 / N), size=3)
    found = weighted_scores(weights, labels.astype(bool), logits, asked, C)
    for weight, value in zip(weights, found, strict=True):
        drawn = np.repeat(np.arange(N), weight)
        assert value == pytest.approx(score(logits[drawn], labels[drawn], asked)["main_metric"], abs=1e-12)
    both = resampled_scores(labels, {"a": logits, "b": logits}, asked)
    assert len(both["a"]) == 2000 and (both["a"] == both["b"]).all()


def test_agreement_is_that_of_whole_sets():
    a = np.float32([[1, -1], [1, 1], [-1, -1]])
    assert agreement(a, np.float32([[2, -3], [1, -1], [-5, -1]]), multilabel=True) == pytest.approx(2 / 3)


def test_scores_of_each_class_equal_scikit_learn():
    logits, labels = skewed()
    rows = class_scores({"teacher": logits, "student": -logits}, labels, list("abcdef"))
    for i, row in enumerate(rows):
        for side, of_side in (("teacher", logits), ("student", -logits)):
            expected = sk.precision_recall_fscore_support(
                labels[:, i].astype(int), of_side[:, i] > 0, average="binary", zero_division=0
            )
            assert [row[key][side] for key in ("precision", "recall", "f1")] == pytest.approx(expected[:3])
        assert row["support"] == labels[:, i].sum()


# ---------------------------------------------------------------------------------------------------------- thresholds


def best_f1(logit, true):
    """The best F1 over all sets that a threshold can give."""
    cuts = [-np.inf, *np.unique(logit)]
    return max(sk.f1_score(true, logit > cut, zero_division=0) for cut in cuts)


@pytest.mark.parametrize("ties", [False, True])
def test_thresholds_have_the_best_f1_of_all(ties):
    logits, labels = skewed()
    logits = np.round(logits) + 0.25 if ties else logits
    found = choose(logits, labels)
    above = shifted(logits, found) > 0
    for i in range(C):
        own = sk.f1_score(labels[:, i], above[:, i])
        assert own == pytest.approx(best_f1(logits[:, i], labels[:, i]), abs=1e-12)
        if sk.f1_score(labels[:, i], logits[:, i] > 0) == own:
            assert found[i] == 0.5
    assert (found != 0.5).any()
    np.testing.assert_allclose(expit(cutoffs(found)), found)


@pytest.mark.parametrize(
    ("logit", "true", "expected"),
    [
        ([-2.0, 1.0, 3.0], [0, 0, 0], 0.5),  # nothing to find
        ([-2.0, 1.0, 3.0], [0, 1, 1], 0.5),  # 0.5 is as good as any
        ([-4.0, -3.0, -1.0], [0, 1, 1], expit(-3.5)),  # half-way
        ([2.0, 3.0, 5.0], [0, 0, 1], expit(4.0)),
        ([-4.0, -3.0], [1, 1], expit(-4.1)),  # every example has it
        ([-6.0, -2.0, -1.0, -0.5], [1, 0, 0, 1], expit(-0.75)),  # two are equally good: the one nearest to 0.5
    ],
)
def test_thresholds_by_hand(logit, true, expected):
    found = choose(np.float32(logit)[:, None], np.float32(true)[:, None])
    assert found.tolist() == pytest.approx([expected], rel=1e-6)


def test_an_answer_has_the_classes_above_one_half():
    names = dict(enumerate("abc"))
    found = answer(np.float32([0.1, -3, 2]), names, multilabel=True)
    assert found["labels"] == ["a", "c"] and list(found["scores"]) == ["a", "b", "c"]
    assert list(found["scores"].values()) == pytest.approx(expit([0.1, -3, 2]), rel=1e-6)
    assert answer(np.float32([-1, -1, -1]), names, True, multilabel=True)["labels"] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_of_every_family_contains_the_thresholds(family, tmp_path):
    folder = make_folder(tmp_path, family, classifier=True, names=tuple("abcdef"))
    model = load_model(folder).eval()
    shift = np.linspace(-3, 3, 6)
    inputs = {"input_ids": torch.tensor([[2, 9, 12, 7, 3], [2, 8, 8, 15, 3]])}
    with torch.inference_mode():
        before = model(**inputs).logits.double()
        shift_logits(model, shift)
        np.testing.assert_allclose(model(**inputs).logits.double(), before - shift, rtol=1e-5, atol=1e-5)


def test_several_teachers_are_the_mean_of_their_probabilities():
    logits = [torch.from_numpy(RNG.normal(size=(5, 3)) * 4) for _ in range(3)]
    expected = np.mean([expit(each.numpy()) for each in logits], axis=0)
    np.testing.assert_allclose(mean_logits(logits, multilabel=True).sigmoid(), expected, rtol=1e-10)
    assert torch.isfinite(mean_logits([torch.tensor([[900.0, -900.0]])] * 2, multilabel=True)).all()


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.positive=a"], "task.positive cannot be used with task.kind multilabel"),
        (["task.class_weights=balanced"], "task.class_weights cannot be used with task.kind multilabel"),
        (["task.split={stratify: true}"], "task.split.stratify cannot be used with task.kind multilabel"),
        (
            ["task.augment={min_confidence: 0.9}"],
            "task.augment.min_confidence cannot be used with task.kind multilabel",
        ),
        (["evaluate.calibrate=true"], "evaluate.calibrate cannot be used with task.kind multilabel"),
        (
            ["teacher={answers: [a.csv], answers_are: log_probabilities}"],
            "teacher.answers_are log_probabilities cannot be used with task.kind multilabel",
        ),
        (["task.label=null"], "task.kind multilabel needs labels, but task.label is null"),
        (["task.metric=accuracy"], "task.metric accuracy cannot be used with task.kind multilabel; allowed: f1_micro"),
        (["task.label=[a]"], "task.label must name two or more different columns"),
        (["task.label=[a, text]"], "task.label: text is also a text column"),
        (["task.label=[a, b]", "task.label_separator=;"], "task.label_separator cannot be used with one label column"),
        (
            ["task.label=[a, b]", "task.class_names={a: A, c: C}"],
            "task.class_names must name the columns of task.label",
        ),
        (["task.kind=classification", "task.label=[a, b]"], "task.label can be a list only with task.kind multilabel"),
        (["task.kind=classification", "task.label_separator=;"], "task.label_separator is allowed only with"),
        (
            ["task.kind=classification", "task.metric=map"],
            "task.metric map cannot be used with task.kind classification",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_its_key(overrides, message):
    with pytest.raises(UserError) as refused:
        task(*overrides)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_every_pair_of_forms_is_one_label(tmp_path):
    """Delimited text and lists can be in one column."""
    for separator, values in itertools.product(("|", ", "), (("a", "b"), ("b", "a"))):
        (tmp_path / "train.jsonl").write_text(
            json.dumps({"text": "x", "topics": separator.join(values)}) + '\n{"text": "y", "topics": ["b"]}\n'
        )
        train = text.read(str(tmp_path), "train", task(f"task.label_separator={separator!r}"))
        assert train.labels_N.tolist() == [[1, 1], [0, 1]]
