"""Files that are whole or absent: written beside their place, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pkd_dist.errors import UserError


@contextlib.contextmanager
def written_atomically(path: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """A temporary path to write to, whose file is synced and renamed to `path` at the end. A failure leaves none.

    Raises:
        UserError: the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with require_space(path.parent, needed_bytes, path.name):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], Any], needed_bytes: int = 0) -> None:
    """Calls `write(temporary path)`; see `written_atomically`."""
    with written_atomically(path, needed_bytes) as temporary:
        write(temporary)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda tmp: tmp.write_text(text, encoding="utf-8"), len(text))


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full (safetensors hides the number in its text)."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in codes:
        return True
    return any(f"(os error {code})" in str(error) for code in codes)


@contextlib.contextmanager
def require_space(folder: Path, needed_bytes: int, what: str) -> Iterator[None]:
    """Work that writes so many bytes (0: it is not known how many) into a folder that exists.

    Raises:
        UserError: the disk has less, or got full all the same. Says how many bytes were needed.
    """

    def full(needed: str) -> UserError:
        free = shutil.disk_usage(folder).free
        return UserError(
            f"{folder}: no space left for {what}: it needs {needed} bytes, {free:,} are free; free some and run the same "
            "command again"
        )

    if shutil.disk_usage(folder).free < needed_bytes:
        raise full(f"{needed_bytes:,}")
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise full(f"{needed_bytes:,}" if needed_bytes else f"more than {shutil.disk_usage(folder).free:,}") from error


def sync(path: Path) -> None:
    """Flushes a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_blocks(file)
        )


def _sha256_blocks(file: Any) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """A short digest of anything JSON can hold, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def folder_digest(folder: Path, names: list[str] | None = None) -> str:
    """A digest of the files in a folder (of those named, where they exist): names and contents."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and (names is None or p.name in names))
    return digest_of([[p.name, sha256(p)] for p in files])


def file_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file in a folder and below, by its path from there."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def changed_file(folder: Path, digests: dict[str, str]) -> str | None:
    """The first file that is not as it was, in words; None where all are."""
    for name, digest in digests.items():
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
        if sha256(folder / name) != digest:
            return f"{folder / name} was altered"
    return None


def require_unaltered(path: Path, digest: str) -> None:
    """Raises UserError where a file is not the one of this sha256."""
    if not path.is_file() or sha256(path) != digest:
        raise UserError(f"{path}: was altered since it was written; the same command makes it again")


def remove(path: Path) -> None:
    """Removes a file or a folder, present or not."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
