"""RUN/answers.safetensors: the predictions of teacher and student for every scored example, by example id.

Per split it holds the tensors `SPLIT.ids` int64 (N,), `SPLIT.labels` int64 or float32 (N,), `SPLIT.teacher` and
`SPLIT.student` float32 (N, C): logits, or the predicted value for a regression (C = 1). Labels are those of the token sets. Where
a text can have several classes, labels are float32 (N, C), and logits are shifted by the thresholds: above 0 is a class.
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
from pkd_dist.evaluation.probabilities import sigmoid, softmax
from pkd_dist.evaluation.results import SIDES
from pkd_dist.files import write_atomically

FILE = "answers.safetensors"


@dataclass(frozen=True)
class Predictions:
    """Predictions of both models for one split; the module docstring has shapes and dtypes."""

    ids_N: np.ndarray
    labels_N: np.ndarray
    logits: dict[str, np.ndarray]

    @property
    def labelled(self) -> bool:
        return bool(is_labelled(self.labels_N).all())

    @property
    def multilabel(self) -> bool:
        """Whether a text can have several classes."""
        return self.labels_N.ndim == 2

    @cached_property
    def predicted(self) -> dict[str, np.ndarray]:
        """Side -> (N,): the class with the largest logit, or the value for a regression; for multi-label (N, C) booleans."""
        if self.multilabel:
            return {side: logits_NC > 0 for side, logits_NC in self.logits.items()}
        return {side: x[:, 0] if x.shape[1] == 1 else x.argmax(axis=1) for side, x in self.logits.items()}

    @cached_property
    def probabilities(self) -> dict[str, np.ndarray]:
        """Side -> (N, C) float64; for multi-label the scores of the classes, above 0.5 where a text has them."""
        of = sigmoid if self.multilabel else softmax
        return {side: of(logits_NC) for side, logits_NC in self.logits.items()}

    def confusion(self, side: str) -> np.ndarray:
        """Return the (C, C) confusion matrix of a model; rows are true classes."""
        classes = self.logits[side].shape[1]
        matrix = np.zeros((classes, classes), dtype=int)
        np.add.at(matrix, (self.labels_N, self.predicted[side]), 1)
        return matrix


def write(path: Path, splits: Mapping[str, TokenSet], logits: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write the predictions for `splits`.

    Args:
        logits: Split -> side -> (N, C), in the order of the token set.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, tokens in splits.items():
        tensors |= {f"{name}.ids": np.array(tokens.ids_N), f"{name}.labels": np.array(tokens.labels_N)}
        tensors |= {f"{name}.{side}": np.ascontiguousarray(logits[name][side], np.float32) for side in SIDES}
    write_atomically(path, lambda tmp: save_file(tensors, tmp), sum(x.nbytes for x in tensors.values()))


def read(path: Path) -> dict[str, Predictions]:
    """Read the predictions of every split.

    Raises:
        UserError: The file is missing or cannot be read.
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
        raise UserError(f"{path}: is missing; rerun the run's command to write it again") from None
    except (OSError, SafetensorError, LookupError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); remove it and rerun the run's command to write it again"
        ) from None
