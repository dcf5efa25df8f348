"""More text out of the training text, in the manner of Tang et al. 2019 (arXiv 1903.12136, section 4.2.1).

Per copy of an example, each word becomes the mask token with probability `mask`, or with probability `replace` a word drawn
from the frequencies of the words in that column of the training text; then with probability `ngram` only a random run of 1
to 5 words is kept. Of a pair the first text, the second or both are changed, drawn evenly. The paper replaces a word by one
of the same part of speech; drawing from the frequencies alone takes the place of that here, so that no tagger is needed.

All draws are hashes of (seed, example id, copy, column, word): a copy depends on nothing else but the frequencies, so
neither on the order of the examples nor on how many copies there are.

Shapes: N examples, W words of all of them.
"""

from __future__ import annotations

import numpy as np

from pkd_dist.config import Augment
from pkd_dist.data.text import Split, example_ids, unlabelled, without
from pkd_dist.errors import UserError

_LONGEST_NGRAM = 5
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def augment(split: Split, settings: Augment, mask_token: str | None) -> Split:
    """New texts made of a split's, without labels. Those equal to a text of the split or to each other are left out, and
    counted in the notes.

    Args:
        mask_token: the tokenizer's; None where it has none.

    Raises:
        UserError: words are to be masked and there is no mask token; no new text comes out.
    """
    if settings.mask and mask_token is None:
        raise UserError("task.augment.mask: the teacher's tokenizer has no mask token; give 0")
    columns = [_Column(texts, mask_token or "") for texts in split.texts]
    made: tuple[list[str], ...] = tuple([] for _ in columns)
    with np.errstate(over="ignore"):  # hashes wrap around
        base_N = _hash(split.ids_N.view(np.uint64), settings.seed)
        for copy in range(settings.copies):
            key_N = _hash(base_N, copy)
            changed = np.floor(_uniform(_hash(key_N, 0)) * 3)  # of a pair: 0 the first, 1 the second, 2 both
            for i, column in enumerate(columns):
                kept_N = (changed == 1 - i) & (len(columns) == 2)
                made[i].extend(column.changed(_hash(key_N, 1 + i), settings, kept_N))
    labels = unlabelled(len(made[0]), split.labels_N.dtype.kind == "f")
    return without(Split(example_ids(made), made, labels, split.classes, f"{split.source}, augmented"), split)


class _Column:
    """One text column as word codes."""

    def __init__(self, texts: list[str], mask_token: str):
        words = [text.split() for text in texts]
        flat = [word for of_text in words for word in of_text]
        vocabulary = sorted(set(flat))  # the same for any order of the examples
        index = {word: code for code, word in enumerate(vocabulary)}
        self.texts = texts
        self.length_N = np.array([len(of_text) for of_text in words], np.int64)
        self.start_N = np.cumsum(self.length_N) - self.length_N
        self.row_W = np.repeat(np.arange(len(texts)), self.length_N)
        self.place_W = np.arange(len(flat)) - self.start_N[self.row_W]
        self.code_W = np.fromiter((index[word] for word in flat), np.int64, len(flat))
        self.words = np.array([*vocabulary, mask_token], dtype=object)
        self.cumulated = np.cumsum(np.bincount(self.code_W, minlength=len(vocabulary)))

    def changed(self, key_N: np.ndarray, settings: Augment, kept_N: np.ndarray) -> list[str]:
        """The texts, each changed by its key; those of `kept_N`, and those in which nothing changes, as they are."""
        key_W = _hash(key_N[self.row_W], self.place_W.astype(np.uint64))
        what_W = _uniform(_hash(key_W, 0))
        drawn_W = np.searchsorted(self.cumulated, _uniform(_hash(key_W, 1)) * len(self.code_W), side="right")
        replaced_W = what_W < settings.mask + settings.replace
        code_W = np.where(replaced_W, drawn_W, self.code_W)
        code_W[what_W < settings.mask] = len(self.words) - 1

        cut_N = _uniform(_hash(key_N, 2)) < settings.ngram
        size_N = 1 + np.floor(_uniform(_hash(key_N, 3)) * _LONGEST_NGRAM).astype(np.int64)
        size_N = np.where(cut_N, np.minimum(size_N, self.length_N), self.length_N)
        start_N = self.start_N + np.floor(
            _uniform(_hash(key_N, 4)) * (self.length_N - size_N + 1)
        ).astype(np.int64)  # fmt: skip

        other_N = np.bincount(self.row_W[code_W != self.code_W], minlength=len(self.texts)) > 0
        same_N = kept_N | ~(other_N | (size_N < self.length_N))
        words = self.words[code_W].tolist()
        return [
            text if same else " ".join(words[start : start + size])
            for text, same, start, size in zip(
                self.texts, same_N.tolist(), start_N.tolist(), size_N.tolist(), strict=True
            )
        ]


def _hash(x: np.ndarray, salt: int | np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser of uint64 values and a salt: an independent stream for each salt."""
    x = x ^ ((np.asarray(salt, np.uint64) + np.uint64(1)) * _GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(x: np.ndarray) -> np.ndarray:
    """uint64 -> [0, 1)."""
    return (x >> np.uint64(11)) * 2.0**-53
