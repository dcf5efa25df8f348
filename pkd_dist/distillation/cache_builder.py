"""Fills the teacher cache: each rank runs the teacher over its shards of the training set.

`build` compares the folder with what is wanted, shares the missing shards among the ranks, and commits the manifest last, on
rank 0. Shards are written atomically and carry a digest of their content and fingerprint, so an interrupted build resumes
with the missing ones.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from pkd_dist.data.tokens import TokenSet
from pkd_dist.distillation import cache
from pkd_dist.distillation.cache import (
    DamagedManifestError,
    Fingerprint,
    Manifest,
    ShardEntry,
    map_tensors,
    shard_name,
)
from pkd_dist.distillation.teacher import GivenAnswers, LiveTeacher, TeacherBatches, run_teacher
from pkd_dist.distributed.world import World
from pkd_dist.files import make_folder, remove, sha256, write_atomically
from pkd_dist.telemetry import Telemetry
from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.progress import Bar

_MAX_SHARDS_PER_PASS, _MAX_PASS_BYTES = 16, 1 << 29
"""A GPU runs the rows of several shards in one pass, sorted by length; the outputs of a pass stay in its memory."""

MakeTeacher = Callable[[Sequence[int]], LiveTeacher | GivenAnswers]
"""Returns a teacher that outputs the states of the given layers."""


@dataclass(frozen=True)
class CacheSpec:
    """A cache as it should be.

    Attributes:
        folder: created if absent.
        fingerprint: what the cache must provide.
        tokens: the training set.
        pad_id: padding token id of the teacher's inputs.
        shard_rows: rows of each shard but the last.
    """

    folder: Path
    fingerprint: Fingerprint
    tokens: TokenSet
    pad_id: int
    shard_rows: int

    @cached_property
    def shards(self) -> list[np.ndarray]:
        """The rows of each shard, as positions in the token set, in ascending order of their ids."""
        by_id = np.argsort(np.asarray(self.tokens.ids_N), kind="stable")
        return [by_id[i : i + self.shard_rows] for i in range(0, len(by_id), self.shard_rows)]

    def path(self, index: int) -> Path:
        return self.folder / shard_name(index)


def build(spec: CacheSpec, make_teacher: MakeTeacher, world: World, telemetry: Telemetry) -> int:
    """Complete a cache; collective.

    A cache that already has a manifest keeps its own layers and `shard_rows`.

    Args:
        make_teacher: called only on ranks that have a shard to build.

    Returns:
        The number of rows computed now, over all ranks; 0 if the cache was complete.

    Raises:
        UserError: the folder holds the cache of another fingerprint or a damaged shard, or the disk is full.
        Preempted: a rank received a stop signal; complete shards are kept.
    """
    manifest = world.on_main(lambda: _usable_manifest(spec.folder))
    if manifest is not None:
        cache.require_fingerprint(spec.folder, manifest, spec.fingerprint)
        kept = spec.fingerprint.with_layers_of(manifest)
        spec = replace(spec, fingerprint=kept, shard_rows=manifest.shard_rows)
    mine = range(world.rank, len(spec.shards), world.size)
    missing = _find_missing(spec, manifest, mine, world)
    if manifest is not None and not missing:
        return 0
    if len(missing) < len(spec.shards):
        names = ", ".join(map(shard_name, missing[:5])) + (", ..." if len(missing) > 5 else "")
        log.info("cache: building %s; %d shards are complete", names or "no shard", len(spec.shards) - len(missing))
    todo = sorted(set(mine) & set(missing))
    metrics = telemetry.metrics
    metrics.cache_expected.set(metrics.value("pkd_cache_rows_total") + _count_rows(spec, todo))
    world.together(lambda: _build_shards(spec, todo, make_teacher, world, telemetry))
    world.at("cache, checksums", loop=False)
    world.stop_here("cache")
    entries = world.everywhere(lambda: [_entry(spec, index) for index in mine])
    world.on_main(lambda: _commit(spec, [entry for of_rank in entries for entry in of_rank]))
    return _count_rows(spec, missing)


def _usable_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a complete cache. A damaged one is removed: each shard has a digest of its own."""
    try:
        return cache.read_manifest(folder)
    except DamagedManifestError as damaged:
        log.info("cache: %s; it is made again from the shards", damaged.problem)
        remove(folder / cache.MANIFEST)
        return None


def _count_rows(spec: CacheSpec, indices: Sequence[int]) -> int:
    return sum(len(spec.shards[index]) for index in indices)


# ------------------------------------------------------------------------------------------------- what is missing


def _find_missing(spec: CacheSpec, manifest: Manifest | None, mine: Sequence[int], world: World) -> list[int]:
    """Return the indices of the shards to build, on every rank; each rank checks its own. Collective.

    Raises:
        UserError: a shard that the manifest lists is damaged.
    """

    def check_mine() -> list[tuple[int, bool]]:
        make_folder(spec.folder)
        found = [(index, spec.path(index).exists()) for index in mine]
        return [(index, exists) for index, exists in found if not (exists and _is_complete(spec, index, manifest))]

    missing = sorted(shard for of_rank in world.everywhere(check_mine) for shard in of_rank)
    for index, exists in missing:
        if exists:
            log.info("cache: rebuilding %s: it is damaged or from another teacher or data set", shard_name(index))
    return [index for index, _ in missing]


def _is_complete(spec: CacheSpec, index: int, manifest: Manifest | None) -> bool:
    """Return whether an existing shard can be kept. Raise UserError if it is listed by the manifest and damaged."""
    if manifest is not None:
        cache.require_shard(spec.folder, manifest.shards[index])
        return True
    try:
        arrays, _, metadata = map_tensors(spec.path(index))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error, RuntimeError):
        return False
    return metadata == _metadata(spec.fingerprint, arrays)


def _metadata(fingerprint: Fingerprint, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Return the safetensors metadata of a shard. It has a single entry, because safetensors does not order them."""
    digest = hashlib.sha256(fingerprint.digest.encode())
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).view(np.uint8).data)
    return {"identity": digest.hexdigest()}


# --------------------------------------------------------------------------------------------------------- building


def _build_shards(
    spec: CacheSpec, todo: Sequence[int], make_teacher: MakeTeacher, world: World, telemetry: Telemetry
) -> None:
    """Run the teacher and write this rank's missing shards. Return early if a rank received a stop signal."""
    if not todo:
        return
    teacher = make_teacher(spec.fingerprint.layers)
    at_once = 1
    if isinstance(teacher, LiveTeacher):
        batches, at_once = (
            TeacherBatches(spec.tokens, spec.pad_id, teacher.device),
            _shards_per_pass(teacher, spec.shard_rows),
        )
    with Bar("cache, examples of this rank", _count_rows(spec, todo), show=telemetry.show) as bar:

        def stop_after(rows: int) -> bool:
            bar.advance(rows)
            return world.stopping()

        for start in range(0, len(todo), at_once):
            group = todo[start : start + at_once]
            world.at(f"cache, {shard_name(group[0])}")
            rows = np.concatenate([spec.shards[index] for index in group])
            outputs = (
                run_teacher(rows, batches, teacher, stop_after)
                if isinstance(teacher, LiveTeacher)
                else teacher.rows(rows)
            )
            if outputs is None:
                return
            for index in group:
                outputs = _write_shard(spec, index, *outputs, all_tokens=teacher.all_tokens)
                telemetry.metrics.cache_rows.inc(len(spec.shards[index]))
            if world.stopping():
                return


def _shards_per_pass(teacher: LiveTeacher, shard_rows: int) -> int:
    if teacher.device.type != "cuda" or teacher.all_tokens:
        return 1
    row_bytes = teacher.dtype.itemsize * teacher.hidden_size * max(1, len(teacher.layers))
    return min(_MAX_SHARDS_PER_PASS, max(1, _MAX_PASS_BYTES // (row_bytes * shard_rows)))


def _write_shard(
    spec: CacheSpec, index: int, logits: torch.Tensor, states: torch.Tensor, all_tokens: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write a shard from the first rows of the outputs, and return the outputs after them."""
    rows = spec.shards[index]
    offsets = np.concatenate([[0], np.cumsum(spec.tokens.lengths_of(rows))]).astype(np.int64)
    state_rows = int(offsets[-1]) if all_tokens else len(rows)
    tensors = {
        "ids": torch.from_numpy(np.asarray(spec.tokens.ids_N[rows])),
        "logits": logits[: len(rows)],
        "states": states[:state_rows],
    }
    if all_tokens:
        tensors["offsets"] = torch.from_numpy(offsets)
    content = {name: tensor.view(torch.uint8).numpy() for name, tensor in tensors.items()}  # NumPy has no bfloat16
    metadata = _metadata(spec.fingerprint, content)
    needed_bytes = sum(tensor.nbytes for tensor in tensors.values())
    write_atomically(spec.path(index), lambda tmp: save_file(tensors, tmp, metadata), needed_bytes)
    return logits[len(rows) :], states[state_rows:]


# --------------------------------------------------------------------------------------------------------- committing


def _entry(spec: CacheSpec, index: int) -> ShardEntry:
    path, rows = spec.path(index), spec.shards[index]
    first_id, last_id = spec.tokens.ids_N[rows[[0, -1]]]
    return ShardEntry(path.name, len(rows), path.stat().st_size, sha256(path), int(first_id), int(last_id))


def _commit(spec: CacheSpec, entries: list[ShardEntry]) -> None:
    arrays, _, _ = map_tensors(spec.path(0))
    manifest = Manifest(
        fingerprint=spec.fingerprint,
        rows=len(spec.tokens),
        shard_rows=spec.shard_rows,
        shapes={name: ["rows", *array.shape[1:]] for name, array in arrays.items()},
        shards=tuple(sorted(entries, key=lambda entry: entry.first_id)),
    )
    manifest.write(spec.folder)
