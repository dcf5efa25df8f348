"""Files to examples: every format, every quirk, and every mistake by file and line."""

import json

import numpy as np
import pytest

from pkd_dist.data.tasks import GLUE, Task
from pkd_dist.data.text import read
from pkd_dist.errors import UserError

SST2 = GLUE["sst2"]
CUSTOM = Task("custom", ("a", "b"), "y")


def put(folder, name, content):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def refused(folder, task=SST2, split="train", classes=None):
    with pytest.raises(UserError) as error:
        read(str(folder), split, task, classes)
    return str(error.value)


def test_tsv_as_glue_ships_it_bom_crlf_and_stray_quotes(tmp_path):
    body = '\ufeffsentence\tlabel\r\n"half a quote\t1\r\nsay "yes" twice\t0\r\nit\'s "\t1\r\n'
    split = read(put(tmp_path, "train.tsv", body), "train", SST2)
    assert split.texts == (['"half a quote', 'say "yes" twice', "it's \""],)
    assert split.labels_N.tolist() == [1, 0, 1]
    assert split.classes == ("0", "1")


def test_csv_with_quotes_and_newlines(tmp_path):
    put(tmp_path, "train.csv", 'y,a,b\nno,"x, y","two\nlines"\nyes,"say ""hi""",z\n')
    split = read(str(tmp_path), "train", CUSTOM)
    assert split.texts == (["x, y", 'say "hi"'], ["two\nlines", "z"])
    assert split.classes == ("no", "yes")


def test_jsonl_and_parquet_give_the_same_examples(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"a": "one", "b": "x", "y": 10}, {"a": "two", "b": "y", "y": 9}]
    (tmp_path / "j").mkdir()
    put(tmp_path / "j", "train.jsonl", "".join(json.dumps(r) + "\n" for r in rows) + "\n")
    (tmp_path / "p").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p" / "train.parquet")
    left, right = (read(str(tmp_path / d), "train", CUSTOM) for d in "jp")
    assert left.texts == right.texts
    assert left.classes == right.classes == ("9", "10"), "numbers in numeric order"
    assert np.array_equal(left.ids_N, right.ids_N)


def test_a_parquet_class_label_column_gives_its_names(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"a": Value("string"), "b": Value("string"), "y": ClassLabel(names=["sad", "glad"])})
    Dataset.from_dict({"a": ["p", "q"], "b": ["r", "s"], "y": [1, 0]}, features).to_parquet(tmp_path / "train.parquet")
    split = read(str(tmp_path), "train", CUSTOM)
    assert split.classes == ("glad", "sad")
    assert split.labels_N.tolist() == [0, 1]


def test_ids_are_stable_under_reordering_and_unique_for_repeats(tmp_path):
    lines = ["one\t0", "two\t1", "one\t1"]
    for name, order in (("x", lines), ("y", lines[::-1])):
        (tmp_path / name).mkdir()
        put(tmp_path / name, "train.tsv", "sentence\tlabel\n" + "\n".join(order) + "\n")
    x, y = (read(str(tmp_path / d), "train", SST2) for d in "xy")
    assert len(set(x.ids_N)) == 3
    assert set(x.ids_N) == set(y.ids_N)
    assert x.ids_N[1] == y.ids_N[1]


def test_regression_labels_are_numbers(tmp_path):
    put(tmp_path, "train.tsv", "sentence1\tsentence2\tscore\na\tb\t4.5\nc\td\t0\n")
    split = read(str(tmp_path), "train", GLUE["stsb"])
    assert split.labels_N.dtype == np.float32 and split.labels_N.tolist() == [4.5, 0.0]
    put(tmp_path, "dev.tsv", "sentence1\tsentence2\tscore\na\tb\tx\n")
    assert "dev.tsv:2: score 'x' is not a number" in refused(tmp_path, GLUE["stsb"], "dev")


@pytest.mark.parametrize("name", sorted(GLUE))
def test_every_glue_layout_loads(tmp_path, name):
    task = GLUE[name]
    labels = task.classes or ("1.5", "3")
    header = "\t".join(["index", *task.text, task.label])
    put(
        tmp_path,
        "train.tsv",
        header
        + "\n"
        + "".join("\t".join([str(i), *["some text"] * len(task.text), labels[i % 2]]) + "\n" for i in range(4)),
    )
    split = read(str(tmp_path), "train", task)
    assert len(split) == 4 and len(split.texts) == len(task.text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sentence\tlabel\nfine\t1\none\ttab too many\t0\n", r"train.tsv:3: has 3 field\(s\) where the header names 2"),
        ("sentence\tlabel\nfine\t1\nno label\n", r"train.tsv:3: has 1 field\(s\) where the header names 2"),
        ("sentence\tlabel\n", "train.tsv: has no examples"),
        ("", "train.tsv: is empty"),
        ("\ufeff\n\n", "train.tsv: is empty"),
        ("text\tlabel\nfine\t1\n", "train.tsv:1: has no column 'sentence'; the header names 'text', 'label'"),
        ("sentence\tlabel\nfine\t1\n \t0\n", "train.tsv:3: sentence is empty"),
        ("sentence\tlabel\nfine\t\n", "train.tsv:2: label is empty"),
        ("sentence\tlabel\nfine\t1\nso\t2\n", "train.tsv:3: label '2' is not one of the labels: 0, 1"),
        ("sentence\tlabel\nfine\t1\nso\t1\n", "every example has the label '1'; training needs at least two"),
        (b"sentence\tlabel\nfine\t1\n\xff\xfe\t0\n", "train.tsv:3: byte 0xff is not valid UTF-8"),
    ],
)
def test_a_wrong_tsv_is_refused_by_file_and_line(tmp_path, content, message):
    put(tmp_path, "train.tsv", content)
    with pytest.raises(UserError, match=message):
        read(str(tmp_path), "train", SST2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", 'a,b,y\n1,2,3\n"open,2,3\n', r"train.csv:\d: not valid CSV"),
        ("train.csv", "a,b,y\n1,2,3\n1,2,3,4\n", r"train.csv:3: has 4 field\(s\)"),
        ("train.jsonl", '{"a": "1", "b": "2", "y": 0}\n{"a": \n', "train.jsonl:2: not valid JSON"),
        ("train.jsonl", '{"a": "1", "y": 0}\n', "train.jsonl:1: has no column 'b'"),
        ("train.jsonl", '{"a": "x \\ud83d", "b": "2", "y": 0}\n', "train.jsonl:1: a holds half of a surrogate pair"),
        ("train.jsonl", '{"a": ["x"], "b": "2", "y": 0}\n', "train.jsonl:1: a must be text or a number, not "),
        ("train.jsonl", "[1]\n", "train.jsonl:1: must be a JSON object"),
        ("train.jsonl", '{"a": null, "b": "2", "y": 0}\n', "train.jsonl:1: a is empty"),
        ("train.parquet", "not parquet", "train.parquet: cannot be read as Parquet"),
    ],
)
def test_other_formats_are_refused_too(tmp_path, name, content, message):
    put(tmp_path, name, content)
    with pytest.raises(UserError, match=message):
        read(str(tmp_path), "train", CUSTOM)


def test_a_label_that_training_never_saw(tmp_path):
    put(tmp_path, "dev.jsonl", '{"a": "1", "b": "2", "y": "maybe"}\n')
    message = refused(tmp_path, CUSTOM, "dev", ("no", "yes"))
    assert "dev.jsonl:1: y 'maybe' is not one of the labels seen in training: no, yes" in message


def test_missing_folder_split_and_two_files_of_a_split(tmp_path):
    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "has no split 'train'; expected one of train.tsv, train.csv" in refused(tmp_path)
    put(tmp_path, "train.tsv", "x")
    put(tmp_path, "train.csv", "x")
    assert "both hold the split train" in refused(tmp_path)
