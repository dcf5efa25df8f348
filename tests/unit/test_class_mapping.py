"""The outputs of a fine-tuned classifier are matched to the classes of a task, or rejected under the key the user typed."""

from types import SimpleNamespace

import numpy as np
import pytest

from pkd_dist.data.class_mapping import class_order, require_outputs, require_outputs_for_split, with_positive_class
from pkd_dist.data.examples import Split
from pkd_dist.data.tasks import GLUE, Task
from pkd_dist.errors import UserError

CUSTOM = Task("custom", ("text",), "label")


def classifier(*names):
    return SimpleNamespace(num_labels=len(names), id2label=dict(enumerate(names)))


@pytest.mark.parametrize(
    ("task", "names", "order"),
    [
        (GLUE["sst2"], ("LABEL_0", "label_1"), ("0", "1")),
        (GLUE["sst2"], ("Positive", "negative"), ("1", "0")),
        (GLUE["sst2"], ("1", "0"), ("1", "0")),
        (GLUE["rte"], ("not_entailment", "ENTAILMENT"), ("not_entailment", "entailment")),
        (CUSTOM, ("cat", "dog"), ("cat", "dog")),
        (CUSTOM, ("LABEL_0", "LABEL_1"), None),
        (GLUE["stsb"], ("score",), None),
    ],
)
def test_the_order_of_the_classes(task, names, order):
    assert class_order(task, classifier(*names), "--model") == order


def test_precision_follows_the_class_not_its_place():
    task = with_positive_class(GLUE["sst2"], ("1", "0"))
    assert (task.positive, GLUE["sst2"].positive) == (0, 1)
    assert with_positive_class(CUSTOM, ("a", "b")) is CUSTOM


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
            "its classes are cat, dog, those of sst2 are negative, positive",
        ),
    ):
        with pytest.raises(UserError) as raised:
            check()
        assert str(raised.value) == f"{key}: {message}; give a model of this task{remedy}"
        assert raised.value.setting == key
