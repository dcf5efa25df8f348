"""More text out of the training text, in the manner of Tang et al. 2019 (arXiv 1903.12136, section 4.2.1).

Per copy of an example, each word becomes the mask token with probability `mask`, or with probability `replace` a word drawn
from the frequencies of the words in that column of the training text; then with probability `ngram` only a random run of 1
to 5 words is kept. Of a pair the first text, the second or both are changed, drawn evenly. The paper replaces a word by one
of the same part of speech; drawing from the frequencies alone takes the place of that here, so that no tagger is needed.

All draws are hashes of (seed, example id, copy, column, word): a copy depends on nothing else but the frequencies, so
neither on the order of the examples nor on how many copies there are.

Shapes: N examples, W words of all of them; b and w of a block of examples, which is what is at work at a time.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from pkd_dist.config.schema import Augment
from pkd_dist.data.columns import TextColumn
from pkd_dist.data.text import Split, example_ids, unlabelled, without
from pkd_dist.errors import UserError

_LONGEST_NGRAM = 5
_BLOCK = 4096
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
    made = tuple(TextColumn() for _ in columns)
    with np.errstate(over="ignore"):  # hashes wrap around
        for copy in range(settings.copies):
            for start in range(0, len(split), _BLOCK):
                key_b = _hash(_hash(split.ids_N[start : start + _BLOCK].view(np.uint64), settings.seed), copy)
                changed_b = np.floor(_uniform(_hash(key_b, 0)) * 3)  # of a pair: 0 the first, 1 the second, 2 both
                for i, column in enumerate(columns):
                    kept_b = (changed_b == 1 - i) & (len(columns) == 2)
                    made[i].extend(column.changed(start, _hash(key_b, 1 + i), settings, kept_b))
    labels = unlabelled(len(made[0]), split.labels_N.dtype.kind == "f")
    return without(Split(example_ids(made), made, labels, split.classes, f"{split.source}, augmented"), split)


class _Column:
    """One text column as word codes."""

    def __init__(self, texts: Sequence[str], mask_token: str):
        codes: dict[str, int] = {}
        lengths, code_W = array("i"), array("i")
        for text in texts:
            words = text.split()
            lengths.append(len(words))
            code_W.extend([codes.setdefault(word, len(codes)) for word in words])
        vocabulary = sorted(codes)  # the same for any order of the examples
        place = np.empty(len(codes), np.int32)
        place[[codes[word] for word in vocabulary]] = np.arange(len(codes), dtype=np.int32)
        self.texts = texts
        self.start_N1 = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.code_W = place[np.frombuffer(code_W, np.int32)]
        self.words = np.array([*vocabulary, mask_token], dtype=object)
        self.cumulated = np.cumsum(np.bincount(self.code_W, minlength=len(vocabulary)))

    def changed(self, first: int, key_b: np.ndarray, settings: Augment, kept_b: np.ndarray) -> Iterator[str]:
        """The texts of a block that begins with the example `first`, each changed by its key; those of `kept_b`, and those
        in which nothing changes, as they are."""
        start_b1 = self.start_N1[first : first + len(key_b) + 1]
        own_w = self.code_W[start_b1[0] : start_b1[-1]]
        start_b, length_b = start_b1[:-1] - start_b1[0], np.diff(start_b1)
        row_w = np.repeat(np.arange(len(key_b)), length_b)
        place_w = np.arange(len(own_w)) - start_b[row_w]

        key_w = _hash(key_b[row_w], place_w.astype(np.uint64))
        what_w = _uniform(_hash(key_w, 0))
        drawn_w = np.searchsorted(self.cumulated, _uniform(_hash(key_w, 1)) * len(self.code_W), side="right")
        replaced_w = what_w < settings.mask + settings.replace
        code_w = np.where(replaced_w, drawn_w, own_w)
        code_w[what_w < settings.mask] = len(self.words) - 1

        cut_b = _uniform(_hash(key_b, 2)) < settings.ngram
        size_b = 1 + np.floor(_uniform(_hash(key_b, 3)) * _LONGEST_NGRAM).astype(np.int64)
        size_b = np.where(cut_b, np.minimum(size_b, length_b), length_b)
        start_b = start_b + np.floor(_uniform(_hash(key_b, 4)) * (length_b - size_b + 1)).astype(np.int64)

        other_b = np.bincount(row_w[code_w != own_w], minlength=len(key_b)) > 0
        same_b = kept_b | ~(other_b | (size_b < length_b))
        words = self.words[code_w].tolist()
        texts = self.texts[first : first + len(key_b)]
        for text, same, start, size in zip(texts, same_b.tolist(), start_b.tolist(), size_b.tolist(), strict=True):
            yield text if same else " ".join(words[start : start + size])


def _hash(x: np.ndarray, salt: int | np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser of uint64 values and a salt: an independent stream for each salt."""
    x = x ^ ((np.asarray(salt, np.uint64) + np.uint64(1)) * _GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(x: np.ndarray) -> np.ndarray:
    """uint64 -> [0, 1)."""
    return (x >> np.uint64(11)) * 2.0**-53
