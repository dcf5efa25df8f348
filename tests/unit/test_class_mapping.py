"""The outputs of a fine-tuned classifier are matched to the classes of a task, or rejected under the key the user typed."""

from types import SimpleNamespace

import numpy as np
import pytest

from pkd_dist.config.load import load
from pkd_dist.data import tasks
from pkd_dist.data.class_mapping import (
    class_order,
    match,
    require_outputs,
    require_outputs_for_split,
    require_supported_outputs,
    with_positive,
)
from pkd_dist.data.class_values import sorted_classes
from pkd_dist.data.examples import Split
from pkd_dist.data.tasks import GLUE, Task
from pkd_dist.errors import UserError

CUSTOM = Task("custom", ("text",), "label")
OWN = ["task.name=custom", "task.text=[text]", "task.label=label"]


def classifier(*names, problem_type=None):
    return SimpleNamespace(num_labels=len(names), id2label=dict(enumerate(names)), problem_type=problem_type)


def task_of(*overrides):
    return tasks.resolve(load(None, ["run.dir=unused", *overrides]).task)


SIGNS = task_of(*OWN, "task.class_names={0: NEGATIVE, 1: POSITIVE}")
SWAPPED = task_of(*OWN, "task.class_names={dog: a dog, cat: a cat}")


@pytest.mark.parametrize(
    ("task", "names", "order"),
    [
        (GLUE["sst2"], ("LABEL_0", "label_1"), ("0", "1")),
        (GLUE["sst2"], ("LABEL_1", "LABEL_0"), ("1", "0")),
        (GLUE["sst2"], ("Positive", "negative"), ("1", "0")),
        (GLUE["sst2"], ("1", "0"), ("1", "0")),
        (GLUE["rte"], ("not_entailment", "ENTAILMENT"), ("not_entailment", "entailment")),
        (CUSTOM, ("cat", "dog"), ("cat", "dog")),
        (CUSTOM, ("LABEL_0", "LABEL_1"), None),
        (GLUE["stsb"], ("score",), None),
        (SIGNS, ("POSITIVE", "NEGATIVE"), ("1", "0")),
        (SIGNS, ("LABEL_0", "LABEL_1"), ("0", "1")),
        (SWAPPED, ("LABEL_0", "LABEL_1"), ("dog", "cat")),
        (task_of("task.name=mnli", "task.class_names={contradiction: c, entailment: e, neutral: n}"),
         ("LABEL_0", "LABEL_1", "LABEL_2"), ("contradiction", "entailment", "neutral")),
        (task_of(*OWN, "task.class_names={a: US, b: us}"), ("us", "US"), ("b", "a")),
    ],
)  # fmt: skip
def test_the_order_of_the_classes(task, names, order):
    assert class_order(task, classifier(*names), "--model") == order


@pytest.mark.parametrize(
    ("values", "order"),
    [
        ({f"LABEL_{i}" for i in range(12)}, [f"LABEL_{i}" for i in range(12)]),
        ({f"class {i}" for i in range(12)}, [f"class {i}" for i in range(12)]),
        ({f"C-{i}" for i in range(12)}, [f"C-{i}" for i in range(12)]),
        ({"10", "9", "-1.5"}, ["-1.5", "9", "10"]),
        ({"a10", "b9"}, ["a10", "b9"]),
        ({"a10", "a9", "none"}, ["a10", "a9", "none"]),
        ({"1-5", "1-10"}, ["1-10", "1-5"]),
    ],
)
def test_numbered_classes_are_ordered_by_number(values, order):
    assert sorted_classes(values) == order


@pytest.mark.parametrize(
    ("task", "order", "examples", "positive", "why"),
    [
        (task_of("task.name=sst2"), ("0", "1"), [1, 9], "1", "as sst2 defines"),
        (task_of("task.name=sst2"), ("1", "0"), [1, 9], "1", "as sst2 defines"),
        (task_of("task.name=sst2", "task.positive=negative"), ("1", "0"), None, "0", "task.positive"),
        (task_of("task.name=mrpc", "task.class_names={1: same, 0: other}"), ("1", "0"), [9, 1], "1", "as mrpc defines"),
        (CUSTOM, ("hateful", "normal"), [2, 18], "hateful", "the rarer one"),
        (CUSTOM, ("normal", "spam"), [18, 2], "spam", "the rarer one"),
        (CUSTOM, ("a", "b"), [5, 5], "b", "the second class"),
        (task_of(*OWN, "task.positive=1"), ("0", "1"), [2, 18], "1", "task.positive"),
        (CUSTOM, ("a", "b", "c"), [1, 2, 3], None, ""),
    ],
)
def test_the_positive_class_is_named_or_the_rarer_one(task, order, examples, positive, why):
    found = match(task, order, examples)
    assert (None if found.positive is None else found.values[found.positive]) == positive
    assert found.why.startswith(why)
    if positive is not None:
        assert with_positive(task, found).positive == order.index(positive)
        assert f"positive: {found.names[order.index(positive)]!r}" in found.sentence()


def test_the_mapping_in_one_line():
    found = match(SIGNS, ("1", "0"), [1, 2], ("POSITIVE", "LABEL_1"))
    assert found.sentence().startswith(
        "classes (output = label = name): 'POSITIVE' = '1', 'LABEL_1' = '0' = 'NEGATIVE'; positive: 'POSITIVE' (the rarer"
    )
    many = match(CUSTOM, [str(i) for i in range(50)], None).sentence()
    assert many.endswith("'11', ... (50 classes)") and "\n" not in many


@pytest.mark.parametrize(
    ("task", "model", "message"),
    [
        (GLUE["sst2"], classifier("a", "b", problem_type="multi_label_classification"), "is a multi-label classifier"),
        (GLUE["sst2"], classifier("a", "b", problem_type="regression"), "is a regression with 2 outputs"),
        (CUSTOM, classifier("a", problem_type="regression"), "is a regression .*, but custom is a classification"),
        (CUSTOM, classifier("a"), "is a regression .it has one output., but custom is a classification"),
        (
            GLUE["stsb"],
            classifier("a", problem_type="single_label_classification"),
            "is a classifier with a single output",
        ),
        (GLUE["stsb"], classifier("a", problem_type="multi_label_classification"), "is a multi-label classifier"),
    ],
)
def test_a_kind_of_output_that_does_not_fit_is_rejected(task, model, message):
    with pytest.raises(UserError, match=f"^--model: MINE {message}.*give a model of this task"):
        require_outputs(task, model, "MINE", "--model")


def test_usual_kinds_of_outputs_are_accepted():
    for kind in (None, "single_label_classification"):
        require_outputs(GLUE["sst2"], classifier("a", "b", problem_type=kind), "MINE", "--model")
    for kind in (None, "regression"):
        require_outputs(GLUE["stsb"], classifier("a", problem_type=kind), "MINE", "--model")
        require_supported_outputs(kind, 1, "MINE", "--model")


@pytest.mark.parametrize(("key", "remedy"), [("--model", ""), ("teacher.model", ", or set teacher.finetune")])
def test_messages_begin_with_the_key(key, remedy):
    split = Split(np.arange(2), (["a", "b"],), np.array([0, 1]), ("x", "y"), "dev.tsv")
    three, pets = classifier("LABEL_0", "LABEL_1", "LABEL_2"), classifier("cat", "dog")
    for check, message in (
        (lambda: require_outputs(GLUE["sst2"], three, "MINE", key), "MINE has 3 classes, sst2 has 2 (0, 1)"),
        (lambda: require_outputs(GLUE["stsb"], three, "MINE", key), "MINE has 3 outputs, but a regression needs 1"),
        (
            lambda: require_outputs_for_split(CUSTOM, three, split, "MINE", key),
            "MINE has 3 classes, dev.tsv has 2 (x, y)",
        ),
        (
            lambda: class_order(GLUE["sst2"], pets, key),
            "its classes are cat, dog, those of sst2 are negative, positive; map them with task.class_names, or",
        ),
    ):
        with pytest.raises(UserError) as raised:
            check()
        joint = " " if message.endswith(" or") else "; "
        assert str(raised.value) == f"{key}: {message}{joint}give a model of this task{remedy}"
        assert raised.value.setting == key
