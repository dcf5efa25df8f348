"""The parts of a file as tables in the run folder: all columns, and the same examples when they are read again."""

import json

import numpy as np
import pytest

from pkd_dist.config.task import FileSplit
from pkd_dist.data import parts
from pkd_dist.data.tasks import GLUE, Task
from pkd_dist.data.text import read_all

PAIRS = Task("custom", ("a", "b"), "y", file_split=FileSplit(dev=0.2, group="g"))
REGRESSION = Task("custom", ("a", "b"), "y", regression=True)
ODD = [
    '"other": {"list": [1, 1e999, NaN], "text": "\\ud800"}', '"other": null', '"other": "two\\u2028lines\\n"',
    f'"other": {"9" * 5000}', '"z": true',
]  # fmt: skip


def written(tmp_path, name, content, task):
    """Write a file and its parts; return the splits of both."""
    path = tmp_path / name
    path.write_bytes(content.encode())
    splits = read_all(str(path), task)
    parts.write(tmp_path / "parts", str(path), splits, task)
    again = Task(**{**vars(task), "file_split": None})
    return splits, read_all(str(tmp_path / "parts"), again, splits["train"].classes or None)


def assert_equal(first, second):
    assert list(first) == list(second)
    for name, one in first.items():
        two = second[name]
        assert np.array_equal(one.ids_N, two.ids_N) and np.array_equal(one.labels_N, two.labels_N)
        assert all(a == b for a, b in zip(one.texts, two.texts, strict=True)) and one.classes == two.classes


@pytest.mark.parametrize("task", [PAIRS, REGRESSION], ids=["classes", "regression"])
def test_odd_columns_and_empty_halves_of_pairs(tmp_path, task):
    rows = [
        f'{{"a": "text {i % 50}", "b": {"null" if i % 7 else i}, "y": {i % 3}.0, "g": {i % 20}, {ODD[i % 5]}}}\n'
        for i in range(100)
    ]
    splits, again = written(tmp_path, "all.jsonl", "".join(rows), task)
    assert_equal(splits, again)
    record = json.loads((tmp_path / "parts/train.jsonl").read_text().splitlines()[0])
    assert list(record)[:3] == ["a", "b", "y"] and record["y"] in ("0", "1", "2") and isinstance(record["g"], int)
    lines = [line for name in splits for line in (tmp_path / f"parts/{name}.jsonl").read_text().split("\n") if line]
    others = [json.loads(line).get("other") for line in lines]
    assert (
        {"list": [1, None, None], "text": "\ud800"} in others and "two\u2028lines\n" in others and "9" * 5000 in others
    )


def test_a_file_without_a_header_and_labels_by_name(tmp_path):
    rows = [f"s{i}\t{['unacceptable', '1'][i % 2]}\t*\tSentence number {i}.\n" for i in range(60)]
    splits, again = written(tmp_path, "all.tsv", "".join(rows), GLUE["cola"])
    assert_equal(splits, again)
    assert set(json.loads((tmp_path / "parts/dev.jsonl").read_text().splitlines()[0])) == {
        "sentence", "label", "source", "mark"
    }  # fmt: skip


def test_rows_that_were_left_out_are_in_no_part(tmp_path):
    rows = [f"{i}\tquestion {i}\tother {i}\t{i % 2}\n" for i in range(80)] + ["1\tshort\n", "2\t\t \t1\n"]
    splits, again = written(
        tmp_path, "all.tsv", "id\tquestion1\tquestion2\tis_duplicate\n" + "".join(rows), GLUE["qqp"]
    )
    assert_equal(splits, again)
    assert sum(map(len, again.values())) == 80 and "skipped 2 lines without text: 82, 83" in splits["train"].notes
