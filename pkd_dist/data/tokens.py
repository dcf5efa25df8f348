"""Tokenize examples into flat arrays on disk.

A token set is a folder of `.npy` files, which are read by memory map:

    input_ids.npy  int32 (T,)     all tokens, example after example
    type_ids.npy   uint8 (T,)     only if the tokenizer has token types
    offsets.npy    int64 (N+1,)   example i has the tokens offsets[i]:offsets[i+1]; of multiple choice (NO+1,), option after option
    ids.npy        int64 (N,)     example ids, see `examples.py`
    labels.npy     int64 or float32 (N,); float32 (N, C) for multi-label
    meta.json      digests and counts, written last

Text is tokenized in chunks, and the tokens of each chunk are written at once.

Shapes: N examples of a set, B of a batch, O options of each example of multiple choice, T tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from pkd_dist.data.examples import Split
from pkd_dist.files import make_folder, read_object, remove, write_atomically, write_json, written_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK_EXAMPLES, _CHUNK_BYTES = 2048, 1 << 20


@dataclass(frozen=True)
class TokenSet:
    """One tokenized split. See the module docstring for shapes and dtypes.

    Attributes:
        digest: of all tokens, ids, labels and their order.
        input_digest: of ids and tokens in any order, which is all that teacher outputs depend on.
        truncated: number of examples truncated to the maximum length.
        rows_N: of a subset, the positions of its examples in `offsets_N1`; None: all. Digests are those of the whole set.
        options: texts of each example that are read on their own: O of multiple choice, else 1.
    """

    input_ids_T: np.ndarray
    type_ids_T: np.ndarray | None
    offsets_N1: np.ndarray
    ids_N: np.ndarray
    labels_N: np.ndarray
    digest: str
    input_digest: str
    truncated: int
    rows_N: np.ndarray | None = None
    options: int = 1

    def __len__(self) -> int:
        return len(self.ids_N)

    @property
    def lengths_N(self) -> np.ndarray:
        """Tokens of each example, or of its longest option, int64 (N,): what it takes in a batch."""
        if self.rows_N is not None:
            return self.lengths_of(np.arange(len(self)))
        lengths = np.diff(self.offsets_N1)
        return lengths if self.options == 1 else np.asarray(lengths.reshape(-1, self.options).max(axis=1))

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Return `lengths_N` of some examples without reading the offsets of the others."""
        lengths = self.spans_of(rows)[1]
        return lengths if lengths.ndim == 1 else np.asarray(lengths.max(axis=1))

    def spans_of(self, rows_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the position of the first token and the number of tokens of some examples, int64 (B,), or (B, O) of their options."""
        positions = rows_B if self.rows_N is None else self.rows_N[rows_B]
        if self.options > 1:
            positions = positions[:, None] * self.options + np.arange(self.options)
        starts = np.asarray(self.offsets_N1[positions])
        return starts, np.asarray(self.offsets_N1[positions + 1]) - starts

    def subset(self, rows_n: np.ndarray) -> TokenSet:
        """Return the examples of some rows, in this order; the tokens are shared."""
        ids_n, labels_n = np.asarray(self.ids_N[rows_n]), np.asarray(self.labels_N[rows_n])
        return replace(
            self, ids_N=ids_n, labels_N=labels_n, rows_N=rows_n if self.rows_N is None else self.rows_N[rows_n]
        )


def tokenize(
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    folder: Path,
    check: Callable[[], None] = lambda: None,
    mask_token: str | None = None,
) -> TokenSet:
    """Tokenize a split into `folder` and open the result.

    Args:
        split: one or two text columns; a pair of texts becomes a pair of segments. Of multiple choice, each option becomes one.
        tokenizer: a Hugging Face tokenizer.
        max_length: in tokens, including special tokens; longer examples are truncated.
        folder: created if missing.
        check: called between chunks; an exception it raises stops the work.
        mask_token: the mask token in these texts, where it is another tokenizer's.
    """
    make_folder(folder)
    dtypes: dict[str, type] = {"input_ids": np.int32}
    if "token_type_ids" in tokenizer.model_input_names:
        dtypes["type_ids"] = np.uint8
    lengths: list[np.ndarray] = []
    truncated = hash_sum = 0
    options = split.options
    with contextlib.ExitStack() as files:
        appends = [files.enter_context(_open_npy(folder / f"{name}.npy", dtype)) for name, dtype in dtypes.items()]
        for start in range(0, len(split), _CHUNK_EXAMPLES):
            check()
            rows = slice(start, start + _CHUNK_EXAMPLES)
            columns = split.inputs(rows)
            if mask_token:
                columns = [
                    [text.replace(mask_token, tokenizer.mask_token or "") for text in column] for column in columns
                ]
            encoded, long = encode(tokenizer, columns, len(dtypes), max_length, only_first=split.choices is not None)
            arrays = [_flatten(lists, dtype) for lists, dtype in zip(encoded, dtypes.values(), strict=True)]
            for append, array in zip(appends, arrays, strict=True):
                append(array)
            lengths.append(np.fromiter(map(len, encoded[0]), np.int32, len(encoded[0])))
            truncated += len({row // options for row in long})
            lengths_B = lengths[-1].reshape(-1, options).sum(axis=1)
            hash_sum += _sum_of_hashes(split.ids_N[rows], arrays, lengths_B)
    if "type_ids" not in dtypes:
        remove(folder / "type_ids.npy")  # left by another tokenizer
    offsets_N1 = np.zeros(len(split) * options + 1, np.int64)
    np.cumsum(np.concatenate(lengths), out=offsets_N1[1:])
    per_example = {"offsets": offsets_N1, "ids": split.ids_N, "labels": split.labels_N}
    for name, array in per_example.items():
        write_atomically(folder / f"{name}.npy", partial(_save_npy, array=array))
    meta = {
        "digest": _digest(folder),
        "input_digest": f"{hash_sum % (1 << 128):032x}"[:16],
        "truncated": truncated,
        "examples": len(split),
        "tokens": int(per_example["offsets"][-1]),
        **({"options": options} if options > 1 else {}),
    }
    write_json(folder / "meta.json", meta)
    return open_tokens(folder)


LONGEST_FIRST, ONLY_FIRST = "longest_first", "only_first"
"""Which text of a pair is truncated: the longer one, token by token, or the first."""
Encoded = list[list[list[int]]]
"""Token ids and, if the tokenizer has them, token types: [kind][example][token]."""


def encode(
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[Sequence[str]],
    kinds: int,
    max_length: int,
    only_first: bool = False,
) -> tuple[Encoded, list[int]]:
    """Return the tokens of each text or pair, truncated to `max_length`, and the rows that were truncated.

    Everything is tokenized in full first, and long examples again with truncation, because truncated output does not show
    whether it was truncated.

    Args:
        only_first: truncate only the first text of a pair, unless the second is too long for that.
    """
    encoded = _call_tokenizer(tokenizer, columns, kinds)
    long = [row for row, tokens in enumerate(encoded[0]) if len(tokens) > max_length]
    excess = {row: len(encoded[0][row]) - max_length for row in long}
    strategies = {LONGEST_FIRST: long}
    if only_first and long:
        firsts = _call_tokenizer(tokenizer, [[columns[0][row] for row in long]], 1, special_tokens=False)[0]
        enough = {row for row, first in zip(long, firsts, strict=True) if len(first) > excess[row]}
        strategies = {ONLY_FIRST: sorted(enough), LONGEST_FIRST: [row for row in long if row not in enough]}
    for strategy, rows in strategies.items():
        if not rows:
            continue
        texts = [[column[row] for row in rows] for column in columns]
        for full, truncated in zip(
            encoded, _call_tokenizer(tokenizer, texts, kinds, max_length, strategy), strict=True
        ):
            for row, tokens in zip(rows, truncated, strict=True):
                full[row] = tokens
    return encoded, long


def _call_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[Sequence[str]],
    kinds: int,
    max_length: int | None = None,
    strategy: str = LONGEST_FIRST,
    special_tokens: bool = True,
) -> Encoded:
    """Return what calling the tokenizer gives for each text or pair.

    If its class leaves the call to the Rust backend, the backend is used directly: the call would also compute character
    offsets and wrap every result, which takes 1.5 times as long.
    """
    from transformers import PreTrainedTokenizerFast as Fast

    own = type(tokenizer)
    if own.__call__ is not Fast.__call__ or getattr(own, "_encode_plus", None) is not Fast._encode_plus:
        result = tokenizer(
            *columns,
            truncation=strategy if max_length is not None else False,
            max_length=max_length,
            add_special_tokens=special_tokens,
            return_attention_mask=False,
            verbose=False,
        )
        return [result[name] for name in ("input_ids", "token_type_ids")[:kinds]]
    backend = cast(Fast, tokenizer).backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    if max_length is not None:
        backend.enable_truncation(max_length, strategy=strategy, direction=tokenizer.truncation_side)
    backend.encode_special_tokens = tokenizer.split_special_tokens
    given = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
    encodings = backend.encode_batch_fast(given, add_special_tokens=special_tokens)
    return [[getattr(encoding, name) for encoding in encodings] for name in ("ids", "type_ids")[:kinds]]


def _flatten(lists: list[list[int]], dtype: type) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(lists), dtype, sum(map(len, lists)))


@contextlib.contextmanager
def _open_npy(path: Path, dtype: type) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that appends to the array of a `.npy` file. The finished file equals that of `np.save`."""
    about = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
    length = 0
    with written_atomically(path) as temporary, open(temporary, "wb") as file:

        def write_header() -> None:
            file.seek(0)
            np.lib.format.write_array_header_1_0(
                file, about | {"shape": (length,)}
            )  # its size is the same for any length

        def append(array: np.ndarray) -> None:
            nonlocal length
            file.write(array.data)
            length += len(array)

        write_header()
        yield append
        write_header()


def _save_npy(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)


def _sum_of_hashes(ids_B: np.ndarray, arrays: Sequence[np.ndarray], lengths_B: np.ndarray) -> int:
    """Return the sum of a 128-bit hash of each example, which is the same for any order of the examples.

    Args:
        ids_B: example ids.
        arrays: flat token ids and, if there are any, token types.
        lengths_B: tokens of each example.
    """
    contents = [(array.tobytes(), array.itemsize) for array in arrays]
    hashes = bytearray()
    stop = 0
    for example, length in zip(ids_B, lengths_B.tolist(), strict=True):
        start, stop = stop, stop + length
        content = example.tobytes() + b"".join([array[start * size : stop * size] for array, size in contents])
        hashes += hashlib.blake2b(content, digest_size=16).digest()
    words = np.frombuffer(hashes, "<u4").reshape(-1, 4).sum(axis=0, dtype=np.uint64).tolist()
    return sum(word << (32 * i) for i, word in enumerate(words))


def _digest(folder: Path) -> str:
    """Return a digest of the arrays' content, read in chunks: the pages of a memory map would count as this process's memory."""
    digest = hashlib.sha256()
    for name, array in sorted(_map(folder).items()):
        digest.update(name.encode())
        with open(folder / f"{name}.npy", "rb") as file:
            file.seek(array.offset)
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def _map(folder: Path) -> dict[str, np.memmap]:
    return {
        name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in ("input_ids", "type_ids", "offsets", "ids", "labels")
        if (folder / f"{name}.npy").exists()
    }


def problem(folder: Path) -> str | None:
    """Return why a token set cannot be used, or None if it is intact."""
    if not (folder / "meta.json").is_file():
        return f"{folder / 'meta.json'} is missing"
    try:
        intact = read_object(folder / "meta.json")["digest"] == _digest(folder)
    except (ValueError, LookupError, OSError, EOFError):
        intact = False
    return None if intact else f"{folder} was altered"


def open_tokens(folder: Path) -> TokenSet:
    """Open a token set by memory map, so that memory use does not grow with the number of examples."""
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
        options=meta.get("options", 1),
    )
