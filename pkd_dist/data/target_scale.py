"""The scale of a regression's targets.

Models learn standardized targets, (target - mean) / std, so that learning rates do not depend on the user's unit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from pkd_dist.data.examples import is_labelled
from pkd_dist.data.tokens import TokenSet


@dataclass(frozen=True)
class TargetScale:
    """Mean and standard deviation of the training targets, in the user's unit. `std` is 1 where they are constant."""

    mean: float
    std: float

    @staticmethod
    def of(labels_N: np.ndarray) -> TargetScale:
        """Return the scale of (N,) targets; unlabelled examples, which are NaN, are left out."""
        known = labels_N[is_labelled(labels_N)].astype(np.float64)
        return TargetScale(float(known.mean()), float(known.std()) or 1.0)

    def standardized(self, tokens: TokenSet) -> TokenSet:
        """Return a token set with standardized targets."""
        return replace(tokens, labels_N=self.standardize(np.asarray(tokens.labels_N)))

    def standardize(self, values: np.ndarray) -> np.ndarray:
        """Return values in units of the scale, float32."""
        return ((values.astype(np.float64) - self.mean) / self.std).astype(np.float32)
