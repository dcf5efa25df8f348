"""Checkpoints that are whole or absent: per-rank shards first, the commit marker last.

    FOLDER/step-00000200/            a DeepSpeed checkpoint (its files), and for each rank
        rank-0000.pt                 random state of every kind
        state.json                   position, history, best so far: the same for all ranks
        commit.json                  size and sha256 of every file; written last, atomically
    FOLDER/best-00000530.safetensors consolidated float32 weights of the best evaluation so far

A folder without `commit.json` does not exist as far as a resume is concerned. DeepSpeed's own `latest` file is not used:
it is written before the other ranks' shards are known to be complete.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pkd_dist.dist import World
from pkd_dist.errors import UserError
from pkd_dist.files import remove, sha256, sync, write_json

COMMIT = "commit.json"


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def best_name(step: int) -> str:
    return f"best-{step:08d}.safetensors"


def random_state() -> dict[str, Any]:
    """The state of every random generator that training may draw from."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def save(
    world: World, folder: Path, step: int, write_shards: Callable[[Path, str], None], state: dict[str, Any], keep: int
) -> int:
    """Writes and commits one checkpoint; collective.

    Args:
        folder: where checkpoints live.
        step: optimizer steps done.
        write_shards: (folder, tag) -> writes the engine's files into folder/tag.
        state: what every rank needs to go on; must hold `fingerprint` and `best_file` (or None).
        keep: committed checkpoints to keep, this one included.

    Returns:
        Bytes written.
    """
    final, tag = folder / step_name(step), f".{step_name(step)}.tmp"
    temporary = folder / tag

    def start() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        temporary.mkdir()

    world.on_main(start)
    write_shards(folder, tag)
    torch.save(random_state(), temporary / f"rank-{world.rank:04d}.pt")
    world.barrier()

    def digests() -> dict[str, list[Any]]:
        """Every rank syncs and hashes its share of the files."""
        files = sorted(p for p in temporary.rglob("*") if p.is_file())[world.rank :: world.size]
        for path in files:
            sync(path)
        return {str(p.relative_to(temporary)): [p.stat().st_size, sha256(p)] for p in files}

    shards = {name: value for part in world.everywhere(digests) for name, value in part.items()}

    def commit() -> int:
        (temporary / "state.json").write_text(json.dumps(state))
        sync(temporary / "state.json")
        shards["state.json"] = [(temporary / "state.json").stat().st_size, sha256(temporary / "state.json")]
        remove(final)
        os.replace(temporary, final)
        write_json(
            final / COMMIT,
            {"step": step, "world_size": world.size, "fingerprint": state["fingerprint"], "files": shards},
        )
        sync(folder)
        _retain(folder, keep)
        return sum(size for size, _ in shards.values())

    return world.on_main(commit)


def committed(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(p.parent for p in folder.glob(f"step-*/{COMMIT}"))


def _retain(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and best weights that none of these refers to."""
    checkpoints = committed(folder)
    for old in checkpoints[:-keep]:
        (old / COMMIT).unlink(missing_ok=True)  # first: a half-removed folder must not look committed
        remove(old)
    wanted = {read_state(kept)["best_file"] for kept in checkpoints[-keep:]}
    for best in folder.glob("best-*.safetensors"):
        if best.name not in wanted:
            remove(best)
    for leftover in folder.glob(".step-*.tmp"):
        remove(leftover)


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())


def find(
    world: World, folder: Path, fingerprint: str, say: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """The newest committed checkpoint that is intact, and its state; None where there is none. Collective.

    Raises:
        UserError: checkpoints exist, but of another run or world size, or none of them is intact.
    """

    def choose() -> tuple[Path, dict[str, Any]] | None:
        damaged: list[str] = []
        for path in reversed(committed(folder)):
            try:
                marker = json.loads((path / COMMIT).read_text())
            except ValueError:
                damaged.append(f"{path / COMMIT} cannot be read")
                continue
            if marker["fingerprint"] != fingerprint:
                raise UserError(
                    f"{path}: belongs to a run with other settings or another ZeRO stage; use --fresh, or another run.dir"
                )
            if marker["world_size"] != world.size:
                raise UserError(
                    f"{path}: was written by {marker['world_size']} rank(s), this is a run of {world.size}; "
                    f"continue with {marker['world_size']}, or use --fresh"
                )
            problem = _damage(path, marker["files"])
            state = None if problem else read_state(path)
            if state and state["best_file"] and not (folder / state["best_file"]).is_file():
                problem = f"{folder / state['best_file']} is missing"
            if not problem:
                assert state is not None
                if damaged:
                    say(f"going on from {path.name}: {damaged[0]}")
                return path, state
            damaged.append(problem)
        if damaged:
            raise UserError(f"{damaged[0]}; no intact checkpoint is left in {folder}; restore one, or use --fresh")
        return None

    return world.on_main(choose)


def _damage(path: Path, files: dict[str, list[Any]]) -> str | None:
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes, not {size}"
        if sha256(file) != digest:
            return f"{file} was altered (its checksum is wrong)"
    return None


def load_random_state(checkpoint: Path, rank: int) -> None:
    # our own run folder, checked against the commit marker: as trusted as DeepSpeed's shards beside it
    restore_random_state(torch.load(checkpoint / f"rank-{rank:04d}.pt", weights_only=False))
