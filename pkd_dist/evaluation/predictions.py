"""RUN/answers.safetensors: what teacher and student said of every scored example, by example id.

Per split the tensors `SPLIT.ids` int64 (N,), `SPLIT.labels` int64 or float32 (N,), `SPLIT.teacher` and `SPLIT.student`
float32 (N, C): logits, or the predicted value of a regression (C = 1). Labels are those of the token sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from pkd_dist.data.examples import is_labelled
from pkd_dist.data.tokens import TokenSet
from pkd_dist.errors import UserError
from pkd_dist.files import write_atomically

FILE = "answers.safetensors"
SIDES = ("teacher", "student")


@dataclass(frozen=True)
class Predictions:
    """Of one split; see the head of this module for shapes and dtypes."""

    ids_N: np.ndarray
    labels_N: np.ndarray
    logits: dict[str, np.ndarray]

    @property
    def labelled(self) -> bool:
        return bool(is_labelled(self.labels_N).all())

    @cached_property
    def said(self) -> dict[str, np.ndarray]:
        """(N,) per side: the class with the largest logit; of a regression the value."""
        return {side: x[:, 0] if x.shape[1] == 1 else x.argmax(axis=1) for side, x in self.logits.items()}

    @cached_property
    def probabilities(self) -> dict[str, np.ndarray]:
        """(N, C) per side, float64."""
        out = {}
        for side, logits_NC in self.logits.items():
            powers = np.exp(logits_NC.astype(np.float64) - logits_NC.max(axis=1, keepdims=True))
            out[side] = powers / powers.sum(axis=1, keepdims=True)
        return out

    def confusion(self, side: str) -> np.ndarray:
        """(C, C) counts, rows the true class."""
        classes = self.logits[side].shape[1]
        matrix = np.zeros((classes, classes), dtype=int)
        np.add.at(matrix, (self.labels_N, self.said[side]), 1)
        return matrix


def write(path: Path, splits: Mapping[str, TokenSet], logits: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Writes the answers to `splits`.

    Args:
        logits: split -> side -> (N, C), in the order of the token set.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, tokens in splits.items():
        tensors |= {f"{name}.ids": np.array(tokens.ids_N), f"{name}.labels": np.array(tokens.labels_N)}
        tensors |= {f"{name}.{side}": np.ascontiguousarray(logits[name][side], np.float32) for side in SIDES}
    write_atomically(path, lambda tmp: save_file(tensors, tmp), sum(x.nbytes for x in tensors.values()))


def read(path: Path) -> dict[str, Predictions]:
    """split -> answers.

    Raises:
        UserError: the file is not there, or cannot be read.
    """
    try:
        tensors = load_file(path)
        names = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
        return {
            name: Predictions(
                tensors[f"{name}.ids"], tensors[f"{name}.labels"], {side: tensors[f"{name}.{side}"] for side in SIDES}
            )
            for name in names
        }
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; the run's own command makes it again") from None
    except (OSError, SafetensorError, LookupError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); remove it, and the run's own command makes it again"
        ) from None
