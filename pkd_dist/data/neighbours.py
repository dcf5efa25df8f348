"""The nearest words of a word in an embedding table, for augmentation, after TinyBERT (arXiv 1909.10351, section 3.3).

TinyBERT draws a substitute for a word from the 15 most similar GloVe vectors, or from BERT's predictions for the masked word
where the word is a single token. Here all substitutes come from the teacher's own input embeddings, which need neither a
download nor a forward pass, and the context has no influence. TinyBERT substitutes each word of a copy with probability 0.4,
except stop words; here `task.augment.neighbours` is the probability for any word.

    tokenizer -> whole words -> embeddings of these, of unit length -> the nearest of each word that occurs in the text

The similarities are computed in integers, exactly, so a word has the same neighbours on every machine, whatever other words
occur.

Shapes: V token ids, H embedding size, W whole words of the vocabulary, Q of them that occur.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pkd_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEAREST = 15
_SPARE = 4
"""As many times the neighbours are looked at, because other spellings of a word are among them."""
_UNIT = 2.0**24
"""Length of an embedding whose components are rounded to integers: float32 holds these, float64 the sums of their products."""
_CHUNK_WORDS, _ROWS, _COLUMNS = 4096, 128, 4096


class Neighbours:
    """The nearest words of the words of a text.

    Args:
        tokenizer: the teacher's.
        table_VH: its word embeddings, float32.
        words: all words of the text, as split at white space.

    Attributes:
        counts: int64 (Q,), neighbours of each word that occurs, at most `NEAREST`.

    Raises:
        UserError: no word of the text is a single token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, table_VH: np.ndarray, words: Iterable[str]):
        embedded = set(np.flatnonzero(table_VH.any(axis=1)).tolist())
        spellings = {token: text for token, text in whole_words(tokenizer) if token in embedded}
        found = _tokens_of(tokenizer, {_split(word)[1] for word in words})
        self._token_of = {word: token for word, token in found if token in spellings}
        occurring = sorted(set(self._token_of.values()))
        if not occurring:
            raise UserError(
                "task.augment.neighbours: no word of the training text is a single token of the teacher's vocabulary; set it to 0"
            )
        self._row_of_token = {token: row for row, token in enumerate(occurring)}
        tokens = list(spellings)
        unit_WH = _unit(table_VH[tokens])
        position = {token: i for i, token in enumerate(tokens)}
        nearest = _nearest(unit_WH, np.array([position[token] for token in occurring]))
        self._nearest = [
            list(_other_words(spellings[token], (spellings[tokens[i]] for i in similar.tolist())))
            for token, similar in zip(occurring, nearest, strict=True)
        ]
        self.counts = np.array([len(nearest) for nearest in self._nearest], np.int64)

    def rows_of(self, words: Sequence[str]) -> np.ndarray:
        """Return the row of each word in `counts`, int32; -1: the word has no neighbours."""
        rows = (self._row_of_token.get(self._token_of.get(_split(word)[1], -1), -1) for word in words)
        return np.fromiter((row if row >= 0 and self._nearest[row] else -1 for row in rows), np.int32, len(words))

    def substitute(self, word: str, row: int, choice: int) -> str:
        """Return a word's neighbour number `choice`, with the punctuation and the capital letters of the word."""
        before, core, after = _split(word)
        return before + _cased_like(core, self._nearest[row][choice]) + after


def whole_words(tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[int, str]]:
    """Yield the tokens that are whole words, with their text, in any kind of vocabulary.

    A token is one if its text is alphabetic, and as a word of its own is tokenized as just this token: not `##ing` of a WordPiece
    vocabulary, nor, where the start of a word is marked, tokens that continue one.
    """
    special = set(tokenizer.all_special_ids)
    ids = [token for token in range(len(tokenizer)) if token not in special]
    texts = [str(tokenizer.decode([token])).strip() for token in ids]
    token_of = dict(_tokens_of(tokenizer, {text for text in texts if text.isalpha()}))
    yield from ((token, text) for token, text in zip(ids, texts, strict=True) if token_of.get(text) == token)


def _tokens_of(tokenizer: PreTrainedTokenizerBase, words: set[str]) -> Iterator[tuple[str, int]]:
    """Yield the alphabetic words that are a single token after a space, with this token.

    Single letters are left out: most are parts of contractions (`'s`), which are no words to vary.
    """
    chosen = sorted(word for word in words if len(word) > 1 and word.isalpha())
    for start in range(0, len(chosen), _CHUNK_WORDS):
        chunk = chosen[start : start + _CHUNK_WORDS]
        encoded = tokenizer([f" {word}" for word in chunk], add_special_tokens=False, verbose=False)["input_ids"]
        yield from ((word, tokens[0]) for word, tokens in zip(chunk, encoded, strict=True) if len(tokens) == 1)


def _unit(rows_WH: np.ndarray) -> np.ndarray:
    """Return embeddings of length 2^24, rounded to integers, float32."""
    lengths_W1 = np.sqrt(np.square(rows_WH, dtype=np.float64).sum(axis=1, keepdims=True))
    return np.rint(rows_WH * (_UNIT / lengths_W1)).astype(np.float32)


def _nearest(unit_WH: np.ndarray, query_Q: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the rows that are most similar to each row of `query_Q`, the most similar first; equal ones in ascending order."""
    wanted = min(NEAREST * _SPARE, len(unit_WH))
    for start in range(0, len(query_Q), _ROWS):
        query_qH = unit_WH[query_Q[start : start + _ROWS]].astype(np.float64)
        parts = [
            _product(query_qH, unit_WH[i : i + _COLUMNS].astype(np.float64)) for i in range(0, len(unit_WH), _COLUMNS)
        ]
        for similarity_W in np.concatenate(parts, axis=1):
            best = np.argpartition(-similarity_W, wanted - 1)[:wanted]
            yield best[np.lexsort((best, -similarity_W[best]))]


def _product(query_qH: np.ndarray, unit_wH: np.ndarray) -> np.ndarray:
    """Return (q, w) float64 dot products, with as many threads as torch may use."""
    import torch  # not for `pkd prepare`, which only checks the setting

    return (torch.from_numpy(query_qH) @ torch.from_numpy(unit_wH).T).numpy()


def _other_words(own: str, others: Iterable[str]) -> Iterator[str]:
    """Yield the first `NEAREST` words that are not another spelling of `own` or of an earlier one."""
    seen = {own.casefold()}
    for other in others:
        if other.casefold() not in seen and len(seen) <= NEAREST:
            seen.add(other.casefold())
            yield other


def _split(word: str) -> tuple[str, str, str]:
    """Return the punctuation and symbols before a word, the word without them, and those after it."""
    start, stop = 0, len(word)
    while start < stop and unicodedata.category(word[start])[0] in "PS":
        start += 1
    while stop > start and unicodedata.category(word[stop - 1])[0] in "PS":
        stop -= 1
    return word[:start], word[start:stop], word[stop:]


def _cased_like(word: str, other: str) -> str:
    """Return another word in lower case, in capitals or with a capital first, if the word is so."""
    if word.islower():
        return other.lower()
    if word.isupper():
        return other.upper()
    return other[:1].upper() + other[1:] if word.istitle() else other
