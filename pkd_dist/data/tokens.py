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
    typed = "token_type_ids" in tokenizer.model_input_names
    remove(folder / "type_ids.npy")  # another tokenizer's
    lengths: list[np.ndarray] = []
    truncated = total = 0
    with contextlib.ExitStack() as files:
        add_ids = files.enter_context(_appending(folder / "input_ids.npy", np.int32))
        add_types = files.enter_context(_appending(folder / "type_ids.npy", np.uint8)) if typed else None
        for start in range(0, len(split), _CHUNK):
            check()
            rows = slice(start, start + _CHUNK)
            ids, types, cut = _encoded(tokenizer, [column[rows] for column in split.texts], typed, max_length)
            lengths.append(np.fromiter(map(len, ids), np.int64, len(ids)))
            truncated += cut
            arrays = [_flat(ids, np.int32)]
            add_ids(arrays[0])
            if add_types:
                arrays.append(_flat(types, np.uint8))
                add_types(arrays[1])
            total += _sum_of_hashes(split.ids_N[rows], arrays, lengths[-1])
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
    tokenizer: Any, columns: Sequence[Sequence[str]], typed: bool, max_length: int
) -> tuple[list[list[int]], list[list[int]], int]:
    """Token ids and types (none where they are not asked for) of each text or pair, and how many were cut."""
    ids, types = _uncut(tokenizer, columns, typed)
    long = [row for row, tokens in enumerate(ids) if len(tokens) > max_length]
    if long:
        texts = [[column[row] for row in long] for column in columns]
        cut = tokenizer(*texts, truncation=True, max_length=max_length, return_attention_mask=False)
        for place, row in enumerate(long):
            ids[row] = cut["input_ids"][place]
            if typed:
                types[row] = cut["token_type_ids"][place]
    return ids, types, len(long)


def _uncut(tokenizer: Any, columns: Sequence[Sequence[str]], typed: bool) -> tuple[list[list[int]], list[list[int]]]:
    from transformers import PreTrainedTokenizerFast as Fast

    own = type(tokenizer)
    if own.__call__ is Fast.__call__ and getattr(own, "_encode_plus", None) is Fast._encode_plus:
        backend = tokenizer.backend_tokenizer  # the call also makes offsets, and wraps each text: half more time
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
        made = backend.encode_batch_fast(columns[0] if len(columns) == 1 else list(zip(*columns, strict=True)))
        return [tokens.ids for tokens in made], [tokens.type_ids for tokens in made] if typed else []
    full = tokenizer(*columns, truncation=False, return_attention_mask=False, verbose=False)
    return full["input_ids"], full["token_type_ids"] if typed else []


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
