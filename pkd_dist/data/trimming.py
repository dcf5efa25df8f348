"""Cut a tokenizer down to the tokens in use, so that a student needs no embedding of the others.

token counts -> kept_ids -> trim (a Hugging Face folder, loaded again) -> require_exact

Kept are the tokens that occur often enough, special and added tokens, and every single character of the vocabulary in each of
its forms, so that any text can still be encoded. A text of kept tokens alone is split as before: WordPiece takes the longest
match and Unigram the most likely path, and both are still there; BPE repeats the same merges, whose parts are kept too. Tokens
keep their order, and their new ids have no gaps.

Shapes: V token ids before, K kept ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pkd_dist.data.tokens import TokenSet
from pkd_dist.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_KEY = "student.vocabulary"
_KEPT = "kept.npy"
"""Beside a trimmed tokenizer: the ids that its tokens had before, int64 (K,)."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""A byte of a character that has no token of its own, where the tokenizer falls back to bytes."""
_Model = dict[str, Any]
"""The `model` of tokenizer.json."""


def count_tokens(arrays: Iterable[np.ndarray], size: int) -> np.ndarray:
    """Return how often each token id occurs, int64 (V,)."""
    counts_V = np.zeros(size, np.int64)
    for array in arrays:
        for start in range(0, len(array), 1 << 20):
            counts_V += np.bincount(array[start : start + (1 << 20)], minlength=size)
    return counts_V


def require_trimmable(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that a tokenizer's vocabulary can be cut.

    Raises:
        UserError: It is of another kind than WordPiece, BPE and Unigram.
    """
    why = _obstacle(tokenizer)
    if why:
        raise UserError(
            f"used is not possible: the teacher's tokenizer {why}; WordPiece, BPE and Unigram tokenizers with a "
            "tokenizer.json can be cut; use all",
            _KEY,
        )


def _obstacle(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return why a tokenizer cannot be cut; None if it can."""
    if not tokenizer.is_fast:
        return f"({type(tokenizer).__name__}) runs in Python and has no tokenizer.json"
    model = _content(tokenizer)["model"]
    kind = model.get("type")
    if kind not in ("WordPiece", "BPE", "Unigram"):
        return f"is of the kind {kind}, which does not spell words from pieces"
    if kind == "BPE" and (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
        return "is a BPE that marks where a word continues or ends"
    return None


def _content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what a tokenizer's tokenizer.json holds."""
    return cast("dict[str, Any]", json.loads(cast("PreTrainedTokenizerFast", tokenizer).backend_tokenizer.to_str()))


# ---------------------------------------------------------------------------------------------------- which are kept


def kept_ids(
    tokenizer: PreTrainedTokenizerBase, counts_V: np.ndarray, min_count: int, required: Iterable[int]
) -> np.ndarray:
    """Return the ids of the tokens to keep, ascending, int64 (K,).

    Args:
        tokenizer: One that `require_trimmable` accepts.
        counts_V: How often each id occurs.
        min_count: How often a token must occur to be kept for that.
        required: Ids to keep in any case, where they are tokens.
    """
    content, ids = _content(tokenizer), tokenizer.get_vocab()
    model = content["model"]
    names = {id_: token for token, id_ in ids.items()}
    always = {*required, *tokenizer.all_special_ids, *(token["id"] for token in content["added_tokens"])}
    kept = {names[id_] for id_ in {*np.flatnonzero(counts_V >= min_count).tolist(), *always} if id_ in names}
    kept |= set(_characters(model))
    if model["type"] == "BPE":
        ranks = {_pair(merge): rank for rank, merge in enumerate(model["merges"])}
        kept |= {part for token in list(kept) for part in _derivation(token, ranks) if part in ids}
    if model["type"] == "Unigram":
        kept.add(min(model["vocab"], key=lambda piece: piece[1])[0])  # the cost of an unknown character follows from it
    return np.sort(np.array([ids[token] for token in kept], np.int64))


def _characters(model: _Model) -> Iterator[str]:
    """Yield the tokens of one character or byte, and those that hold a character without a token of its own."""
    prefix = model.get("continuing_subword_prefix") or ""
    tokens = [piece[0] for piece in model["vocab"]] if model["type"] == "Unigram" else list(model["vocab"])
    if model["type"] == "BPE":
        yield from (token for token in tokens if len(token) == 1)
    else:
        single = {token for token in tokens if len(_forms(token, prefix)) == 1}
        yield from (token for token in tokens if token in single or not single.issuperset(_forms(token, prefix)))
    if model.get("byte_fallback"):
        yield from filter(_BYTE.fullmatch, tokens)


def _forms(token: str, prefix: str) -> list[str]:
    """Return the tokens of one character each that spell a token; `prefix` marks those that continue a word."""
    continues = bool(prefix) and token.startswith(prefix) and token != prefix
    characters = token.removeprefix(prefix) if continues else token
    return [prefix + c if continues or i else c for i, c in enumerate(characters)]


def _pair(merge: str | list[str]) -> tuple[str, str]:
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def _derivation(token: str, ranks: dict[tuple[str, str], int]) -> Iterator[str]:
    """Yield what a BPE makes on its way to a token: merges beside it do not change the order of those within."""
    parts = list(token)
    while True:
        found = [
            (rank, i)
            for i, pair in enumerate(zip(parts, parts[1:], strict=False))
            if (rank := ranks.get(pair)) is not None
        ]
        if not found:
            return
        at = min(found)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
        yield parts[at]


# ----------------------------------------------------------------------------------------------------------- the cut


def trim(tokenizer: PreTrainedTokenizerBase, kept_K: np.ndarray, folder: Path) -> PreTrainedTokenizerBase:
    """Write a tokenizer of the kept tokens alone and its `kept_K`; return it as plain `transformers` loads it.

    The id of a token becomes its place in `kept_K`.

    Raises:
        UserError: What is loaded is not what was written.
    """
    from transformers import AutoTokenizer

    names = {id_: token for token, id_ in tokenizer.get_vocab().items()}
    new_ids = {names[id_]: new for new, id_ in enumerate(kept_K.tolist())}
    content = _content(tokenizer)
    _cut_model(content["model"], new_ids)
    for token in content["added_tokens"]:
        token["id"] = new_ids[token["content"]]
    if content.get("padding"):
        content["padding"]["pad_id"] = new_ids[content["padding"]["pad_token"]]
    _renumber(content.get("post_processor"), new_ids)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():  # vocab.txt and the like hold the full vocabulary
        if path.name not in ("tokenizer_config.json", "special_tokens_map.json"):
            path.unlink()
    _renumber_added(folder / "tokenizer_config.json", new_ids)
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    np.save(folder / _KEPT, kept_K)
    try:
        trimmed = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        same = trimmed.get_vocab() == new_ids
    except Exception:  # transformers raises many types
        same = False
    if not same:
        raise UserError(
            f"used is not possible: {type(tokenizer).__name__} does not load a part of its vocabulary; use all", _KEY
        )
    return cast("PreTrainedTokenizerBase", trimmed)


def read_kept(folder: Path) -> np.ndarray:
    """Return `kept_K` of the trimmed tokenizer in a folder."""
    kept_K: np.ndarray = np.load(folder / _KEPT, allow_pickle=False)
    return kept_K


def _cut_model(model: _Model, new_ids: dict[str, int]) -> None:
    """Leave the kept tokens in a model, in place."""
    if model["type"] == "Unigram":
        unknown = model["unk_id"]
        model["unk_id"] = None if unknown is None else new_ids[model["vocab"][unknown][0]]
        model["vocab"] = [piece for piece in model["vocab"] if piece[0] in new_ids]
        return
    model["vocab"] = {token: new_ids[token] for token in model["vocab"] if token in new_ids}
    if model["type"] == "BPE":
        pairs = [(merge, _pair(merge)) for merge in model["merges"]]
        model["merges"] = [merge for merge, (a, b) in pairs if {a, b, a + b} <= new_ids.keys()]


def _renumber(processor: dict[str, Any] | None, new_ids: dict[str, int]) -> None:
    """Give the special tokens that a post-processor adds their new ids, in place."""
    for inner in (processor or {}).get("processors", ()):
        _renumber(inner, new_ids)
    for name in ("sep", "cls"):
        if processor and name in processor:
            processor[name][1] = new_ids[processor[name][0]]
    for special in ((processor or {}).get("special_tokens") or {}).values():
        special["ids"] = [new_ids[token] for token in special["tokens"]]


def _renumber_added(path: Path, new_ids: dict[str, int]) -> None:
    """Give the added tokens in a tokenizer_config.json, where it lists them, their new ids."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    if added := settings.get("added_tokens_decoder"):
        settings["added_tokens_decoder"] = {str(new_ids[token["content"]]): token for token in added.values()}
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require_exact(full: TokenSet, trimmed: TokenSet, kept_K: np.ndarray, unknown: int | None) -> None:
    """Check that texts of kept tokens alone are split as before, and that no text has more unknown tokens.

    Args:
        full, trimmed: The same examples in both tokenizers.
        unknown: The id of the unknown token before; None if there is none.

    Raises:
        UserError: They are not.
    """
    new_T = np.searchsorted(kept_K, full.input_ids_T)
    new_T[kept_K[np.minimum(new_T, len(kept_K) - 1)] != full.input_ids_T] = -1
    kept_N = np.minimum.reduceat(new_T, full.offsets_N1[:-1]) >= 0  # of multiple choice, N is the number of all options
    full_N, trimmed_N = np.diff(full.offsets_N1), np.diff(trimmed.offsets_N1)
    same = np.array_equal(full_N[kept_N], trimmed_N[kept_N]) and np.array_equal(
        new_T[np.repeat(kept_N, full_N)], trimmed.input_ids_T[np.repeat(kept_N, trimmed_N)]
    )
    if same and unknown is not None:
        before_N, after_N = (
            np.add.reduceat(tokens.input_ids_T == id_, tokens.offsets_N1[:-1], dtype=np.int64)
            for tokens, id_ in ((full, unknown), (trimmed, np.searchsorted(kept_K, unknown)))
        )
        same = bool((after_N <= before_N).all())
    if not same:
        raise UserError(
            "used is not possible: with a part of its vocabulary, the teacher's tokenizer splits texts differently that need "
            "no other; use all",
            _KEY,
        )
