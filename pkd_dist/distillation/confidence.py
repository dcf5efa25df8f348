"""Which texts the teacher is sure enough of to teach them (`task.augment.min_confidence`).

Shapes: N examples of a token set, R rows of a shard, C classes.
"""

from __future__ import annotations

import numpy as np

from pkd_dist.data.examples import is_labelled
from pkd_dist.data.tokens import TokenSet
from pkd_dist.distillation.cache import CacheReader


def confident_rows(tokens: TokenSet, reader: CacheReader, minimum: float) -> np.ndarray:
    """Return the rows of a token set to train on, int64, ascending: a function of the cache and `minimum` alone.

    These are all labeled examples, and the unlabeled ones of which the cached logits give some class at least the probability
    `minimum`, at temperature 1.
    """
    unsure = [ids_R[logits_RC.double().softmax(-1).amax(-1).numpy() < minimum] for ids_R, logits_RC in reader.logits()]
    keep_N = is_labelled(np.asarray(tokens.labels_N)) | ~np.isin(tokens.ids_N, np.concatenate(unsure))
    return np.flatnonzero(keep_N)
