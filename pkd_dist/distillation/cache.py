"""The teacher cache on disk: format, manifest and reader.

    FOLDER/manifest.json              committed last: fingerprint, shapes, and each shard's rows, bytes, sha256 and id range
    FOLDER/shard-00000.safetensors    ids (R,) int64 ascending; logits (R, C); states (R, M, H) of [CLS], (R, C, M, H) of [CLS] of
                                      each option of multiple choice, or (T, M, H) of all tokens with offsets (R+1,) int64

Shards hold ascending, disjoint ranges of example ids. The reader finds a row by its example id with two binary searches,
never by its position. It memory-maps the shards, so its memory does not grow with the number of examples.

Shapes: B examples asked for, R rows of a shard, T tokens of these rows, C classes, M cached layers, H hidden size.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from pkd_dist.errors import UserError
from pkd_dist.files import digest_of, read_object, sha256, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_NUMPY_DTYPES = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32, "I64": np.int64}
_BF16 = "BF16"


@dataclass(frozen=True)
class Fingerprint:
    """Everything the teacher outputs depend on. Caches with equal fingerprints hold the same values.

    Attributes:
        teacher, tokenizer, tokens: digests of the teacher's weights, the tokenizer and the training tokens.
        max_length: tokens per example, special tokens included.
        layers: teacher layers whose states are cached (0: the embeddings).
        dtype: dtype of the cached values.
        precision: dtype of the teacher's forward pass.
        states: `cls` or `tokens`.
    """

    teacher: str
    tokenizer: str
    tokens: str
    max_length: int
    layers: tuple[int, ...]
    dtype: str
    precision: str
    states: str

    def as_json(self) -> dict[str, object]:
        return {**vars(self), "layers": list(self.layers)}

    @property
    def digest(self) -> str:
        return digest_of(self.as_json())

    def with_layers_of(self, manifest: Manifest) -> Fingerprint:
        """Return this fingerprint with the layers of an existing cache, which may hold more."""
        return replace(self, layers=manifest.fingerprint.layers)

    def differences(self, cached: Fingerprint) -> list[str]:
        """Return the fields in which a cache does not provide what this fingerprint requires.

        A cache with more layers than required provides them.
        """
        mine, theirs = self.as_json(), cached.as_json()
        if set(self.layers) <= set(cached.layers):
            mine.pop("layers")
        return [
            f"{name} (cache: {theirs[name]}, this run: {mine[name]})" for name in mine if mine[name] != theirs[name]
        ]


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the manifest lists it. The field names are the keys in the file."""

    file: str
    rows: int
    bytes: int
    sha256: str
    first_id: int
    last_id: int


@dataclass(frozen=True)
class Manifest:
    """The manifest of a complete cache.

    Attributes:
        rows: examples in the cache.
        shard_rows: rows of each shard but the last.
        shapes: shape of each array in a shard, with `rows` for the first dimension.
        shards: in ascending order of example ids.
    """

    fingerprint: Fingerprint
    rows: int
    shard_rows: int
    shapes: Mapping[str, Sequence[str | int]]
    shards: tuple[ShardEntry, ...]

    def write(self, folder: Path) -> None:
        """Commit the cache in `folder`."""
        content = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint.as_json(),
            "fingerprint_digest": self.fingerprint.digest,
            "rows": self.rows,
            "shard_rows": self.shard_rows,
            "shapes": self.shapes,
            "shards": [vars(entry) for entry in self.shards],
        }
        write_json(folder / MANIFEST, content | {"digest": digest_of(content)})


class DamagedManifestError(UserError):
    """The manifest of a cache cannot be used; the shards say themselves whether they can.

    Attributes:
        problem: what the user reads, without the remedy.
    """

    def __init__(self, problem: str):
        super().__init__(f"{problem}; remove the folder to rebuild the cache")
        self.problem = problem

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.problem,), vars(self)


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a complete cache, or None if none was committed.

    Raises:
        DamagedManifestError: the manifest cannot be read, or was altered.
        UserError: it has another format version, or may not be read.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        content = read_object(path)
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path}: has format version {version}, expected {FORMAT_VERSION}; remove the folder to rebuild the cache"
            )
        digest = content.pop("digest", None)
        if digest is not None and digest != digest_of(content):  # earlier versions wrote none
            raise DamagedManifestError(f"{path}: was altered (its checksum is wrong)")
        return TypeAdapter(Manifest).validate_python(content)
    except PermissionError:
        raise
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise DamagedManifestError(
            f"{path}: cannot be read ({'.'.join(map(str, first['loc']))}: {first['msg']})"
        ) from None
    except (OSError, ValueError, KeyError) as error:
        raise DamagedManifestError(f"{path}: cannot be read ({type(error).__name__}: {error})") from None


def require_fingerprint(folder: Path, manifest: Manifest, expected: Fingerprint) -> None:
    """Raise UserError if a cache does not provide `expected`, naming each field that differs."""
    differences = expected.differences(manifest.fingerprint)
    if differences:
        raise UserError(
            f"{folder}: this cache belongs to another run; it differs in {', '.join(differences)}; "
            "set cache.dir to another folder, or remove this one"
        )


def shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def require_shard(folder: Path, entry: ShardEntry, checksum: bool = True) -> None:
    """Raise UserError if a shard is missing or differs from its entry in size or, if asked for, in sha256."""
    path = folder / entry.file
    problem = None
    if not path.is_file():
        problem = "the shard is missing"
    elif path.stat().st_size != entry.bytes:
        problem = f"the shard has {path.stat().st_size} bytes, the manifest says {entry.bytes}"
    elif checksum and sha256(path) != entry.sha256:
        problem = "the shard's checksum is wrong: it was altered or damaged"
    if problem:
        raise UserError(f"{path}: {problem}; remove the file to rebuild this shard")


def map_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str], dict[str, str]]:
    """Memory-map a safetensors file.

    Returns:
        The arrays (bfloat16 as uint16), their safetensors dtypes, and the metadata of the file.
    """
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > path.stat().st_size:
            raise ValueError(f"{path}: its header is longer than the file")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    # np.memmap keeps a file descriptor for each array, and a process may have few of them; torch's map keeps none.
    content = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8).numpy()
    arrays, dtypes = {}, {}
    for name, entry in header.items():
        start, stop = (8 + length + offset for offset in entry["data_offsets"])
        arrays[name] = content[start:stop].view(_NUMPY_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        dtypes[name] = entry["dtype"]
    return arrays, dtypes, metadata


def _tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.view(torch.bfloat16) if dtype == _BF16 else tensor


class CacheReader:
    """Reads teacher outputs by example id.

    Args:
        folder: a complete cache.
        expected: the fingerprint this run requires.
        checksums: indices of the shards whose sha256 is verified, by default all. Sizes are always verified.

    Attributes:
        all_tokens: the states are those of all tokens, not of [CLS] alone.

    Raises:
        UserError: there is no complete cache, its fingerprint differs, or a shard is missing, truncated or altered.
    """

    def __init__(self, folder: Path, expected: Fingerprint, checksums: Sequence[int] | None = None):
        manifest = read_manifest(folder)
        if manifest is None:
            raise UserError(f"{folder}: holds no complete teacher cache; run the stage `cache` first")
        require_fingerprint(folder, manifest, expected)
        verified = range(len(manifest.shards)) if checksums is None else checksums
        for index, entry in enumerate(manifest.shards):
            require_shard(folder, entry, checksum=index in verified)
        self.all_tokens = manifest.fingerprint.states == "tokens"
        self._layer_positions = [manifest.fingerprint.layers.index(layer) for layer in expected.layers]
        self._shards = [map_tensors(folder / entry.file)[:2] for entry in manifest.shards]
        self._first_ids = np.array([entry.first_id for entry in manifest.shards], dtype=np.int64)

    @property
    def row_bytes(self) -> int:
        """Bytes of the outputs for one example, with the [CLS] states alone."""
        return sum(part.nbytes for part in self.rows_of(self._first_ids[:1], 0))

    def logits(self) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Yield the example ids (R,) and the logits (R, C) of each shard, in the cached dtype."""
        for arrays, dtypes in self._shards:
            yield arrays["ids"], _tensor(arrays["logits"], dtypes["logits"])

    def rows_of(self, ids_B: np.ndarray, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the teacher outputs for some examples, in the cached dtype.

        Args:
            ids_B: int64 example ids.
            length: L, to which states of all tokens are padded with 0.

        Returns:
            Logits (B, C), and states (B, M, H), (B, C, M, H) of options, or (B, L, M, H) of all tokens, for the layers of `expected`.

        Raises:
            UserError: the cache lacks an example.
        """
        shard_B = np.searchsorted(self._first_ids, ids_B, side="right") - 1
        logits: torch.Tensor | None = None
        states: torch.Tensor | None = None
        for shard in np.unique(shard_B):
            arrays, dtypes = self._shards[max(0, int(shard))]
            here = np.flatnonzero(shard_B == shard)
            rows = np.minimum(np.searchsorted(arrays["ids"], ids_B[here]), len(arrays["ids"]) - 1)
            if shard < 0 or (arrays["ids"][rows] != ids_B[here]).any():
                raise UserError("the teacher cache lacks an example of this data set; run the stage `cache` again")
            shard_logits = _tensor(arrays["logits"][rows], dtypes["logits"])
            if self.all_tokens:
                shard_states = _tensor(self._padded_states(arrays, rows, length), dtypes["states"])
            else:
                every_option = map(np.arange, arrays["states"].shape[1:-2])
                wanted = np.ix_(rows, *every_option, np.asarray(self._layer_positions, np.int64))
                shard_states = _tensor(arrays["states"][wanted], dtypes["states"])
            if logits is None or states is None:
                logits = shard_logits.new_empty((len(ids_B), *shard_logits.shape[1:]))
                states = shard_states.new_empty((len(ids_B), *shard_states.shape[1:]))
            logits[here], states[here] = shard_logits, shard_states
        assert logits is not None and states is not None
        return logits, states

    def _padded_states(self, arrays: dict[str, np.ndarray], rows: np.ndarray, length: int) -> np.ndarray:
        states_TMH = arrays["states"]
        padded = np.zeros((len(rows), length, len(self._layer_positions), states_TMH.shape[-1]), states_TMH.dtype)
        for i, row in enumerate(rows):
            start, stop = arrays["offsets"][row : row + 2]
            padded[i, : stop - start] = states_TMH[start:stop, self._layer_positions]
        return padded
