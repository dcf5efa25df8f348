"""Checkpoints: complete or absent, and independent of the number of ranks and the ZeRO stage.

    FOLDER/step-00000200/
        rank-0000.safetensors        what this rank's optimizer owns: for each parameter a flat slice of the float32 weight
                                     and of Adam's two moments, and where the slice starts
        state.json                   position, history, best epoch so far, counters: equal on all ranks
        commit.json                  size and sha256 of every file; written last, atomically
    FOLDER/step-00000200.earlier/    its predecessor of the same step, while it is replaced
    FOLDER/best-00000530.safetensors consolidated float32 weights of the best evaluation so far

A folder without `commit.json` is ignored on resume. Slices name a parameter and a position, not a rank or a stage, so a
reader assembles what it needs (`Shards`). No random state is saved: a step draws from (seed, step, rank). No pickle is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file

from pkd_dist.distributed.world import World
from pkd_dist.errors import UserError
from pkd_dist.files import (
    discard,
    make_folder,
    remove,
    remove_leftovers,
    require_space,
    sha256,
    sync,
    write_atomically,
    write_json,
)

COMMIT, STATE = "commit.json", "state.json"
WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")

FileSums = dict[str, tuple[int, str]]
"""File name -> size and sha256."""


class Counters(TypedDict):
    """What an optimizer counts: updates applied, and fp16's loss scale (empty in other precisions)."""

    updates: int
    loss_scale: dict[str, float]


class TrainingState(TypedDict, total=False):
    """`state.json`."""

    fingerprint: str
    best_file: str | None
    best_sha256: str | None
    progress: dict[str, Any]
    counters: Counters
    decay: float
    total_steps: int


@dataclass(frozen=True)
class Commit:
    """`commit.json`."""

    step: int
    world_size: int
    fingerprint: str
    files: FileSums


@dataclass(frozen=True)
class Found:
    """A checkpoint to resume from.

    Attributes:
        best_damage: what is wrong with the best weights that it refers to; None if they are intact.
    """

    path: Path
    state: TrainingState
    best_damage: str | None = None


@dataclass(frozen=True)
class Slice:
    """A rank's part of one tensor.

    Attributes:
        kind: `weight` or one of `MOMENTS`.
        name: of the parameter or buffer.
        start: index of the first element in the flattened tensor.
        values: (n,); float32 for trained parameters.
        shape: of the complete tensor.
    """

    kind: str
    name: str
    start: int
    values: torch.Tensor
    shape: tuple[int, ...]

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def best_name(step: int) -> str:
    return f"best-{step:08d}.safetensors"


# ----------------------------------------------------------------------------------------------------------- writing


def save(
    world: World,
    folder: Path,
    step: int,
    slices: list[Slice],
    state: TrainingState,
    keep: int,
    branch_step: int | None = None,
) -> int:
    """Write and commit one checkpoint; collective.

    Args:
        folder: of all checkpoints.
        step: optimizer steps done.
        slices: what this rank owns: over all ranks every element of every tensor exactly once.
        state: equal on all ranks; needs `fingerprint` and `best_file`.
        keep: number of committed checkpoints to keep, including this one.
        branch_step: step of a checkpoint that is kept as well, if there is one: a longer training continues from it.

    Returns:
        Bytes written.

    Raises:
        UserError: no space left. Earlier checkpoints are unchanged.
    """
    temporary, label = folder / f".{step_name(step)}.tmp", f"the checkpoint of step {step}"
    needed = sum(world.gather(sum(s.values.nbytes for s in slices)))

    def create() -> None:
        make_folder(folder)
        remove(temporary)
        with require_space(folder, needed, label):
            temporary.mkdir()

    def write() -> FileSums:
        with require_space(folder, 0, label):
            return _write_slices(temporary / f"rank-{world.rank:04d}.safetensors", slices)

    def commit() -> int:
        with require_space(folder, 0, label):
            files = {name: sums for rank_files in written for name, sums in rank_files.items()}
            files |= _write_state(temporary / STATE, state)
            write_json(temporary / COMMIT, vars(Commit(step, world.size, state["fingerprint"], files)))
            _move_into_place(temporary, folder / step_name(step))
        _retain(folder, keep, branch_step)
        return sum(size for size, _ in files.values())

    world.on_main(create)
    try:
        written = world.everywhere(write)
        return world.on_main(commit)
    except UserError:
        if world.main:
            remove(temporary)
        raise


def _write_slices(path: Path, slices: list[Slice]) -> FileSums:
    places = {s.key: [s.start, list(s.shape)] for s in slices}
    values = {s.key: s.values.detach().cpu() for s in slices}
    write_atomically(path, lambda tmp: save_file(values, tmp, metadata={"places": json.dumps(places)}))
    return _sums(path)


def _write_state(path: Path, state: TrainingState) -> FileSums:
    write_atomically(path, lambda tmp: tmp.write_text(json.dumps(state)))
    return _sums(path)


def _sums(path: Path) -> FileSums:
    return {path.name: (path.stat().st_size, sha256(path))}


def _earlier(final: Path) -> Path:
    """Return the name to which a checkpoint of the same step, saved before its evaluation, is moved."""
    return final.with_name(f"{final.name}.earlier")


def _move_into_place(temporary: Path, final: Path) -> None:
    """Rename a complete checkpoint to its final name. At any moment an intact one of the same step stays committed."""
    if (final / COMMIT).exists():
        discard(_earlier(final))
        os.replace(final, _earlier(final))
    remove(final)
    os.replace(temporary, final)
    sync(final.parent)
    discard(_earlier(final))


def committed(folder: Path) -> list[Path]:
    """Return the committed checkpoints, oldest first."""
    found = (path.parent for path in folder.glob(f"step-*/{COMMIT}"))
    return sorted(found, key=lambda path: (path.stem, not path.suffix))  # an `.earlier` one before its successor


def _retain(folder: Path, keep: int, branch_step: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and that of `branch_step`, the best weights only they refer to, and what
    a kill left behind."""
    checkpoints = committed(folder)
    for old in checkpoints[:-keep]:
        if branch_step is None or old.name != step_name(branch_step):
            discard(old)
    retain_best(folder)
    for leftover in folder.glob("step-*"):
        if leftover not in checkpoints:
            remove(leftover)
    remove_leftovers(folder)


def retain_best(folder: Path, newest: str | None = None) -> None:
    """Remove all best weights but `newest` and those that a committed checkpoint refers to."""
    wanted = {newest, *map(_best_of, committed(folder))}
    for best in folder.glob("best-*.safetensors"):
        if best.name not in wanted:
            remove(best)


def _best_of(checkpoint: Path) -> str | None:
    """Return the best weights that a checkpoint refers to; None if it is damaged, so that nothing can resume from it."""
    try:
        return str(read_state(checkpoint)["best_file"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


# ----------------------------------------------------------------------------------------------------------- reading


def read_state(checkpoint: Path) -> TrainingState:
    return json.loads((checkpoint / STATE).read_text())


def find(
    world: World,
    folder: Path,
    fingerprint: str,
    report: Callable[[str], None],
    usable: Callable[[TrainingState], bool] = lambda state: True,
) -> Found | None:
    """Return the newest checkpoint to resume from, or None if there is none; collective.

    That is one that is intact and refers to intact best weights, or to those of its own step, which it holds itself. If there
    is no such checkpoint, it is the newest intact one: its best weights are needed only where no later epoch is better.

    Args:
        report: called with a message if something damaged was found.
        usable: whether this training can continue from a checkpoint; those from which it cannot are given up.

    Raises:
        UserError: there are checkpoints, but of another run, or none is intact.
    """

    def choose() -> Found | None:
        skipped: dict[Path, str] = {}
        lacking: list[Found] = []
        given_up: list[Path] = []
        for path in reversed(committed(folder)):
            problem, commit = damage(path)
            if problem or commit is None:
                skipped[path] = str(problem)
                continue
            if commit.fingerprint != fingerprint:
                raise UserError(f"{path}: belongs to a run with other settings; use --fresh, or another run.dir")
            state = read_state(path)
            if not usable(state):
                given_up.append(path)
                continue
            found = Found(path, state, best_damage(folder, state["best_file"], state["best_sha256"]))
            if found.best_damage is None or state["best_file"] == best_name(commit.step):
                break
            lacking.append(found)
            skipped[path] = str(found.best_damage)
        else:
            if not lacking:
                _require_intact(folder, skipped)
                _give_up(given_up)
                return None
            found = lacking[0]
        if problem := next(iter(skipped.values()), found.best_damage):
            report(f"resuming from {found.path.name}: {problem}")
        _give_up({*skipped, *given_up} - {found.path})
        return found

    return world.on_main(choose)


def _give_up(checkpoints: Iterable[Path]) -> None:
    for path in checkpoints:
        (path / COMMIT).unlink(missing_ok=True)  # the next save removes it


def _require_intact(folder: Path, damaged: dict[Path, str]) -> None:
    """Raise UserError if there are checkpoints, all damaged."""
    for problem in damaged.values():
        raise UserError(f"{problem}; no intact checkpoint is left in {folder}; restore one, or use --fresh")


def damage(checkpoint: Path) -> tuple[str | None, Commit | None]:
    """Verify a checkpoint by reading every byte; the best weights that it refers to are not part of it.

    Returns:
        What is wrong (None: nothing), and the commit marker (None: it cannot be read).
    """
    unreadable = f"{checkpoint / COMMIT} cannot be read"
    try:
        commit = TypeAdapter(Commit).validate_json((checkpoint / COMMIT).read_bytes())
    except (OSError, ValidationError):
        return unreadable, None
    for name, (size, digest) in commit.files.items():
        problem = _file_damage(checkpoint / name, size, digest)
        if problem:
            return problem, commit
    if STATE not in commit.files or read_state(checkpoint)["fingerprint"] != commit.fingerprint:
        return unreadable, None
    return None, commit


def best_damage(folder: Path, name: str | None, digest: str | None) -> str | None:
    """Say what is wrong with best weights in a folder of checkpoints; None if they are intact, or there are none yet."""
    return _file_damage(folder / name, None, str(digest)) if name else None


def _file_damage(file: Path, size: int | None, digest: str) -> str | None:
    if not file.is_file():
        return f"{file} is missing"
    if size is not None and file.stat().st_size != size:
        return f"{file} has {file.stat().st_size} bytes, not {size}"
    if sha256(file) != digest:
        return f"{file} was altered (its checksum is wrong)"
    return None


class Shards:
    """A committed checkpoint, memory-mapped, whatever number of ranks and ZeRO stage wrote it."""

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
        """Yield the names of all tensors of a kind."""
        return (key.removeprefix(f"{kind}/") for key in self._where if key.startswith(f"{kind}/"))

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def read(self, kind: str, name: str, start: int = 0, count: int | None = None) -> torch.Tensor:
        """Return elements start..start+count of a flattened tensor (default: all), as (count,)."""
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

    def tensor(self, kind: str, name: str) -> torch.Tensor:
        """Return a complete tensor in its own shape."""
        return self.read(kind, name).view(self.shapes[f"{kind}/{name}"])
