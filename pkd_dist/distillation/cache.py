"""The teacher cache on disk: format, manifest, reader.

    FOLDER/manifest.json              committed last: fingerprint, shapes, and of each shard rows, bytes, sha256, id range
    FOLDER/shard-00000.safetensors    ids (R,) int64 ascending; logits (R, C); states (R, M, H), or (T, M, H) of all
                                      tokens with offsets (R+1,) int64

Shards hold ascending, disjoint ranges of example ids, so a row is found by example id with two binary searches, never by
position. Values are read through a memory map: a reader's memory does not grow with the number of examples.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pkd_dist.errors import UserError
from pkd_dist.files import digest_of, sha256

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_NUMPY = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32, "I64": np.int64}
_BF16 = "BF16"


@dataclass(frozen=True)
class Fingerprint:
    """What a teacher's answers depend on. Two caches with equal fingerprints hold the same values.

    A cache that holds the states of more layers than are needed holds the same values, too.
    """

    teacher: str
    tokenizer: str
    tokens: str
    max_length: int
    layers: tuple[int, ...]
    dtype: str
    precision: str
    states: str

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "layers": list(self.layers)}

    @property
    def digest(self) -> str:
        return digest_of(self.as_json())

    def as_kept(self, manifest: dict[str, Any]) -> Fingerprint:
        """This fingerprint with the layers of a cache that holds at least its own."""
        return replace(self, layers=tuple(manifest["fingerprint"]["layers"]))

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Where a cache of the fingerprint `other` does not hold what this one asks for, in words."""
        mine = self.as_json()
        if set(self.layers) <= set(other.get("layers", ())):
            mine.pop("layers")
        return [
            f"{part} ({other.get(part)}, this run's is {mine[part]})" for part in mine if mine[part] != other.get(part)
        ]


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete cache; None where none was committed.

    Raises:
        UserError: it cannot be read, or is of another format version.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove the folder to build the cache anew") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: has format version {version}, expected {FORMAT_VERSION}; remove the folder to build the cache anew"
        )
    return manifest


def require_fingerprint(folder: Path, manifest: dict[str, Any], expected: Fingerprint) -> None:
    """Raises UserError where a cache is of another teacher, tokenizer, data or setting, and says which."""
    differences = expected.differences(manifest["fingerprint"])
    if differences:
        raise UserError(
            f"{folder}: this cache does not fit, it differs in {'; '.join(differences)}; use another cache.dir or remove this one"
        )


def shard_problem(folder: Path, entry: dict[str, Any], checksum: bool = True) -> str | None:
    """What is wrong with a shard, in words; None where it is as the manifest says."""
    path = folder / entry["file"]
    if not path.is_file():
        return f"{path}: the shard is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path}: the shard has {path.stat().st_size} bytes, the manifest says {entry['bytes']}"
    if checksum and sha256(path) != entry["sha256"]:
        return f"{path}: the shard's checksum is wrong, it was altered or damaged"
    return None


def map_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, str]]:
    """Maps a safetensors file into memory without reading it.

    Returns:
        The arrays (bfloat16 as uint16), their safetensors dtypes, and the file's metadata.
    """
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    # torch's map needs no open file, of which a process may have few; numpy's keeps one for each array
    content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    arrays, dtypes = {}, {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        arrays[name] = content[start:stop].view(_NUMPY[entry["dtype"]]).reshape(entry["shape"])
        dtypes[name] = entry["dtype"]
    return arrays, dtypes, metadata


def _tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.view(torch.bfloat16) if dtype == _BF16 else tensor


class CacheReader:
    """A teacher's answers by example id.

    Args:
        folder: a complete cache.
        expected: the fingerprint that this run needs.
        checksums: also verify these shards' sha256 (their indices); sizes are always checked.

    Raises:
        UserError: no cache, another fingerprint (says which part), or a shard that is missing, short or altered.
    """

    def __init__(self, folder: Path, expected: Fingerprint, checksums: Sequence[int] | None = None):
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder}: holds no complete teacher cache; run the stage `cache` first")
        require_fingerprint(folder, manifest, expected)
        wanted = range(len(manifest["shards"])) if checksums is None else checksums
        for index, entry in enumerate(manifest["shards"]):
            problem = shard_problem(folder, entry, checksum=index in wanted)
            if problem:
                raise UserError(f"{problem}; remove the file to have this shard built again")
        kept = manifest["fingerprint"]["layers"]
        self._places = [kept.index(layer) for layer in expected.layers]
        self.rows: int = manifest["rows"]
        self.by_token: bool = manifest["fingerprint"]["states"] == "tokens"
        self._shards = [map_tensors(folder / entry["file"])[:2] for entry in manifest["shards"]]
        self._first = np.array([int(entry["first_id"]) for entry in manifest["shards"]], dtype=np.int64)

    @property
    def some_id(self) -> np.ndarray:
        """One example's id, (1,)."""
        return self._first[:1]

    def rows_of(self, ids_B: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, C) and states (B, M, H), or (B, length, M, H) of token states with padding 0, as stored; M are the
        layers of the fingerprint that was expected.

        Raises:
            UserError: an example that the cache does not hold.
        """
        shard_B = np.searchsorted(self._first, ids_B, side="right") - 1
        logits: torch.Tensor | None = None
        states: torch.Tensor | None = None
        for shard in np.unique(shard_B):
            arrays, dtypes = self._shards[max(0, int(shard))]
            here = np.flatnonzero(shard_B == shard)
            rows = np.minimum(np.searchsorted(arrays["ids"], ids_B[here]), len(arrays["ids"]) - 1)
            if shard < 0 or (arrays["ids"][rows] != ids_B[here]).any():
                raise UserError("the teacher cache lacks an example of this data set; run the stage `cache` again")
            part = _tensor(arrays["logits"][rows], dtypes["logits"])
            hidden = (
                self._token_states(arrays, dtypes, rows, length)
                if self.by_token
                else _tensor(arrays["states"][rows[:, None], self._places], dtypes["states"])
            )
            if logits is None or states is None:
                logits = part.new_empty((len(ids_B), *part.shape[1:]))
                states = hidden.new_empty((len(ids_B), *hidden.shape[1:]))
            logits[here], states[here] = part, hidden
        assert logits is not None and states is not None
        return logits, states

    def _token_states(
        self, arrays: dict[str, np.ndarray], dtypes: dict[str, str], rows: np.ndarray, length: int
    ) -> torch.Tensor:
        width = arrays["states"].shape[-1]
        out = np.zeros((len(rows), length, len(self._places), width), dtype=arrays["states"].dtype)
        for i, row in enumerate(rows):
            start, stop = arrays["offsets"][row : row + 2]
            out[i, : stop - start] = arrays["states"][start:stop, self._places]
        return _tensor(out, dtypes["states"])
