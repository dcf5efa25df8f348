"""Make new text from the training text, after Tang et al. 2019 (arXiv 1903.12136, section 4.2.1).

In each copy of an example, every word becomes the mask token with probability `mask`, with probability `replace` a word
drawn from the word frequencies of the column, or with probability `neighbours` one of its nearest words (`neighbours.py`).
Then, with probability `ngram`, only a random run of 1 to 5 words is kept. Of a pair, the first text, the second or both are
changed with equal probability. The paper replaces a word by one of the same part of speech; `replace` draws by frequency
alone, which needs no tagger.

All random draws are hashes of (seed, example id, copy, column, word), so a copy depends only on these, on the frequencies
and on the table of neighbours: not on the order of the examples, and not on the number of copies.

Shapes: N examples, W words of all examples; b examples and w words of one block, the unit of work.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from pkd_dist.config.task import Augment
from pkd_dist.data.examples import NewTexts, Split, unlabelled_like
from pkd_dist.data.neighbours import Neighbours
from pkd_dist.errors import UserError

_LONGEST_NGRAM = 5
_BLOCK_EXAMPLES = 4096
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


MakeNeighbours = Callable[[Iterable[str]], Neighbours]
"""Returns the neighbours of the words of a text."""


def augment(
    split: Split,
    settings: Augment,
    mask_token: str | None,
    make_neighbours: MakeNeighbours | None = None,
    others: Sequence[Split] = (),
) -> Split:
    """Return new, unlabeled texts made from a split. Repeats and texts of the split itself and of others are removed and
    counted in the notes. Memory does not grow with the number of copies but by a few numbers per new text.

    Args:
        split: the training split.
        settings: `task.augment`.
        mask_token: the tokenizer's; None if it has none.
        make_neighbours: called only if `neighbours` is set.
        others: more splits whose texts are removed.

    Raises:
        UserError: `mask` is set but there is no mask token, or no new text results.
    """
    if settings.mask and mask_token is None:
        raise UserError("task.augment.mask: the teacher's tokenizer has no mask token; set it to 0")
    columns = [_WordColumn(texts, mask_token or "") for texts in split.texts]
    if settings.neighbours:
        assert make_neighbours is not None
        neighbours = make_neighbours(word for column in columns for word in column.vocabulary)
        for column in columns:
            column.use(neighbours)
    new = NewTexts(len(columns), (split, *others))
    with np.errstate(over="ignore"):  # hashes wrap around
        for copy in range(settings.copies_of(len(split))):
            for start in range(0, len(split), _BLOCK_EXAMPLES):
                key_b = _hash(_hash(split.ids_N[start : start + _BLOCK_EXAMPLES].view(np.uint64), settings.seed), copy)
                choice_b = np.floor(_uniform(_hash(key_b, 0)) * 3)  # which text of a pair: 0 first, 1 second, 2 both
                texts = []
                for i, column in enumerate(columns):
                    keep_b = (choice_b == 1 - i) & (len(columns) == 2)
                    texts.append(list(column.vary(start, _hash(key_b, 1 + i), settings, keep_b)))
                new.add(texts)
    source = f"{split.source}, augmented"
    notes, ids_N = new.notes(source), np.frombuffer(new.ids, np.int64)
    labels_N = unlabelled_like(split.labels_N, len(ids_N))
    return Split(ids_N, new.texts, labels_N, split.classes, source, notes)


class _WordColumn:
    """One text column as word codes."""

    def __init__(self, texts: Sequence[str], mask_token: str):
        codes: dict[str, int] = {}
        lengths, code_W = array("i"), array("i")
        for text in texts:
            words = text.split()
            lengths.append(len(words))
            code_W.extend([codes.setdefault(word, len(codes)) for word in words])
        vocabulary = sorted(codes)  # independent of the order of the examples
        sorted_code = np.empty(len(codes), np.int32)
        sorted_code[[codes[word] for word in vocabulary]] = np.arange(len(codes), dtype=np.int32)
        self.texts = texts
        self.start_N1 = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self.code_W = sorted_code[np.frombuffer(code_W, np.int32)]
        self.words = np.array([*vocabulary, mask_token], dtype=object)
        self.cumulative_counts = np.cumsum(np.bincount(self.code_W, minlength=len(vocabulary)))
        self.neighbours: Neighbours | None = None

    @property
    def vocabulary(self) -> list[str]:
        """The words that occur, sorted."""
        return self.words[:-1].tolist()

    def use(self, neighbours: Neighbours) -> None:
        """Set the neighbours of the words, before `vary`."""
        self.neighbours, self.neighbour_row_V = neighbours, neighbours.rows_of(self.vocabulary)

    def vary(self, first: int, key_b: np.ndarray, settings: Augment, keep_b: np.ndarray) -> Iterator[str]:
        """Yield a variant of each text of a block.

        Args:
            first: index of the block's first example.
            key_b: uint64, one random key per example.
            settings: `task.augment`.
            keep_b: examples whose text is yielded unchanged.
        """
        start_b1 = self.start_N1[first : first + len(key_b) + 1]
        own_w = self.code_W[start_b1[0] : start_b1[-1]]
        start_b, length_b = start_b1[:-1] - start_b1[0], np.diff(start_b1)
        row_w = np.repeat(np.arange(len(key_b)), length_b)
        position_w = np.arange(len(own_w)) - start_b[row_w]

        key_w = _hash(key_b[row_w], position_w.astype(np.uint64))
        chance_w = _uniform(_hash(key_w, 0))
        drawn_w = np.searchsorted(self.cumulative_counts, _uniform(_hash(key_w, 1)) * len(self.code_W), side="right")
        replaced_w = chance_w < settings.mask + settings.replace
        code_w = np.where(replaced_w, drawn_w, own_w)
        code_w[chance_w < settings.mask] = len(self.words) - 1  # the mask token
        words_w = self.words[code_w]
        near_w = ~replaced_w & (chance_w < settings.mask + settings.replace + settings.neighbours)
        near_w = self._substitute(words_w, own_w, near_w, _hash(key_w, 2))

        cut_b = _uniform(_hash(key_b, 2)) < settings.ngram
        size_b = 1 + np.floor(_uniform(_hash(key_b, 3)) * _LONGEST_NGRAM).astype(np.int64)
        size_b = np.where(cut_b, np.minimum(size_b, length_b), length_b)
        start_b = start_b + np.floor(_uniform(_hash(key_b, 4)) * (length_b - size_b + 1)).astype(np.int64)

        changed_b = np.bincount(row_w[(code_w != own_w) | near_w], minlength=len(key_b)) > 0
        same_b = keep_b | ~(changed_b | (size_b < length_b))  # yielded verbatim, with their white space
        words = words_w.tolist()
        texts = self.texts[first : first + len(key_b)]
        for text, same, start, size in zip(texts, same_b.tolist(), start_b.tolist(), size_b.tolist(), strict=True):
            yield text if same else " ".join(words[start : start + size])

    def _substitute(self, words_w: np.ndarray, own_w: np.ndarray, near_w: np.ndarray, key_w: np.ndarray) -> np.ndarray:
        """Replace the words of `near_w` that have neighbours by one of them, in place, and return which these are."""
        if self.neighbours is None:
            return np.zeros_like(near_w)
        row_w = self.neighbour_row_V[own_w]
        near_w = near_w & (row_w >= 0)
        choice_w = np.floor(_uniform(key_w) * self.neighbours.counts[row_w]).astype(np.int64)
        for i in np.flatnonzero(near_w).tolist():
            words_w[i] = self.neighbours.substitute(words_w[i], row_w[i], choice_w[i])
        return near_w


def _hash(x: np.ndarray, salt: int | np.ndarray) -> np.ndarray:
    """Return SplitMix64's finalizer of uint64 values and a salt; each salt gives an independent stream."""
    x = x ^ ((np.asarray(salt, np.uint64) + np.uint64(1)) * _GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _uniform(x: np.ndarray) -> np.ndarray:
    """Map uint64 to floats in [0, 1)."""
    return (x >> np.uint64(11)) * 2.0**-53
