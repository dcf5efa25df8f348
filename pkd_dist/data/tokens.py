"""Examples -> flat arrays of token ids on disk, with a digest.

A token set is a folder of `.npy` files that are read by memory map:

    input_ids.npy  int32 (T,)     all tokens, example after example
    type_ids.npy   uint8 (T,)     only where the tokenizer makes token types
    offsets.npy    int64 (N+1,)   example i owns tokens offsets[i]:offsets[i+1]
    ids.npy        int64 (N,)     example ids, see `text.py`
    labels.npy     int64 or float32 (N,)
    meta.json      digest and counts, written last
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pkd_dist.data.text import Split
from pkd_dist.files import write_atomically, write_json

_CHUNK = 8192


@dataclass(frozen=True)
class TokenSet:
    """One tokenised split; see the head of this module for shapes and dtypes.

    Attributes:
        digest: changes with any token, id, label or their order.
        input_digest: of ids and tokens alone, whatever their order: what a teacher's answers depend on.
        truncated: number of examples that were cut to the maximal length.
    """

    input_ids_T: np.ndarray
    type_ids_T: np.ndarray | None
    offsets_N1: np.ndarray
    ids_N: np.ndarray
    labels_N: np.ndarray
    digest: str
    input_digest: str
    truncated: int

    def __len__(self) -> int:
        return len(self.ids_N)

    @property
    def lengths_N(self) -> np.ndarray:
        return np.diff(self.offsets_N1)

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of some examples, without a look at the others."""
        return np.asarray(self.offsets_N1[rows + 1] - self.offsets_N1[rows])


def tokenize(
    split: Split, tokenizer: Any, max_length: int, folder: Path, check: Callable[[], None] = lambda: None
) -> TokenSet:
    """Tokenises a split into `folder` and opens it.

    Args:
        tokenizer: a Hugging Face tokenizer; a pair of columns becomes a pair of segments.
        max_length: tokens, special ones included.
        check: called now and then; what it raises ends the work.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    lengths: list[int] = []
    typed = "token_type_ids" in tokenizer.model_input_names
    truncated = 0
    for start in range(0, len(split), _CHUNK):
        check()
        chunk = [column[start : start + _CHUNK] for column in split.texts]
        full = tokenizer(*chunk, truncation=False, return_attention_mask=False, verbose=False)
        cut = (
            tokenizer(*chunk, truncation=True, max_length=max_length, return_attention_mask=False)
            if any(len(x) > max_length for x in full["input_ids"])
            else full
        )
        truncated += sum(map(operator.ne, map(len, full["input_ids"]), map(len, cut["input_ids"])))
        lengths += map(len, cut["input_ids"])
        ids.append(_flat(cut["input_ids"], np.int32))
        if typed:
            types.append(_flat(cut["token_type_ids"], np.uint8))
    arrays = {
        "input_ids": np.concatenate(ids),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "ids": split.ids_N,
        "labels": split.labels_N,
    }
    if typed:
        arrays["type_ids"] = np.concatenate(types)
    for name, array in arrays.items():
        write_atomically(folder / f"{name}.npy", partial(_save, array=array))
    meta = {
        "digest": _digest(arrays),
        "input_digest": _input_digest(arrays),
        "truncated": truncated,
        "examples": len(split),
    }
    write_json(folder / "meta.json", meta | {"tokens": int(arrays["offsets"][-1])})
    return open_tokens(folder)


def _flat(lists: list[list[int]], dtype: Any) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(lists), dtype, sum(map(len, lists)))


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()[:16]


def _input_digest(arrays: dict[str, np.ndarray]) -> str:
    """Sum modulo 2^128 of a hash of each (id, tokens, types): the same for any order of the examples."""
    total = 0
    offsets = arrays["offsets"]
    for i, start, stop in zip(range(len(offsets) - 1), offsets[:-1], offsets[1:], strict=True):
        content = arrays["ids"][i].tobytes() + arrays["input_ids"][start:stop].tobytes()
        if "type_ids" in arrays:
            content += arrays["type_ids"][start:stop].tobytes()
        total += int.from_bytes(hashlib.blake2b(content, digest_size=16).digest(), "little")
    return f"{total % (1 << 128):032x}"[:16]


def _map(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in ("input_ids", "type_ids", "offsets", "ids", "labels")
        if (folder / f"{name}.npy").exists()
    }


def problem(folder: Path) -> str | None:
    """Why a token set cannot be used, in words; None where it is what was written."""
    if not (folder / "meta.json").is_file():
        return f"{folder / 'meta.json'} is missing"
    try:
        intact = json.loads((folder / "meta.json").read_text())["digest"] == _digest(_map(folder))
    except (ValueError, OSError, EOFError):
        intact = False
    return None if intact else f"{folder} was altered"


def open_tokens(folder: Path) -> TokenSet:
    """Opens a token set by memory map: its memory use does not grow with the number of examples."""
    meta, arrays = json.loads((folder / "meta.json").read_text()), _map(folder)
    return TokenSet(
        arrays["input_ids"],
        arrays.get("type_ids"),
        arrays["offsets"],
        arrays["ids"],
        arrays["labels"],
        meta["digest"],
        meta["input_digest"],
        meta["truncated"],
    )
