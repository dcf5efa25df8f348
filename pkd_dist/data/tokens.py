"""Examples -> flat arrays of token ids on disk, with a digest.

A token set is a folder of `.npy` files that are read by memory map:

    input_ids.npy  int32 (T,)     all tokens, example after example
    type_ids.npy   uint8 (T,)     only where the tokenizer makes token types
    offsets.npy    int64 (N+1,)   example i owns tokens offsets[i]:offsets[i+1]
    ids.npy        int64 (N,)     example ids, see `text.py`
    labels.npy     int64 or float32 (N,)
    meta.json      digest and counts, written last

Texts are tokenised in chunks, whose tokens go to the files at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pkd_dist.data.text import Split
from pkd_dist.files import remove, write_atomically, write_json, written_atomically

_CHUNK = 2048


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
    kinds: dict[str, Any] = {"input_ids": np.int32}
    if "token_type_ids" in tokenizer.model_input_names:
        kinds["type_ids"] = np.uint8
    lengths: list[np.ndarray] = []
    truncated = total = 0
    with contextlib.ExitStack() as files:
        appends = [files.enter_context(_appending(folder / f"{name}.npy", dtype)) for name, dtype in kinds.items()]
        for start in range(0, len(split), _CHUNK):
            check()
            rows = slice(start, start + _CHUNK)
            made, cut = _encoded(tokenizer, [column[rows] for column in split.texts], len(kinds), max_length)
            arrays = [_flat(lists, dtype) for lists, dtype in zip(made, kinds.values(), strict=True)]
            for append, array in zip(appends, arrays, strict=True):
                append(array)
            lengths.append(np.fromiter(map(len, made[0]), np.int64, len(made[0])))
            truncated += cut
            total += _sum_of_hashes(split.ids_N[rows], arrays, lengths[-1])
    if "type_ids" not in kinds:
        remove(folder / "type_ids.npy")  # another tokenizer's
    whole = {"offsets": np.cumsum(np.concatenate([[0], *lengths])), "ids": split.ids_N, "labels": split.labels_N}
    for name, array in whole.items():
        write_atomically(folder / f"{name}.npy", partial(_save, array=array))
    meta = {
        "digest": _digest(_map(folder)),
        "input_digest": f"{total % (1 << 128):032x}"[:16],
        "truncated": truncated,
        "examples": len(split),
    }
    write_json(folder / "meta.json", meta | {"tokens": int(whole["offsets"][-1])})
    return open_tokens(folder)


def _encoded(
    tokenizer: Any, columns: Sequence[Sequence[str]], kinds: int, max_length: int
) -> tuple[list[list[list[int]]], int]:
    """What `_called` makes of each text or pair, cut to the maximal length; and how many were cut."""
    made = _called(tokenizer, columns, kinds)
    long = [row for row, tokens in enumerate(made[0]) if len(tokens) > max_length]
    if long:
        texts = [[column[row] for row in long] for column in columns]
        for whole, cut in zip(made, _called(tokenizer, texts, kinds, max_length), strict=True):
            for row, tokens in zip(long, cut, strict=True):
                whole[row] = tokens
    return made, len(long)


def _called(
    tokenizer: Any, columns: Sequence[Sequence[str]], kinds: int, max_length: int | None = None
) -> list[list[list[int]]]:
    """Token ids and, of two kinds, types of each text or pair, as the tokenizer's call gives them. Where its class leaves
    that call to a backend, the backend is asked alone: the call has it find where in the text each token stands, too, and
    wraps all it gives, which takes half more time."""
    from transformers import PreTrainedTokenizerFast as Fast

    own = type(tokenizer)
    if own.__call__ is not Fast.__call__ or getattr(own, "_encode_plus", None) is not Fast._encode_plus:
        cut = {"truncation": max_length is not None, "max_length": max_length}
        made = tokenizer(*columns, **cut, return_attention_mask=False, verbose=False)
        return [made[name] for name in ("input_ids", "token_type_ids")[:kinds]]
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    if max_length is not None:
        backend.enable_truncation(max_length, strategy="longest_first", direction=tokenizer.truncation_side)
    backend.encode_special_tokens = tokenizer.split_special_tokens
    encodings = backend.encode_batch_fast(columns[0] if len(columns) == 1 else list(zip(*columns, strict=True)))
    return [[getattr(each, name) for each in encodings] for name in ("ids", "type_ids")[:kinds]]


def _flat(lists: list[list[int]], dtype: Any) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(lists), dtype, sum(map(len, lists)))


@contextlib.contextmanager
def _appending(path: Path, dtype: Any) -> Iterator[Callable[[np.ndarray], None]]:
    """Gives a function that appends to the array of a `.npy` file, which in the end is as `np.save` would write it."""
    about = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
    length = 0
    with written_atomically(path) as temporary, open(temporary, "wb") as file:

        def head() -> None:
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, about | {"shape": (length,)})  # has room for any length

        def append(array: np.ndarray) -> None:
            nonlocal length
            file.write(array.data)
            length += len(array)

        head()
        yield append
        head()


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)


def _sum_of_hashes(ids_B: np.ndarray, arrays: Sequence[np.ndarray], lengths_B: np.ndarray) -> int:
    """The sum of a 128-bit hash of each example's id and tokens: the same for any order of the examples.

    Args:
        arrays: token ids, and types where there are any, of all of them.
    """
    contents = [(array.tobytes(), array.itemsize) for array in arrays]
    hashes = bytearray()
    stop = 0
    for example, length in zip(ids_B, lengths_B.tolist(), strict=True):
        start, stop = stop, stop + length
        content = example.tobytes() + b"".join([array[start * size : stop * size] for array, size in contents])
        hashes += hashlib.blake2b(content, digest_size=16).digest()
    words = np.frombuffer(hashes, "<u4").reshape(-1, 4).sum(axis=0, dtype=np.uint64).tolist()
    return sum(word << (32 * place) for place, word in enumerate(words))


def _digest(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()[:16]


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
