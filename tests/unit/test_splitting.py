"""One file split into train, dev and test: the same parts in any order, groups that stay together, classes in every part."""

import collections
import gzip
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pkd_dist.config.task import FileSplit
from pkd_dist.config.task import Task as TaskConfig
from pkd_dist.data import splitting
from pkd_dist.data.rows import FILE_EXTENSIONS
from pkd_dist.data.splitting import DEV, TEST, TRAIN, Table, split
from pkd_dist.data.tasks import Task, resolve
from pkd_dist.data.text import read, read_all
from pkd_dist.errors import UserError


def rows(count, seed=0, classes=2, groups=40, texts=10**9):
    """(text, class, group) of so many examples."""
    rng = random.Random(seed)
    return [(f"text {rng.randrange(texts)}", rng.randrange(classes), f"g{rng.randrange(groups)}") for _ in range(count)]


def parts_of(rows, regression=False, **settings):
    """The part of each row, and the notes."""
    texts, labels, groups = zip(*rows, strict=True)
    names = [] if regression else [f"class {i}" for i in range(max(labels) + 1)]
    table = Table("all.csv", (list(texts),), np.array(labels), names, list(groups) if settings.get("group") else None)
    part_N, notes = split(table, FileSplit(**settings))
    assert part_N.dtype == np.int8 and len(part_N) == len(rows)
    return part_N.tolist(), notes


def counts(part_N, rows):
    """(part, class) -> examples."""
    return collections.Counter((part, label) for part, (_, label, _) in zip(part_N, rows, strict=True))


@pytest.mark.parametrize(
    "settings", [{}, {"stratify": False}, {"group": "g"}, {"group": "g", "stratify": False}, {"test": 0, "dev": 0.3}]
)
def test_the_parts_do_not_depend_on_the_order_of_the_rows(settings):
    given = rows(600, texts=400)
    part_N, _ = parts_of(given, **settings)
    order = list(range(600))
    for seed in range(3):
        random.Random(seed).shuffle(order)
        again, _ = parts_of([given[i] for i in order], **settings)
        assert again == [part_N[i] for i in order]


def test_the_parts_are_those_of_every_machine():
    """Other values would mean that a run on a file that was split before learns from other examples."""
    given = [(f"text {i}", i % 2, f"g{i % 15}") for i in range(40)]
    part_N, _ = parts_of(given)
    assert [i for i, part in enumerate(part_N) if part == DEV] == [4, 5, 22, 39]
    assert [i for i, part in enumerate(part_N) if part == TEST] == [3, 17, 20, 34]
    grouped, _ = parts_of(given, group="g", dev=0.2)
    assert [i for i, part in enumerate(grouped) if part == DEV] == [2, 7, 10, 17, 22, 25, 32, 37]


def test_every_class_has_its_share_in_every_part():
    given = [(f"a{i}", 0, "") for i in range(500)] + [(f"b{i}", 1, "") for i in range(90)]
    given += [(f"c{i}", 2, "") for i in range(10)]
    part_N, notes = parts_of(given, dev=0.2, test=0.1)
    assert counts(part_N, given) == {
        (TRAIN, 0): 350, (DEV, 0): 100, (TEST, 0): 50,
        (TRAIN, 1): 63, (DEV, 1): 18, (TEST, 1): 9,
        (TRAIN, 2): 7, (DEV, 2): 2, (TEST, 2): 1,
    }  # fmt: skip
    assert notes == {
        "train": ["split into 420 train, 120 dev, 60 test by task.split (dev 0.2, test 0.1, seed 1, stratified)"],
        "dev": [],
        "test": [],
    }
    plain, _ = parts_of(given, dev=0.2, test=0.1, stratify=False)
    assert [plain.count(part) for part in (TRAIN, DEV, TEST)] == [420, 120, 60] and plain != part_N


def test_other_seeds_give_other_parts():
    given = rows(200)
    assert parts_of(given, seed=1)[0] != parts_of(given, seed=2)[0]


def test_small_classes_stay_in_train_first_then_in_dev():
    given = [(f"a{i}", 0, "") for i in range(40)] + [("b", 1, ""), ("c", 2, ""), ("d", 2, "")]
    given += [(f"e{i}", 3, "") for i in range(3)] + [("same", 4, "")] * 5
    part_N, notes = parts_of(given)
    found = counts(part_N, given)
    assert [found[TRAIN, label] for label in range(5)] == [32, 1, 1, 1, 5]
    assert [found[DEV, label] for label in range(5)] == [4, 0, 1, 1, 0]
    assert [found[TEST, label] for label in range(5)] == [4, 0, 0, 1, 0]
    assert notes["dev"] == ["has no example of class 1, class 4"]
    assert notes["test"] == ["has no example of class 1, class 2, class 4"]


def test_equal_texts_are_in_one_part_whatever_their_labels():
    given = rows(600, texts=150)
    part_N, _ = parts_of(given)
    parts = collections.defaultdict(set)
    for part, (text, _, _) in zip(part_N, given, strict=True):
        parts[text].add(part)
    assert len(parts) > 100 and all(len(each) == 1 for each in parts.values())
    for part in (DEV, TEST):
        assert abs(part_N.count(part) - 60) <= 6


@pytest.mark.parametrize("stratify", [True, False])
def test_no_group_is_in_two_parts_and_shares_are_near(stratify):
    given = rows(600, groups=90, classes=3, texts=300)
    part_N, notes = parts_of(given, group="g", stratify=stratify)
    parts, texts = collections.defaultdict(set), collections.defaultdict(set)
    for part, (text, _, group) in zip(part_N, given, strict=True):
        parts[group].add(part)
        texts[text].add(group)
    assert all(len(each) == 1 for each in parts.values())
    several = sum(len(groups) > 1 for groups in texts.values())
    assert notes["train"][1] == f"texts that are in more than one group of g: {several}"
    found = counts(part_N, given)
    for label in range(3):
        total = sum(found[part, label] for part in range(3))
        for part in (DEV, TEST):
            assert abs(found[part, label] - total / 10) <= (5 if stratify else 12)


def test_a_row_without_a_group_is_grouped_by_its_text():
    given = [(text, label, "" if i % 3 else group) for i, (text, label, group) in enumerate(rows(300, texts=80))]
    part_N, notes = parts_of(given, group="g")
    parts = collections.defaultdict(set)
    for part, (text, _, group) in zip(part_N, given, strict=True):
        parts[group or f"text of {text}"].add(part)
    assert all(len(each) == 1 for each in parts.values())
    assert "g is empty in 200 of 300 rows; the text of each is its group" in notes["train"]


def test_a_group_that_has_the_name_of_a_text_is_not_its_text():
    given = [("a", 0, "b"), ("b", 0, "")]
    texts, _, groups = zip(*given, strict=True)
    keys = splitting._unit_keys((texts,), groups, 1)
    assert keys[0] != keys[1]
    assert splitting._unit_keys((["a"], ["b"]), None, 1)[0] != splitting._unit_keys((["ab"], [""]), None, 1)[0]


def test_the_only_group_of_a_class_stays_in_train():
    given = [(f"a{i}", 0, f"g{i}") for i in range(100)] + [(f"b{i}", 1, "big") for i in range(5)]
    for seed in range(20):
        part_N, _ = parts_of(given, group="g", seed=seed, dev=0.3, test=0.3)
        assert set(part_N[100:]) == {TRAIN}


def test_appended_rows_move_few_others():
    given = rows(1000)
    before, _ = parts_of(given)
    after, _ = parts_of(given + rows(50, seed=9))
    moved = sum(a != b for a, b in zip(before, after, strict=False))
    assert 0 < moved <= 30, "those next to the cuts"


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        (
            [("a", 0, ""), ("b", 1, "")], {},
            "all.csv: no example is left for dev: there are 2 examples in 2 different texts, the smallest of 1, and dev should "
            "have 0.2; change task.split.dev, or give more examples",
        ),
        (
            [(f"a{i}", i % 2, f"g{i % 4}") for i in range(600)], {"group": "g"},
            "all.csv: no example is left for dev: there are 600 examples in 4 groups of g, the smallest of 150, and dev should "
            "have 60; change task.split.dev or task.split.group, or give more examples",
        ),
        (
            [("a", 0, ""), ("b", 0, ""), ("c", 1, "")], {},
            "all.csv: no example is left for test: there are 3 examples in 3 different texts, .*; change task.split.test, or",
        ),
    ],
)  # fmt: skip
def test_a_part_without_examples_is_refused_with_the_numbers(given, settings, message):
    with pytest.raises(UserError, match=message):
        parts_of(given, **settings)


def test_a_regression_is_cut_at_the_shares():
    part_N, notes = parts_of([(f"a{i}", 0, "") for i in range(100)], regression=True, test=0)
    assert [part_N.count(part) for part in range(3)] == [90, 10, 0]
    assert set(notes) == {"train", "dev"} and "stratified" not in notes["train"][0]
    assert parts_of([(f"a{i}", 0, "") for i in range(100)][::-1], regression=True, test=0)[0] == part_N[::-1]


OWN = {"name": "custom", "text": ["text"], "label": "label"}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"split": {"dev": 0}}, "greater than 0"),
        ({"split": {"dev": 0.5, "test": 0.5}}, "task.split.dev 0.5 and task.split.test 0.5 leave nothing to train on"),
        ({"split": {"group": "label"}}, "task.split.group: label is the label column; name another column"),
        ({"split": {"stratify": True}, "kind": "regression"}, "task.split.stratify: a regression has no classes"),
    ],
)
def test_settings_that_cannot_work(task, message):
    with pytest.raises((UserError, ValueError), match=message):
        resolve(TaskConfig(**OWN, **task))


def test_the_parts_of_a_file_are_read_together_and_one_by_one(tmp_path):
    given = rows(200, texts=150, groups=30)
    path = tmp_path / "all.csv"
    path.write_text("id,text,label,g\n" + "".join(f"{i},{t},{y},{g}\n" for i, (t, y, g) in enumerate(given)))
    task = resolve(TaskConfig(**OWN, split=FileSplit(group="g", seed=3)))
    splits = read_all(str(path), task)
    assert list(splits) == ["train", "dev", "test"] and sum(map(len, splits.values())) == 200
    for name, part in splits.items():
        alone = read(str(path), name, task)
        assert np.array_equal(alone.ids_N, part.ids_N) and alone.texts == part.texts
        assert [given[row - 2][0] for row in part.rows] == list(part.texts[0])
        assert part.source == f"{path} ({name})" and part.classes == ("0", "1")
    expected, _ = parts_of(given, group="g", seed=3)
    assert [expected[row - 2] for row in splits["dev"].rows] == [DEV] * len(splits["dev"])
    assert splits["train"].notes[0] == "columns not used: id"


@pytest.mark.parametrize("extension", FILE_EXTENSIONS)
def test_every_kind_of_table_gives_the_same_parts(tmp_path, extension):
    table = [{"text": text, "label": label, "g": group} for text, label, group in rows(120, texts=90)]
    path, kind = tmp_path / f"all.{extension}", extension.removesuffix(".gz")
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(table), path)
    else:
        lines = [*map(json.dumps, table)]
        if kind == "json":
            lines = [json.dumps(table)]
        elif kind != "jsonl":
            lines = [
                {"csv": ",", "tsv": "\t"}[kind].join(map(str, each))
                for each in (table[0], *(r.values() for r in table))
            ]
        content = "".join(f"{line}\n" for line in lines).encode()
        path.write_bytes(gzip.compress(content) if extension.endswith(".gz") else content)
    splits = read_all(str(path), resolve(TaskConfig(**OWN, split=FileSplit(group="g"))))
    part_N, _ = parts_of(rows(120, texts=90), group="g")
    for i, part in enumerate(splits.values()):
        assert list(part.texts[0]) == [row["text"] for row, own in zip(table, part_N, strict=True) if own == i]


def test_a_text_column_can_be_the_group(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [f'{{"a": "title {i % 40}", "b": "body {i}", "y": {i % 2}}}\n' for i in range(200)]
    path.write_text("".join(lines))
    task = Task("custom", ("a", "b"), "y", file_split=FileSplit(group="a"))
    titles = [set(part.texts[0]) for part in read_all(str(path), task).values()]
    assert len(set.union(*titles)) == 40 == sum(map(len, titles))


def test_a_label_is_needed_in_every_row(tmp_path):
    path = tmp_path / "all.csv"
    path.write_text("text,label\n" + "".join(f"text {i},{'' if i == 50 else i % 2}\n" for i in range(100)))
    for name in ("train", "test"):
        with pytest.raises(UserError, match=r"all\.csv:52: label is empty, null or NaN"):
            read(str(path), name, resolve(TaskConfig(**OWN)))
