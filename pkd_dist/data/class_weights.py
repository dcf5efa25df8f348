"""Weights of the classes in the loss of labelled examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from pkd_dist.data.text import is_labelled
from pkd_dist.errors import UserError


def class_weights(
    setting: Literal["balanced"] | Mapping[str, float] | None,
    labels_N: np.ndarray,
    classes: Sequence[str],
    names: Sequence[str],
) -> np.ndarray | None:
    """Weights of C classes.

    Args:
        setting: `task.class_weights`. `balanced`: n / (C * count), so that all classes weigh the same together. A mapping:
            by class name or value; a class that it does not name weighs 1.
        labels_N: of the training split; those without a label do not count.
        classes: values of the label column in class order.
        names: what the model calls them, in the same order.

    Returns:
        float32 (C,), or None where nothing is weighted. A class without examples has weight 0 when balanced.

    Raises:
        UserError: a regression, an unknown class, a class named twice.
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
    named: set[int] = set()
    for key, weight in setting.items():
        if key not in index:
            allowed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
            raise UserError(f"task.class_weights: {key!r} is not a class; allowed: {allowed}")
        if index[key] in named:
            raise UserError(
                f"task.class_weights: the class {names[index[key]]} stands twice, by name and value; keep one"
            )
        named.add(index[key])
        out[index[key]] = weight
    return out
