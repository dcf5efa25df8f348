"""The checks of an input text and the JSON of an answer, shared by `pkd predict` and `pkd serve`.

Serving machines have no PyTorch, so this module needs NumPy alone.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

import numpy as np

from pkd_dist.evaluation.probabilities import sigmoid, softmax

Answer = dict[str, object]
"""What JSON holds for one text; see `answer`."""


def is_empty(text: str) -> bool:
    """Return whether a text has nothing but spaces, control characters and format characters."""
    return all(unicodedata.category(character) in ("Cc", "Cf", "Zs", "Zl", "Zp") for character in text)


def answer(logits_C: np.ndarray, names: Mapping[int, str], truncated: bool = False, multilabel: bool = False) -> Answer:
    """Turn the logits of one text into its answer.

    Args:
        logits_C: float32 (C,); C = 1 for a regression.
        names: Class names by class index; unused for a regression.
        truncated: Whether the model read only the beginning of the text.
        multilabel: Whether a text can have several classes, or none.

    Returns:
        `label`, `probability` and `probabilities` by class name, or `value` for a regression; for multi-label `labels`, the classes
        with a score above 0.5, and `scores` by class name; then `truncated: true` where it was.
    """
    note: Answer = {"truncated": True} if truncated else {}
    if multilabel:
        scores = sigmoid(logits_C).astype(np.float32).tolist()
        by_name = {names[i]: score for i, score in enumerate(scores)}
        return {"labels": [name for name, score in by_name.items() if score > 0.5], "scores": by_name} | note
    if len(logits_C) == 1:
        return {"value": float(logits_C[0])} | note
    probabilities, best = _probabilities(logits_C), int(logits_C.argmax())
    return {
        "label": names[best],
        "probability": probabilities[best],
        "probabilities": {names[i]: probability for i, probability in enumerate(probabilities)},
    } | note


def choice(logits_C: np.ndarray, options: Sequence[str], truncated: bool = False) -> Answer:
    """Turn the scores of the options of an example into its answer.

    Args:
        logits_C: float32 (C,).
        options: The C options.
        truncated: Whether the model read only the beginning of a text with an option.

    Returns:
        `choice`, the index of the chosen option; `option`, its text; its `probability`; the `probabilities` of all options, in their
        order; then `truncated: true` where it was.
    """
    probabilities, best = _probabilities(logits_C), int(logits_C.argmax())
    found: Answer = {
        "choice": best,
        "option": options[best],
        "probability": probabilities[best],
        "probabilities": probabilities,
    }
    return found | ({"truncated": True} if truncated else {})


def _probabilities(logits_C: np.ndarray) -> list[float]:
    probabilities: list[float] = softmax(logits_C).astype(np.float32).tolist()
    return probabilities
