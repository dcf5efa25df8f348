"""Texts in several splits: counted, dropped or refused."""

from dataclasses import replace

import numpy as np
import pytest

from pkd_dist.data.duplicates import Hashed, settled
from pkd_dist.data.examples import Split, example_ids
from pkd_dist.data.tasks import GLUE, Task
from pkd_dist.errors import UserError

CLASSES = ("no", "yes")


def part(name, *examples):
    """A split of texts that end in their label."""
    texts = ([example.rpartition(" ")[0] for example in examples],)
    labels_N = np.array([-1 if example.endswith("?") else int(example[-1]) for example in examples])
    return Split(example_ids(texts), texts, labels_N, CLASSES, name)


def splits():
    return {
        "train": part("t.csv", "a 0", "b 1", "a 0", "a 1", "c 1", "d 0", "d 0"),
        "dev": part("d.csv", "b 0", "e 1", "f 0", "f 0"),
        "test": part("e.csv", "e ?", "c ?", "g ?"),
    }


def task(duplicates):
    return Task("custom", ("text",), "label", duplicates=duplicates)


def examples(split):
    return [f"{text} {label}" for text, label in zip(split.texts[0], split.labels_N.tolist(), strict=True)]


def test_they_are_reported():
    given = splits()
    found = settled(given, task("keep"))
    for name, split in found.items():
        assert examples(split) == examples(given[name]) and np.array_equal(split.ids_N, given[name].ids_N)
    assert found["train"].notes == ("repeated texts with another label than before: 1, such as 'a'",)
    assert found["dev"].notes == (
        "1 of 4 texts are also in train, 1 of them with another label, such as 'b'; task.duplicates: drop removes them from "
        "train",
    )
    assert found["test"].notes == (
        "1 of 3 texts are also in train, such as 'c'; task.duplicates: drop removes them from train",
        "1 of 3 texts are also in dev, such as 'e'; task.duplicates: drop removes them from dev",
    )


def test_text_without_labels_has_no_other_labels():
    given = splits()
    train = replace(given["train"], labels_N=np.full(len(given["train"].labels_N), -1))
    found = settled(given | {"train": train}, task("keep"))
    assert found["train"].notes == ()
    assert found["dev"].notes == (
        "1 of 4 texts are also in train, such as 'b'; task.duplicates: drop removes them from train",
    )


def test_they_are_dropped():
    found = settled(splits(), task("drop"))
    assert examples(found["train"]) == ["a 0", "a 1", "d 0"], "b is in dev, c in test, a 0 and d 0 are repeated"
    assert examples(found["dev"]) == ["b 0", "f 0", "f 0"], "repeats in dev stay"
    assert examples(found["test"]) == ["e -1", "c -1", "g -1"]
    assert np.array_equal(found["train"].ids_N, example_ids((["a", "a", "d"],)))
    assert found["train"].notes == (
        "dropped 4 of 7 examples: 2 also in dev or test, such as 'b', 2 repeated with the same label, such as 'a'",
        "repeated texts with another label than before: 1, such as 'a'",
    )
    assert found["dev"].notes == ("dropped 1 of 4 examples: 1 also in test, such as 'e'",)
    again = settled(found, task("drop"))
    assert {name: examples(split) for name, split in again.items()} == {n: examples(s) for n, s in found.items()}


def test_they_are_refused():
    with pytest.raises(UserError) as error:
        settled(splits(), task("refuse"))
    assert str(error.value) == (
        "task.duplicates: 1 of the 4 texts of dev are also in train, such as 'b'; remove them from one of the two, or set "
        "drop, which removes them from train, or keep"
    )
    within = {"train": part("t.csv", "a 0", "a 0", "a 1"), "dev": part("d.csv", "b 0", "b 1")}
    assert settled(within, task("refuse"))["train"].notes, "repeats in one split are only reported"


def test_what_is_left_must_be_trainable():
    given = {"train": part("t.csv", "a 0", "b 1"), "dev": part("d.csv", "b 1", "c 0")}
    with pytest.raises(
        UserError, match=r"t\.csv: dropped 1 of 2 examples: .*'b'; no example of yes is left; set keep, or"
    ):
        settled(given, task("drop"))
    given = {**splits(), "dev": part("d.csv", "e 1"), "test": part("e.csv", "e 1")}
    with pytest.raises(UserError, match=r"d\.csv: dropped 1 of 1 examples: .*; no example is left; set keep, or"):
        settled(given, task("drop"))


def test_two_dev_sets_keep_what_they_share():
    given = {
        "train": part("t.tsv", "a 0", "b 1", "c 0", "d 1"),
        "dev": part("d.tsv", "x 0", "b 1"),
        "dev_mismatched": part("m.tsv", "x 0", "y 1"),
        "test_mismatched": part("n.tsv", "y ?", "z ?"),
    }
    found = settled(given, Task("mnli", ("text",), "label", splits=GLUE["mnli"].splits, duplicates="drop"))
    assert [examples(split) for split in found.values()] == [
        ["a 0", "c 0", "d 1"], ["x 0", "b 1"], ["x 0"], ["y -1", "z -1"]
    ]  # fmt: skip
    assert found["dev_mismatched"].notes[-1] == "1 of 1 texts are also in dev, such as 'x'"


def test_pairs_are_compared_together_and_shown_shortened():
    left = (["one", "two", "x" * 100], ["1", "2", "line\nbreak"])
    right = (["one", "two", "x" * 100], ["2", "1", "line\nbreak"])
    first, second = (Hashed(Split(example_ids(t), t, np.array([0.5, 1, 2], np.float32), (), "")) for t in (left, right))
    overlap = second.overlap(first)
    assert overlap.found_N.tolist() == [False, False, True] and not overlap.relabelled
    assert second.example(overlap.found_N) == f"'{'x' * 60}...' and 'line\\nbreak'"


def test_counts_match_a_dictionary_of_texts():
    rng = np.random.default_rng(1)
    given = [
        part(name, *(f"text {rng.integers(60)} {rng.integers(2)}" for _ in range(count)))
        for name, count in (("a", 90), ("b", 50))
    ]
    labels = {}
    for text, label in zip(given[0].texts[0], given[0].labels_N.tolist(), strict=True):
        labels.setdefault(text, set()).add(label)
    overlap = Hashed(given[1]).overlap(Hashed(given[0]))
    rows = list(zip(given[1].texts[0], given[1].labels_N.tolist(), strict=True))
    assert overlap.found_N.tolist() == [text in labels for text, _ in rows] and 0 < overlap.found < 50
    assert overlap.relabelled_N.tolist() == [text in labels and label not in labels[text] for text, label in rows]
