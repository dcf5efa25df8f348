"""Class weights for the loss of labeled examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from pkd_dist.data.examples import is_labelled
from pkd_dist.errors import UserError


def class_weights(
    setting: Literal["balanced"] | Mapping[str, float] | None,
    labels_N: np.ndarray,
    classes: Sequence[str],
    names: Sequence[str],
) -> np.ndarray | None:
    """Return the weights of C classes.

    Args:
        setting: `task.class_weights`. `balanced`: n / (C * count), which gives every class the same total weight. A
            mapping: weights by class name or value; classes not in it weigh 1.
        labels_N: labels of the training split; unlabeled examples are ignored.
        classes: values of the label column in class order.
        names: class names of the model, in the same order.

    Returns:
        float32 (C,), or None without a setting. If balanced, a class without examples has weight 0.

    Raises:
        UserError: regression task, unknown class, or a class given twice.
    """
    if setting is None:
        return None
    if not classes:
        raise UserError("task.class_weights: a regression has no classes; remove it")
    if setting == "balanced":
        count_C = np.bincount(labels_N[is_labelled(labels_N)], minlength=len(classes))
        weights_C = count_C.sum() / (len(classes) * np.maximum(count_C, 1))
        return np.where(count_C > 0, weights_C, 0).astype(np.float32)
    index = {key: i for keys in (names, classes) for i, key in enumerate(keys)}
    out = np.ones(len(classes), np.float32)
    seen: set[int] = set()
    for key, weight in setting.items():
        if key not in index:
            allowed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise UserError(f"task.class_weights: {key!r} is not a class; allowed: {allowed}")
        if index[key] in seen:
            raise UserError(
                f"task.class_weights: the class {names[index[key]]} is given twice, by name and by value; keep one"
            )
        seen.add(index[key])
        out[index[key]] = weight
    return out
