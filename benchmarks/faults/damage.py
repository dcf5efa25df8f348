"""Damage files as a bad disk does: a flipped bit, a lost end, a lost file, a torn line."""

import json
import os
from collections.abc import Callable
from pathlib import Path


def _by_age(run: Path, pattern: str) -> list[Path]:
    return sorted(run.glob(pattern), key=lambda path: path.stat().st_mtime_ns)


def newest_checkpoint(run: Path) -> list[Path]:
    """Return the files of the last committed checkpoint; an empty list if there is none."""
    markers = _by_age(run, "*checkpoints/step-*/commit.json")
    return sorted(p for p in markers[-1].parent.rglob("*") if p.is_file()) if markers else []


CANDIDATES: dict[str, Callable[[Path], list[Path]]] = {
    "damage-checkpoint": newest_checkpoint,
    "damage-best": lambda run: _by_age(run, "*checkpoints/best-*")[-1:],
    "damage-cache": lambda run: sorted(run.glob("cache/shard-*")),
    "tear-metrics": lambda run: _by_age(run, "*metrics.jsonl")[-1:],
    "tear-marker": lambda run: sorted(run.glob("stages/*.json")),
}
"""Fault -> run folder -> the files that it can hit."""


def pick(fault: str, run: Path, which: float) -> Path | None:
    files = CANDIDATES[fault](run)
    return files[int(which * len(files))] if files else None


def apply(kind: str, path: Path, where: float) -> str:
    """Damage a file in place (delete | truncate | tear | flip), as a running reader would see it; return a description."""
    size = path.stat().st_size
    place = int(where * size)
    if kind == "delete":
        path.unlink()
        return "deleted"
    if kind == "truncate":
        os.truncate(path, place)
        return f"cut from {size} to {place} bytes"
    if kind == "tear":  # the first part of a line, as an interrupted write leaves it
        line = path.read_bytes().splitlines()[-1]
        torn = line[: 1 + int(where * (len(line) - 1))]
        with open(path, "ab") as file:
            file.write(torn)
        return f"{len(torn)} bytes of a torn line appended"
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0] ^ (1 << int(where * 8))
        file.seek(place)
        file.write(bytes([byte]))
    return f"bit {int(where * 8)} of byte {place} flipped"


def needed(run: Path, path: Path) -> bool:
    """Return whether a run still needs a file: a shard, best weights, or a file that a commit marker lists."""
    if path.parent.name == "cache":
        return True
    folder = next(parent for parent in path.parents if parent.name.endswith("checkpoints"))
    if _done(run, "teacher" if folder.name.startswith("teacher") else "distill"):
        return path.name.startswith("best-") and not _done(run, "export")
    return path.name.startswith("best-") or path.name in json.loads((path.parent / "commit.json").read_text())["files"]


def _done(run: Path, stage: str) -> bool:
    marker = run / f"stages/{stage}.json"
    return marker.exists() and json.loads(marker.read_text())["done"]
