"""Checkpoints that are whole or absent, and that any number of ranks at any ZeRO stage can go on from.

    FOLDER/step-00000200/
        rank-0000.safetensors        what this rank's optimizer owns: of each parameter a slice of the float32 weight and of
                                     Adam's two moments, flat, and where the slice starts
        state.json                   position, history, best so far, counters: the same for all ranks
        commit.json                  size and sha256 of every file; written last, atomically
    FOLDER/best-00000530.safetensors consolidated float32 weights of the best evaluation so far

A folder without `commit.json` does not exist as far as a resume is concerned. Slices are named by parameter and place, not
by rank or stage, so a reader puts together what it needs (`Shards`). No random state is kept: a step draws from
(seed, step, rank). No pickle anywhere.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pkd_dist.distributed.world import World
from pkd_dist.errors import UserError
from pkd_dist.files import remove, require_space, sha256, sync, write_json

COMMIT = "commit.json"
WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slice:
    """A rank's part of one tensor.

    Attributes:
        kind: `weight` or one of `MOMENTS`.
        name: of the parameter or buffer.
        start: first element, in the flat tensor.
        values: (n,) flat; float32 for all that is trained.
        shape: of the whole tensor.
    """

    kind: str
    name: str
    start: int
    values: torch.Tensor
    shape: tuple[int, ...]


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def best_name(step: int) -> str:
    return f"best-{step:08d}.safetensors"


# ----------------------------------------------------------------------------------------------------------- writing


def save(world: World, folder: Path, step: int, slices: list[Slice], state: dict[str, Any], keep: int) -> int:
    """Writes and commits one checkpoint; collective.

    Args:
        folder: where checkpoints live.
        step: optimizer steps done.
        slices: what this rank owns; over all ranks every element of every tensor once.
        state: what every rank needs to go on; must hold `fingerprint` and `best_file` (or None).
        keep: committed checkpoints to keep, this one included.

    Returns:
        Bytes written.

    Raises:
        UserError: no space left; the earlier checkpoints are as they were.
    """
    final, temporary = folder / step_name(step), folder / f".{step_name(step)}.tmp"
    needed = sum(world.gather(sum(s.values.nbytes for s in slices)))

    def start() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        with require_space(folder, needed, f"the checkpoint of step {step}"):
            temporary.mkdir()

    def write() -> dict[str, list[Any]]:
        with require_space(folder, 0, f"the checkpoint of step {step}"):
            path = temporary / f"rank-{world.rank:04d}.safetensors"
            places = {f"{s.kind}/{s.name}": [s.start, list(s.shape)] for s in slices}
            values = {f"{s.kind}/{s.name}": s.values.detach().cpu() for s in slices}
            save_file(values, path, metadata={"places": json.dumps(places)})
            sync(path)
            return {path.name: [path.stat().st_size, sha256(path)]}

    def commit() -> int:
        with require_space(folder, 0, f"the checkpoint of step {step}"):
            path = temporary / "state.json"
            path.write_text(json.dumps(state))
            sync(path)
            files = {name: value for part in parts for name, value in part.items()}
            files["state.json"] = [path.stat().st_size, sha256(path)]
            marker = {"step": step, "world_size": world.size, "fingerprint": state["fingerprint"], "files": files}
            write_json(temporary / COMMIT, marker)
            earlier = final.with_name(f"{final.name}.earlier")  # of the same step, before its evaluation
            if final.exists():
                os.replace(final, earlier)
            os.replace(temporary, final)
            sync(folder)
        if earlier.exists():
            _discard(earlier)
        _retain(folder, keep)
        return sum(size for size, _ in files.values())

    world.on_main(start)
    try:
        parts = world.everywhere(write)
        return world.on_main(commit)
    except UserError:
        if world.main:
            remove(temporary)
        raise


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(p.parent for p in folder.glob(f"step-*/{COMMIT}"))


def _retain(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and best weights that none of these refers to."""
    checkpoints = committed(folder)
    for old in checkpoints[:-keep]:
        _discard(old)
    retain_best(folder)
    for folder_of_step in (*folder.glob("step-*"), *folder.glob(".step-*.tmp")):
        if folder_of_step not in checkpoints:  # a kill left it
            remove(folder_of_step)


def retain_best(folder: Path, newest: str | None = None) -> None:
    """Removes best weights that neither a committed checkpoint refers to nor are the newest."""
    wanted = {newest, *(read_state(kept)["best_file"] for kept in committed(folder))}
    for best in folder.glob("best-*.safetensors"):
        if best.name not in wanted:
            remove(best)


def _discard(path: Path) -> None:
    (path / COMMIT).unlink(missing_ok=True)  # first: a half-removed folder must not look committed
    remove(path)


# ----------------------------------------------------------------------------------------------------------- reading


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())


def find(
    world: World, folder: Path, fingerprint: str, say: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """The newest committed checkpoint that is intact, and its state; None where there is none. Collective.

    Raises:
        UserError: checkpoints exist, but of another run, or none of them is intact.
    """

    def choose() -> tuple[Path, dict[str, Any]] | None:
        damaged: list[str] = []
        for path in reversed(committed(folder)):
            problem, marker = damage(path)
            if problem:
                damaged.append(problem)
                continue
            if marker["fingerprint"] != fingerprint:
                raise UserError(f"{path}: belongs to a run with other settings; use --fresh, or another run.dir")
            if damaged:
                say(f"going on from {path.name}: {damaged[0]}")
            for passed_over in reversed(committed(folder)):
                if passed_over == path:
                    break
                (passed_over / COMMIT).unlink()  # the next save clears it away
            return path, read_state(path)
        if damaged:
            raise UserError(f"{damaged[0]}; no intact checkpoint is left in {folder}; restore one, or use --fresh")
        return None

    return world.on_main(choose)


def damage(checkpoint: Path, best: bool = True) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with a checkpoint, in words (None: nothing), and its commit marker. Reads every byte.

    Args:
        best: the best weights that it refers to count too.
    """
    try:
        marker = json.loads((checkpoint / COMMIT).read_text())
        files = marker["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{checkpoint / COMMIT} cannot be read", {}
    for name, (size, digest) in files:
        problem = _damaged_file(checkpoint / name, size, digest)
        if problem:
            return problem, marker
    state = read_state(checkpoint)
    if best and state["best_file"]:
        return _damaged_file(checkpoint.parent / state["best_file"], None, state["best_sha256"]), marker
    return None, marker


def _damaged_file(file: Path, size: int | None, digest: str) -> str | None:
    if not file.is_file():
        return f"{file} is missing"
    if size is not None and file.stat().st_size != size:
        return f"{file} has {file.stat().st_size} bytes, not {size}"
    if sha256(file) != digest:
        return f"{file} was altered (its checksum is wrong)"
    return None


class Shards:
    """Reads a committed checkpoint, written by whatever number of ranks at whatever stage, through a memory map."""

    def __init__(self, checkpoint: Path):
        self._where: dict[str, list[tuple[int, int, Any]]] = {}  # key -> (start, stop, file), ascending
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(checkpoint.glob("rank-*.safetensors")):
            file = safe_open(path, framework="pt")
            for key, (start, shape) in json.loads(file.metadata()["places"]).items():
                stop = start + file.get_slice(key).get_shape()[0]
                self._where.setdefault(key, []).append((start, stop, file))
                self.shapes[key] = tuple(shape)
        for parts in self._where.values():
            parts.sort(key=lambda part: part[0])

    def names(self, kind: str = WEIGHT) -> Iterator[str]:
        return (key.removeprefix(f"{kind}/") for key in self._where if key.startswith(f"{kind}/"))

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def read(self, kind: str, name: str, start: int = 0, count: int | None = None) -> torch.Tensor:
        """Elements start..start+count of a flat tensor (all by default), as (count,)."""
        key = f"{kind}/{name}"
        stop = start + count if count is not None else self._where[key][-1][1]
        found = [
            file.get_slice(key)[max(start, first) - first : min(stop, last) - first]
            for first, last, file in self._where[key]
            if first < stop and last > start
        ]
        out = torch.cat(found) if found else torch.empty(0)
        assert len(out) == stop - start, f"{key}: {len(out)} of {stop - start} elements are in the checkpoint"
        return out

    def whole(self, kind: str, name: str) -> torch.Tensor:
        """A whole tensor, in its own shape."""
        return self.read(kind, name).view(self.shapes[f"{kind}/{name}"])
