"""Every GLUE task as GLUE ships it and as the hub has it, and submissions to GLUE's server."""

import dataclasses
import json

import numpy as np
import pytest
import sklearn.metrics as sk
from glue_folders import BOM, CRLF, FOLDERS, lines, mnli, put

from pkd_dist.data import sources, submission, text
from pkd_dist.data.examples import is_labelled
from pkd_dist.data.tasks import GLUE, Task
from pkd_dist.errors import UserError
from pkd_dist.evaluation.metrics import score

FIRST = {
    "cola": (['"Half a quote'], 1), "sst2": (['a "lone quote'], 1), "mrpc": (['"He said', 'He said"'], 1),
    "qqp": (['What is a "tab?', "What?"], 0), "stsb": (['A "plane.', "A bird."], 0.0), "mnli": (["a", "b"], 1),
    "qnli": (['Who "?', "He."], 0), "rte": (['"No', "Yes"], 1), "wnli": (['The "sack', "It"], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", GLUE)
def test_the_folder_as_glue_ships_it(tmp_path, name):
    task, data = GLUE[name], put(tmp_path, **FOLDERS[name])
    assert sources.available(data, task) == list(task.splits)
    train, *others = (text.read(data, split, task) for split in task.splits)
    texts, label = FIRST[name]
    assert [column[0] for column in train.texts] == texts and train.labels_N[0] == label
    assert [len(split) for split in (train, *others)] == [3] + [2] * len(others)
    for split, part in zip(task.splits[1:], others, strict=True):
        assert is_labelled(part.labels_N).tolist() == [not split.startswith("test")] * 2
        assert part.labels_N.dtype == (np.float32 if task.regression else np.int64)
        assert part.classes == (task.classes or ())
    notes = {split: part.notes for split, part in zip(task.splits, (train, *others), strict=True) if part.notes}
    assert notes == {
        "qqp": {"train": ("skipped 3 lines without text: 3, 4, 5",)},
        "mnli": {
            "train": ("skipped 1 line without a label (gold_label is '-'): 4",),
            "dev_mismatched": ("skipped 1 line without a label (gold_label is '-'): 2",),
        },
    }.get(name, {})


@pytest.mark.parametrize("name", GLUE)
@pytest.mark.parametrize("extension", ["tsv", "csv", "jsonl"])
def test_the_plain_layout_with_named_columns(tmp_path, name, extension):
    task = GLUE[name]
    labels = ["1.5", "3.0"] if task.regression else task.names_of(task.classes)
    columns = [*task.text, task.label]
    rows = [[f"{name} text {i}", f"other {i}"][: len(task.text)] + [labels[i % 2]] for i in range(4)]
    if extension == "jsonl":
        content = "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    else:
        content = "".join({"csv": ",", "tsv": "\t"}[extension].join(row) + "\n" for row in (columns, *rows))
    for split in task.splits:
        data = put(tmp_path, **{f"{split}__{extension}": content})
        part = text.read(data, split, task)
        assert part.texts[0][3] == f"{name} text 3"
        assert part.labels_N.tolist() == ([1.5, 3.0] * 2 if task.regression else [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("cola", "train__tsv", lines("gj04|1||Fine.", "gj04|0|Him ran."), r"train\.tsv:2: has 3 field\(s\) where the header names 4"),
        ("cola", "train__tsv", lines("gj04|1|Fine."), r"train\.tsv:1: has no column 'sentence'; the header names 'gj04'"),
        ("cola", "train__tsv", lines("gj04|2||Fine."), r"train\.tsv:1: label '2' is not one of the labels: 0, 1"),
        ("mrpc", "train__tsv", lines("Quality|#1 ID|#2 ID|#1 String|#2 String", "1|1|2|a"), r"train\.tsv:2: has 4 field"),
        ("qqp", "train__tsv", lines("id|question1|question2|is_duplicate", "1|a|b|0|0"), r"train\.tsv:2: has 5 field"),
        ("qqp", "train__tsv", lines("id|question1|question2|is_duplicate", "1|a|b"), r"train\.tsv: has no examples"),
        ("stsb", "dev__tsv", lines("sentence1|sentence2|score", "a|b|5.1"), r"dev\.tsv:2: score 5.1 is not between 0 and 5"),
        ("mnli", "dev_matched__tsv", mnli(("a", "b", "maybe")), r"dev_matched\.tsv:2: gold_label 'maybe' is not one of"),
        ("rte", "dev__tsv", lines("index|sentence1|sentence2", "0|a|b"), r"dev\.tsv:1: has no column 'label'"),
        ("qnli", "test__tsv", lines("index|question", "0|a"), r"test\.tsv:1: has no column 'sentence'"),
        ("wnli", "test__tsv", lines("sentence1|sentence2|label", "a|b|1", "c|d|"), r"test\.tsv:3: label is empty"),
        ("wnli", "test__tsv", lines("sentence1|sentence2|label", "a|b|1", "c|d|-1"), r"test\.tsv:3: label '-1' is not one"),
        ("wnli", "train__tsv", lines("sentence1|sentence2|label", "a|b|-1"), r"train\.tsv:2: label '-1' is not one of"),
    ],
)  # fmt: skip
def test_errors_name_file_and_line(tmp_path, name, file, content, message):
    data = put(tmp_path, **{file: content})
    split = {"dev_matched": "dev"}.get(file.removesuffix("__tsv"), file.removesuffix("__tsv"))
    with pytest.raises(UserError, match=message):
        text.read(data, split, GLUE[name])


def test_broken_lines_of_a_test_file_are_skipped_with_a_warning(tmp_path):
    data = put(tmp_path, test__tsv=lines("id|question1|question2", "0|a|b", "1|c", "d|e", "2|f|g"))
    part = text.read(data, "test", GLUE["qqp"])
    assert part.texts == (["a", "f"], ["b", "g"])
    assert part.notes[0].endswith("skipped 2 lines without text: 3, 4") and "reject a submission" in part.notes[1]


# -------------------------------------------------------------------------------------- MRPC as its authors released it

HEAD = BOM + "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String" + CRLF
RELEASE = {
    "msr_paraphrase_train__txt": HEAD + lines('1|11|12|"a|b', "0|21|22|c|d", "1|31|32|e|f", "0|41|42|g|h", end=CRLF),
    "msr_paraphrase_test__txt": HEAD + lines("1|51|52|i|j", "0|61|62|k|l", "0|71|72|m|n", end=CRLF, last=False),
}
DEV_IDS = lines("#1 ID|#2 ID", "21|22", "31|32", end=CRLF)


def test_the_original_release_with_the_list_of_dev_pairs(tmp_path):
    data, task = put(tmp_path, **RELEASE, dev_ids__tsv=DEV_IDS), GLUE["mrpc"]
    assert sources.available(data, task) == ["train", "dev", "test"]
    train, dev, test = (text.read(data, split, task) for split in task.splits)
    assert (train.texts[0], dev.texts[0], test.texts[0]) == (['"a', "g"], ["c", "e"], ["i", "k", "m"])
    assert test.labels_N.tolist() == [1, 0, 0]
    assert not train.notes and not dev.notes
    before = sources.digests(data, ["train", "dev"], task)
    assert set(before) == {"msr_paraphrase_train.txt", "dev_ids.tsv"}
    put(tmp_path, dev_ids__tsv=lines("21|22", "99|98"))
    assert sources.digests(data, ["train", "dev"], task) != before
    assert text.read(data, "dev", task).notes == ("1 pair(s) of dev_ids.tsv are not in " + dev.source,)
    put(tmp_path, dev_ids__tsv=lines("21|22", "31"))
    with pytest.raises(UserError, match=r"dev_ids\.tsv:2: has 1 field\(s\); expected the two ids"):
        text.read(data, "dev", task)


def test_the_original_release_alone_has_no_test_split(tmp_path):
    data, task = put(tmp_path, **RELEASE), GLUE["mrpc"]
    assert sources.available(data, task) == ["train", "dev"]
    assert len(text.read(data, "train", task)) == 4
    dev = text.read(data, "dev", task)
    assert dev.labels_N.tolist() == [1, 0, 0]
    assert "no dev_ids.tsv: the labeled test file of the release is used as dev" in dev.notes[0]
    with pytest.raises(UserError, match=r"has no split 'test'; expected one of test\.tsv, .*msr_paraphrase_train\.txt"):
        text.read(data, "test", task)


def test_files_made_from_the_release_take_precedence(tmp_path):
    data = put(tmp_path, **RELEASE, dev_ids__tsv=DEV_IDS, **FOLDERS["mrpc"])
    assert len(text.read(data, "train", GLUE["mrpc"])) == 3
    (tmp_path / "dev.tsv").unlink()
    assert sources.locate(data, "dev", GLUE["mrpc"]) is None, "half of each would mix training into dev"


def test_two_files_of_one_split(tmp_path):
    data = put(tmp_path, dev__tsv="x", dev_matched__tsv="x")
    with pytest.raises(UserError, match=r"dev\.tsv and dev_matched\.tsv both contain the split dev; keep one"):
        sources.locate(data, "dev", GLUE["mnli"])


# --------------------------------------------------------------------------------------------------------- the hub

HUB = {
    "cola": (["sentence"], ["unacceptable", "acceptable"]),
    "sst2": (["sentence"], ["negative", "positive"]),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
    "stsb": (["sentence1", "sentence2"], None),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"]),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"]),
    "wnli": (["sentence1", "sentence2"], ["not_entailment", "entailment"]),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A local folder in the layout of `nyu-mll/glue`: one configuration per task."""
    from datasets import ClassLabel, Dataset, Features, Value

    folder = tmp_path_factory.mktemp("glue")
    front = ["---", "configs:"]
    for name, (columns, names) in HUB.items():
        label = ClassLabel(names=names) if names else Value("float32")
        features = Features({c: Value("string") for c in columns} | {"label": label, "idx": Value("int32")})
        halves = ["_matched", "_mismatched"] if name == "mnli" else [""]
        front += [f"- config_name: {name}", "  data_files:"]
        for split in ("train", *(s + half for s in ("validation", "test") for half in halves)):
            labels = [-1, -1, -1] if split.startswith("test") else [1, 0, 1] if names else [1.5, 0.0, 5.0]
            rows = {c: [f"{split} {c} {i}" for i in range(3)] for c in columns} | {"label": labels, "idx": [0, 1, 2]}
            (folder / name).mkdir(exist_ok=True)
            Dataset.from_dict(rows, features).to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
            front += [f"  - split: {split}", f"    path: {name}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*front, "---", ""]))
    return folder


@pytest.mark.parametrize("name", GLUE)
def test_the_hub_layout(hub, tmp_path, monkeypatch, name):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    task, data = GLUE[name], f"hub:{hub}:{name}"
    splits = [split for split in task.splits if split != "test_diagnostic"]  # a data set of its own there
    assert sources.available(data, task) == splits
    for split in splits:
        part = text.read(data, split, task)
        there = {"dev": "validation", "dev_mismatched": "validation_mismatched"}.get(split, split)
        there += "_matched" if name == "mnli" and split in ("dev", "test") else ""
        assert part.source == f"hub:{hub}:{name}/{there}"
        assert part.texts[0] == [f"{there} {HUB[name][0][0]} {i}" for i in range(3)]
        if split.startswith("test"):
            assert not is_labelled(part.labels_N).any()
        else:
            assert part.labels_N.tolist() == ([1.5, 0.0, 5.0] if task.regression else [1, 0, 1])


def test_hub_examples_without_a_label_are_skipped_and_new_content_changes_the_digest(tmp_path, monkeypatch):
    import datasets
    from datasets import ClassLabel, Dataset, Features, Value

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = Features({"body": Value("string"), "verdict": ClassLabel(names=["no", "yes"])})
    task, data, seen = Task("custom", ("body",), "verdict"), f"hub:{tmp_path / 'data'}", []
    (tmp_path / "data").mkdir()
    for labels in ([0, 1, -1, 1], [0, 1, 1, -1]):
        rows = {"body": ["a", "b", "c", "d"], "verdict": labels}
        Dataset.from_dict(rows, features).to_parquet(tmp_path / "data/train.parquet")
        part = text.read(data, "train", task)
        assert part.classes == ("no", "yes") and len(part) == 3 and "c" not in part.texts[0] or labels[2] == 1
        assert any("without a label (verdict is missing)" in note for note in part.notes)
        seen.append(sources.digests(data, ["train", "test"], task))
    assert list(seen[0]) == ["train"] and seen[0] != seen[1]


def test_a_hub_data_set_without_the_split_or_the_column(hub, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    task = Task("custom", ("sentence",), "stars")
    with pytest.raises(UserError, match=r":cola/train: has no column 'stars'; it has 'sentence', 'label', 'idx'"):
        text.read(f"hub:{hub}:cola", "train", task)
    with pytest.raises(UserError, match=r":mnli has no split 'validation'; it has train, validation_matched"):
        text.read(f"hub:{hub}:mnli", "dev", task)
    with pytest.raises(UserError, match=r"^task\.data: hub:.*:none cannot be loaded: "):
        text.read(f"hub:{hub}:none", "train", task)


# ------------------------------------------------------------------------------------------------------ submissions

TWO = np.array([[0.1, 2.0], [3.0, -1.0]], np.float32)
THREE = np.array([[0, 2, 1], [0, 1, 2], [2, 1, 0]], np.float32)
NUMBERS = np.array([[-0.0001], [5.7], [2.34567]], np.float32)


@pytest.mark.parametrize(
    ("name", "split", "logits", "file", "predictions"),
    [
        ("cola", "test", TWO, "CoLA.tsv", ["1", "0"]),
        ("sst2", "test", TWO, "SST-2.tsv", ["1", "0"]),
        ("mrpc", "test", TWO, "MRPC.tsv", ["1", "0"]),
        ("qqp", "test", TWO, "QQP.tsv", ["1", "0"]),
        ("stsb", "test", NUMBERS, "STS-B.tsv", ["0.000", "5.000", "2.346"]),
        ("mnli", "test", THREE, "MNLI-m.tsv", ["neutral", "contradiction", "entailment"]),
        ("mnli", "test_mismatched", THREE, "MNLI-mm.tsv", ["neutral", "contradiction", "entailment"]),
        ("mnli", "test_diagnostic", THREE, "AX.tsv", ["neutral", "contradiction", "entailment"]),
        ("qnli", "test", TWO, "QNLI.tsv", ["not_entailment", "entailment"]),
        ("rte", "test", TWO, "RTE.tsv", ["not_entailment", "entailment"]),
        ("wnli", "test", TWO, "WNLI.tsv", ["1", "0"]),
        ("rte", "dev", TWO, "dev.tsv", ["not_entailment", "entailment"]),
    ],
)
def test_a_submission_byte_for_byte(tmp_path, name, split, logits, file, predictions):
    path = submission.write(tmp_path, split, GLUE[name], logits, GLUE[name].classes or ())
    assert path == tmp_path / file and list(tmp_path.iterdir()) == [path]
    rows = "".join(f"{i}\t{value}\n" for i, value in enumerate(predictions))
    assert path.read_bytes() == f"index\tprediction\n{rows}".encode()


def test_submissions_of_own_tasks(tmp_path):
    own = Task("custom", ("a",), "y")
    assert submission.write(tmp_path, "test", own, TWO, ("no", "so là")).read_text() == (
        "index\tprediction\n0\tso là\n1\tno\n"
    )
    number = dataclasses.replace(own, regression=True)
    path = submission.write(tmp_path, "test", number, NUMBERS, ())
    assert path.name == "test.tsv" and path.read_text().splitlines()[1:] == ["0\t-1e-04", "1\t5.7", "2\t2.34567"]


def test_f1_refers_to_glues_positive_class_for_any_order_of_outputs():
    logits, labels = np.array([[2, 1], [0, 1], [0, 1], [2, 0], [3, 0.0]]), np.array([0, 1, 0, 1, 0])
    turned = dataclasses.replace(GLUE["mrpc"], positive=0)
    usual = score(logits, labels, GLUE["mrpc"])
    assert usual["f_1"] == sk.f1_score(labels, logits.argmax(1)) != sk.f1_score(labels, logits.argmax(1), pos_label=0)
    assert score(logits[:, ::-1], 1 - labels, turned) == usual


def test_a_class_order_of_a_given_teacher(tmp_path):
    data, order = put(tmp_path, **FOLDERS["rte"]), ("not_entailment", "entailment")
    assert text.read(data, "train", GLUE["rte"], order).labels_N.tolist() == [0, 1, 1]
    assert "0\tentailment\n" in submission.write(tmp_path, "test", GLUE["rte"], TWO, order).read_text()
