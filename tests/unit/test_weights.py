"""Class weights."""

import numpy as np
import pytest

from pkd_dist.data.class_weights import class_weights
from pkd_dist.errors import UserError

LABELS = np.array([0, 0, 0, 1, -1, -1])
VALUES, NAMES = ("0", "1"), ("negative", "positive")


def test_balanced_weights_give_every_class_the_same_total():
    weights = class_weights("balanced", LABELS, VALUES, NAMES)
    assert weights.dtype == np.float32 and weights.tolist() == pytest.approx([4 / (2 * 3), 4 / (2 * 1)])
    assert class_weights("balanced", LABELS, ("0", "1", "2"), ("a", "b", "c")).tolist() == pytest.approx(
        [4 / 9, 4 / 3, 0]
    )
    many = np.repeat(np.arange(300), np.arange(1, 301))
    weights = class_weights("balanced", many, [str(i) for i in range(300)], [str(i) for i in range(300)])
    assert (np.bincount(many) * weights).tolist() == pytest.approx([len(many) / 300] * 300)


def test_weights_by_name_or_value():
    assert class_weights(None, LABELS, VALUES, NAMES) is None
    assert class_weights({"positive": 3.0}, LABELS, VALUES, NAMES).tolist() == [1, 3]
    assert class_weights({"1": 3.0, "negative": 0.5}, LABELS, VALUES, NAMES).tolist() == [0.5, 3]


def test_errors():
    with pytest.raises(UserError, match=r"^task\.class_weights: 'good' is not a class; allowed: negative, positive$"):
        class_weights({"good": 2.0}, LABELS, VALUES, NAMES)
    with pytest.raises(UserError, match="the class positive is given twice, by name and by value; keep one"):
        class_weights({"1": 2.0, "positive": 2.0}, LABELS, VALUES, NAMES)
    with pytest.raises(UserError, match="a regression has no classes; remove it"):
        class_weights("balanced", np.zeros(3, np.float32), (), ())
