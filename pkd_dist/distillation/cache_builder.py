"""Fills the teacher cache: one half-precision pass over the training text, each rank its own shards.

A shard is written whole or not at all and carries the fingerprint's digest, so a killed build goes on with the missing
shards. The manifest is committed last, by rank 0.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pkd_dist.data.batches import MULTIPLE, Batch, collate, pinned
from pkd_dist.data.on_device import open_device_tokens
from pkd_dist.data.tokens import TokenSet
from pkd_dist.distillation import cache
from pkd_dist.distillation.cache import FORMAT_VERSION, MANIFEST, Fingerprint, map_tensors, shard_name, shard_problem
from pkd_dist.distributed.world import World
from pkd_dist.errors import UserError
from pkd_dist.files import sha256, write_atomically, write_json
from pkd_dist.model.encoder import Encoder
from pkd_dist.telemetry import Telemetry
from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.progress import Bar

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
_AT_ONCE, _GROUP_BYTES = 16, 1 << 29
"""Shards at most, and bytes of their answers, whose rows a GPU sorts by length and does together."""
_SIMILAR = 0.75
"""Of a batch's longest row, padded: shorter ones are for the next batch."""


_ROUND = 32
"""Batches of more rows have a multiple of this: PyTorch keeps about a megabyte for every shape of a product on a CPU."""


def resolve_teacher_precision(precision: str, device: torch.device) -> str:
    """`auto`: float16 on a GPU, bfloat16 on a CPU (which has no half-precision products of its own)."""
    if precision != "auto":
        return precision
    return "float16" if device.type == "cuda" else "bfloat16"


class LiveTeacher:
    """A teacher that answers from a forward pass, at the cached precision: what the cache must equal.

    Args:
        model: fine-tuned classifier.
        layers: teacher layers (from 1; 0: the embeddings) whose states are kept.
        precision: the model's own, see `DTYPES`.
        dtype: of the values handed out.
        tokens: states of every token, not of [CLS] alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[int],
        precision: str,
        dtype: str,
        tokens: bool,
        device: torch.device,
    ):
        self.encoder = Encoder(model, all_tokens=tokens).to(device, DTYPES[precision]).eval()
        self.layers, self.tokens, self.dtype, self.device = tuple(layers), tokens, DTYPES[dtype], device
        self.hidden = int(model.config.hidden_size)

    def __call__(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B, C) and states (B, M, H) or (B, L, M, H), in the cache's dtype.

        Raises:
            UserError: a value is not finite, or does not fit the cache's dtype.
        """
        return require_finite(*self.unchecked(inputs))

    @torch.inference_mode()
    def unchecked(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same without a look at the values, for which the host would wait."""
        logits, states = self.encoder(inputs, self.layers, self.tokens)
        if states is None:
            shape = (*logits.shape[:1], *([inputs["input_ids"].shape[1]] if self.tokens else []), 0, self.hidden)
            states = logits.new_empty(shape)
        return logits.to(self.dtype), states.to(self.dtype)


def require_finite(logits: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both, where all values are finite; raises UserError where one is not."""
    if not (torch.isfinite(logits).all() and torch.isfinite(states).all()):
        raise UserError(
            "the teacher's outputs are not finite at this precision; set cache.precision and cache.dtype to float32"
        )
    return logits, states


class Batches:
    """Batches of a teacher's inputs, made where it runs.

    Args:
        device: the teacher's.
    """

    def __init__(self, tokens: TokenSet, pad_id: int, device: torch.device):
        self.tokens, self.pad_id, self.device = tokens, pad_id, device
        self._resident = open_device_tokens(tokens, None, pad_id, device) if device.type == "cuda" else None

    def of(self, rows_B: np.ndarray) -> Batch:
        weight_B = np.ones(len(rows_B))
        if self._resident:
            return self._resident.rows(rows_B, weight_B).to(self.device).batch()
        return collate(self.tokens, rows_B, weight_B, self.pad_id).to(self.device)


def build(
    folder: Path,
    fingerprint: Fingerprint,
    tokens: TokenSet,
    make_teacher: Callable[[Sequence[int]], LiveTeacher],
    pad_id: int,
    shard_rows: int,
    world: World,
    telemetry: Telemetry,
) -> int:
    """Completes the cache in `folder`; collective.

    Args:
        fingerprint: a cache that is there and holds more layers is completed with those.
        make_teacher: layers -> a teacher that hands out their states; called only where this rank has a shard to build.

    Returns:
        Rows that were computed now (0: all shards were there).

    Raises:
        UserError: the folder holds a cache of another fingerprint, a shard that is there but damaged, or the disk is full.
        Preempted: a rank has got a stop signal; the shards that are whole stay.
    """
    by_id = np.argsort(np.asarray(tokens.ids_N), kind="stable")
    manifest = world.on_main(lambda: cache.read_manifest(folder))
    if manifest is not None:
        cache.require_fingerprint(folder, manifest, fingerprint)
        fingerprint = fingerprint.as_kept(manifest)
        shard_rows = manifest["shard_rows"]
    parts = [by_id[i : i + shard_rows] for i in range(0, len(by_id), shard_rows)]
    mine = range(world.rank, len(parts), world.size)

    def find_missing() -> list[tuple[int, bool]]:
        folder.mkdir(parents=True, exist_ok=True)
        entries = manifest["shards"] if manifest else None
        return [(i, (folder / shard_name(i)).exists()) for i in mine if _must_build(folder, i, fingerprint, entries)]

    found = sorted(shard for part in world.everywhere(find_missing) for shard in part)
    missing = [index for index, _ in found]
    for index, there in found:
        if there:
            log.info("cache: %s is not what was written for this teacher and data", shard_name(index))
    if manifest is not None and not missing:
        return 0
    if len(missing) < len(parts) and world.main:
        log.info(
            "cache: building %s, the other %d are there",
            ", ".join(map(shard_name, sorted(missing)[:5])) or "no shard",
            len(parts) - len(missing),
        )
    todo = [i for i in mine if i in missing]
    metrics = telemetry.metrics
    metrics.cache_expected.set(metrics.value("pkd_cache_rows_total") + sum(len(parts[i]) for i in todo))

    def build_mine() -> None:
        if not todo:
            return
        teacher = make_teacher(fingerprint.layers)
        batches = Batches(tokens, pad_id, teacher.device)
        at_once = 1
        if teacher.device.type == "cuda" and not teacher.tokens:
            row = teacher.dtype.itemsize * teacher.hidden * max(1, len(teacher.layers))
            at_once = min(_AT_ONCE, max(1, _GROUP_BYTES // (row * shard_rows)))
        with Bar("cache, rows of this rank", sum(len(parts[i]) for i in todo), show=telemetry.show) as bar:

            def tick(rows: int) -> bool:
                bar.advance(rows)
                return world.stopping()

            for group in (todo[k : k + at_once] for k in range(0, len(todo), at_once)):
                world.at(f"cache, {shard_name(group[0])}")
                found = answer(np.concatenate([parts[i] for i in group]), batches, teacher, tick)
                if found is None:
                    return
                for i in group:
                    found = _write_shard(folder / shard_name(i), parts[i], batches, *found, teacher.tokens, fingerprint)
                    metrics.cache_rows.inc(len(parts[i]))
                if world.stopping():
                    return

    world.together(build_mine)
    world.at("cache, checksums", loop=False)
    world.stop_here("cache")
    entries = sorted(
        (
            entry
            for part in world.everywhere(lambda: [_entry(folder, i, tokens, parts[i]) for i in mine])
            for entry in part
        ),
        key=lambda entry: entry["file"],
    )

    def commit() -> None:
        shapes = map_tensors(folder / entries[0]["file"])[0]
        write_json(
            folder / MANIFEST,
            {
                "format_version": FORMAT_VERSION,
                "fingerprint": fingerprint.as_json(),
                "fingerprint_digest": fingerprint.digest,
                "rows": len(tokens),
                "shard_rows": shard_rows,
                "shapes": {name: ["rows", *array.shape[1:]] for name, array in shapes.items()},
                "shards": entries,
            },
        )

    world.on_main(commit)
    return sum(len(parts[i]) for i in missing)


def _must_build(folder: Path, index: int, fingerprint: Fingerprint, entries: list[dict[str, Any]] | None) -> bool:
    """A shard that is absent is built. One that is there must be whole and of this fingerprint."""
    path = folder / shard_name(index)
    if not path.exists():
        return True
    if entries is None:
        return not _whole(path, fingerprint)
    problem = shard_problem(folder, entries[index])
    if problem:
        raise UserError(f"{problem}; remove the file to have this shard built again")
    return False


def _whole(path: Path, fingerprint: Fingerprint) -> bool:
    """Whether a shard that no manifest lists yet is what was written: it carries its own checksum."""
    try:
        arrays, _, metadata = map_tensors(path)
    except (OSError, ValueError, KeyError, struct.error, RuntimeError):
        return False
    return metadata == _identity(fingerprint, arrays)


def _identity(fingerprint: Fingerprint, arrays: dict[str, np.ndarray]) -> dict[str, str]:
    """A shard's metadata: one entry, because safetensors writes several in no certain order."""
    digest = hashlib.sha256(fingerprint.digest.encode())
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
    return {"identity": digest.hexdigest()}


def answer(
    rows: np.ndarray, batches: Batches, teacher: LiveTeacher, tick: Callable[[int], bool] = lambda rows: False
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The teacher's answers to some rows, in their order: one pass in batches of similar length, of at most about
    `_BATCH_TOKENS` tokens. A GPU is given one after the other without a wait.

    Args:
        tick: told of the rows of each batch; -> whether to stop.

    Returns:
        Logits (R, C) and states (R, M, H), or (T, M, H) of every token without padding, on the CPU; None where it was
        stopped.
    """
    lengths = batches.tokens.lengths_of(rows)
    firsts = np.cumsum(lengths) - lengths
    order, device = np.argsort(-lengths, kind="stable"), teacher.device
    # the states of all tokens are many: in small batches, and at once to the host
    most, keeper = (
        (_BATCH_TOKENS["cpu"], torch.device("cpu")) if teacher.tokens else (_BATCH_TOKENS[device.type], device)
    )
    padded = -(-lengths[order] // MULTIPLE) * MULTIPLE
    out: tuple[torch.Tensor, torch.Tensor] | None = None
    start = 0
    while start < len(order):
        similar = np.searchsorted(-padded, -_SIMILAR * padded[start], side="right")  # rows are sorted by length
        count = min(int(similar) - start, max(1, most // int(padded[start])))
        here = order[start : start + (count // _ROUND * _ROUND or count)]
        logits, states = teacher.unchecked(batches.of(rows[here]).inputs)
        places = here
        if teacher.tokens:  # one row after the other, without padding
            within = np.arange(states.shape[1]) < lengths[here][:, None]
            places = (firsts[here][:, None] + np.arange(states.shape[1]))[within]
            states = states.flatten(0, 1)[pinned(torch.from_numpy(np.flatnonzero(within)), device)]
        logits, states = logits.to(keeper), states.to(keeper)
        if out is None:
            count = int(lengths.sum()) if teacher.tokens else len(rows)
            out = logits.new_empty((len(rows), *logits.shape[1:])), states.new_empty((count, *states.shape[1:]))
        for whole, part, where in zip(out, (logits, states), (here, places), strict=True):
            whole[pinned(torch.from_numpy(where), keeper)] = part
        start += len(here)
        if tick(len(here)) and start < len(order):
            return None
    assert out is not None
    logits, states = require_finite(*out)
    return logits.cpu(), states.cpu()


def _write_shard(
    path: Path,
    rows: np.ndarray,
    batches: Batches,
    logits: torch.Tensor,
    states: torch.Tensor,
    by_token: bool,
    fingerprint: Fingerprint,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes the first rows' answers in id order; returns those of the rows that come after them."""
    offsets = np.concatenate([[0], np.cumsum(batches.tokens.lengths_of(rows))]).astype(np.int64)
    count = int(offsets[-1]) if by_token else len(rows)
    tensors = {
        "ids": torch.from_numpy(np.asarray(batches.tokens.ids_N[rows])),
        "logits": logits[: len(rows)],
        "states": states[:count],
    }
    if by_token:
        tensors["offsets"] = torch.from_numpy(offsets)
    plain = {
        name: tensor.view(torch.uint8 if tensor.ndim else tensor.dtype).numpy() for name, tensor in tensors.items()
    }
    metadata = _identity(fingerprint, plain)
    write_atomically(path, lambda tmp: save_file(tensors, tmp, metadata), sum(t.nbytes for t in tensors.values()))
    return logits[len(rows) :], states[count:]


def _entry(folder: Path, index: int, tokens: TokenSet, rows: np.ndarray) -> dict[str, Any]:
    path = folder / shard_name(index)
    ids = tokens.ids_N[rows[[0, -1]]]
    return {
        "file": path.name,
        "rows": len(rows),
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "first_id": int(ids[0]),
        "last_id": int(ids[-1]),
    }
