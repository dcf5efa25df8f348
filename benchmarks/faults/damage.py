"""What happens to files on a bad disk: a flipped bit, a lost end, a lost file, a torn line."""

from __future__ import annotations

import json
import os
from pathlib import Path


def newest_checkpoint(run: Path) -> list[Path]:
    """The files of the checkpoint that was committed last; none where there is no checkpoint."""
    markers = _by_age(run, "*checkpoints/step-*/commit.json")
    return sorted(p for p in markers[-1].parent.rglob("*") if p.is_file()) if markers else []


def newest_best(run: Path) -> list[Path]:
    """The best weights that were written last."""
    return _by_age(run, "*checkpoints/best-*")[-1:]


def shards(run: Path) -> list[Path]:
    return sorted(run.glob("cache/shard-*"))


def newest_records(run: Path) -> list[Path]:
    return _by_age(run, "*metrics.jsonl")[-1:]


def stage_markers(run: Path) -> list[Path]:
    return sorted(run.glob("stages/*.json"))


def _by_age(run: Path, pattern: str) -> list[Path]:
    return sorted(run.glob(pattern), key=lambda path: path.stat().st_mtime_ns)


def pick(files: list[Path], which: float) -> Path | None:
    return files[int(which * len(files))] if files else None


def apply(kind: str, path: Path, where: float) -> str:
    """Damages a file in place, as a running reader would see it; returns what was done, in words."""
    size = path.stat().st_size
    place = int(where * size)
    if kind == "delete":
        path.unlink()
        return "deleted"
    if kind == "truncate":
        os.truncate(path, place)
        return f"cut from {size} to {place} bytes"
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0] ^ (1 << int(where * 8))
        file.seek(place)
        file.write(bytes([byte]))
    return f"bit {int(where * 8)} of byte {place} flipped"


def tear(path: Path, where: float) -> str:
    """Leaves at a file's end what a write that was cut short leaves: the first part of a line."""
    line = path.read_bytes().splitlines()[-1]
    torn = line[: 1 + int(where * (len(line) - 1))]
    with open(path, "ab") as file:
        file.write(torn)
    return f"{len(torn)} bytes of a torn line appended"


def needed(run: Path, path: Path) -> bool:
    """Whether a run still needs this file: one that a checkpoint's commit marker lists, best weights, a shard."""
    if path.parent.name == "cache":
        return True
    folder = next(parent for parent in path.parents if parent.name.endswith("checkpoints"))
    if _done(run, "teacher" if folder.name.startswith("teacher") else "distill"):
        return path.name.startswith("best-") and not _done(run, "export")
    return path.name.startswith("best-") or path.name in json.loads((path.parent / "commit.json").read_text())["files"]


def _done(run: Path, stage: str) -> bool:
    marker = run / f"stages/{stage}.json"
    return marker.exists() and json.loads(marker.read_text())["done"]
