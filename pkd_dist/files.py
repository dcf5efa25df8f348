"""Durable writes, disk space, and digests of files.

A file or a folder gets its name when its content is on disk, in this order: files, folders from the innermost out, the rename,
the parent folder. So neither a kill nor a power loss shows it incomplete, and what is written later, such as a marker, never
outlives it. Modes follow the umask, whatever the library that wrote a file chose.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

from pkd_dist.errors import FullDiskError, UserError


@contextlib.contextmanager
def written_atomically(path: Path, needed_bytes: int = 0) -> Iterator[Path]:
    """Yield a temporary path, of an empty file. At the end it durably becomes `path`; after a failure it is removed.

    It is in a temporary folder of its own, which is removed with all that a writer or a kill leaves in it.

    Raises:
        UserError: the disk is full.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with require_space(path.parent, needed_bytes, path.name):
            remove(scratch)
            scratch.mkdir()
            temporary = scratch / path.name
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)
            yield temporary
            os.chmod(temporary, mode)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        remove(scratch)


@contextlib.contextmanager
def folder_written_atomically(folder: Path) -> Iterator[Path]:
    """Yield a temporary, empty folder. At the end it durably becomes `folder`; after a failure it is removed.

    An earlier `folder` is removed once the new one is on disk.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    remove(temporary)
    try:
        temporary.mkdir()
        yield temporary
        _flush(temporary)
        remove(folder)
        move(temporary, folder)
    finally:
        remove(temporary)


def _flush(folder: Path) -> None:
    """Set the modes of all files and folders below a folder to those of new ones, and flush them to disk, innermost first."""
    probe = folder / ".mode"
    probe.touch()
    modes = stat.S_IMODE(probe.stat().st_mode), stat.S_IMODE(folder.stat().st_mode)
    probe.unlink()
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            os.chmod(path := Path(place, name), modes[0])
            sync(path)
        os.chmod(place, modes[1])
        sync(Path(place))


def make_folder(folder: Path) -> None:
    """Durably create a folder and its missing parents."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def move(source: Path, target: Path) -> None:
    """Durably rename a complete file or folder; one on another file system is copied, and removed then."""
    try:
        os.replace(source, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy = target.with_name(f".{target.name}.tmp")
        remove(copy)
        if source.is_dir():
            shutil.copytree(source, copy, symlinks=True)
            _flush(copy)
        else:
            shutil.copy2(source, copy)
            sync(copy)
        move(copy, target)
        remove(source)
    sync(target.parent)
    if source.parent.resolve() != target.parent.resolve():
        sync(source.parent)


def first_free(path: Path) -> Path:
    """Return the first of PATH.1, PATH.2, ... that does not exist."""
    number = 1
    while os.path.lexists(found := path.with_name(f"{path.name}.{number}")):
        number += 1
    return found


def write_atomically(path: Path, write: Callable[[Path], object], needed_bytes: int = 0) -> None:
    """Call `write` with a temporary path; see `written_atomically`."""
    with written_atomically(path, needed_bytes) as temporary:
        write(temporary)


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda tmp: tmp.write_text(text, encoding="utf-8"), len(text))


def read_object(path: Path) -> dict[str, object]:
    """Return the content of a JSON file that holds an object.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not such a file: not UTF-8, not JSON, NaN, nested too deeply, no object.
    """

    def reject(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=reject)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def is_full(error: BaseException) -> bool:
    """Return whether an error means that a disk or a quota is full.

    safetensors raises its own exception type, with the Rust I/O error as text.
    """
    return _has_code(error, errno.ENOSPC, errno.EDQUOT)


def is_denied(error: BaseException) -> bool:
    """Return whether an error means that a file may not be read or written."""
    return _has_code(error, errno.EACCES, errno.EPERM, errno.EROFS)


def _has_code(error: BaseException, *codes: int) -> bool:
    if isinstance(error, OSError) and error.errno in codes:
        return True
    return any(f"(os error {code})" in str(error) for code in codes)


@contextlib.contextmanager
def require_space(folder: Path, needed_bytes: int, what: str) -> Iterator[None]:
    """Guard work that writes into a folder.

    Args:
        folder: an existing folder.
        needed_bytes: to be written; 0 if unknown.
        what: is written, for the message.

    Raises:
        FullDiskError: less space is free, or the disk ran full during the work.
    """

    def disk_is_full() -> FullDiskError:
        free = shutil.disk_usage(folder).free
        space = f"it needs {needed_bytes:,} bytes, {free:,} are free" if needed_bytes else f"{free:,} bytes are free"
        return FullDiskError(f"{folder}: no space left for {what}: {space}; free some space and rerun the same command")

    if shutil.disk_usage(folder).free < needed_bytes:
        raise disk_is_full()
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise disk_is_full() from error


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def evict(path: Path) -> None:
    """Drop a synced file, or all files below a folder, from the page cache, so that the next read is from the disk."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def existing_parent(path: Path) -> Path:
    """Return a path if it exists, else the nearest of its parents that does."""
    path = path.absolute()
    return path if path.exists() else existing_parent(path.parent)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; 0 if it does not exist."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file() and not file.is_symlink())


def readable_bytes(count: int) -> str:
    """Return a number of bytes as people read it, such as `1.2 GB` (10^9 bytes)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_blocks(file)
        )


def _sha256_blocks(file: BinaryIO) -> str:  # Python 3.10 has no file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def digest_of(value: object) -> str:
    """Return a short digest of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def folder_digest(folder: Path, names: list[str] | None = None) -> str:
    """Return a digest of the names and contents of the files in a folder, or of those of `names` that exist."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and (names is None or p.name in names))
    return digest_of([[p.name, sha256(p)] for p in files])


def file_digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file below a folder, by its relative path."""
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def checksums(paths: Sequence[Path]) -> dict[str, str]:
    """Return the sha256 of the files at and below `paths`, hidden ones excepted; the keys begin with the name of the path."""
    found = {}
    for path in paths:
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            key = file.relative_to(path.parent)
            if file.is_file() and not any(part.startswith(".") for part in key.parts):
                found[key.as_posix()] = sha256(file)
    return found


def altered(paths: Sequence[Path], found: Mapping[str, str]) -> Iterator[tuple[Path, str]]:
    """Yield the files at and below `paths` that are missing or altered since `checksums` found these, with a message."""
    folders = {path.name: path.parent for path in paths}
    for key, digest in found.items():
        folder = folders.get(key.partition("/")[0])
        if folder is not None and (problem := changed_file(folder, {key: digest})):
            yield folder / key, problem


def changed_file(folder: Path, digests: dict[str, str]) -> str | None:
    """Return a message about the first file that is missing or altered; None if all are unchanged."""
    for name, digest in digests.items():
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
        if sha256(folder / name) != digest:
            return f"{folder / name} was altered"
    return None


def require_unaltered(path: Path, digest: str) -> None:
    """Raise UserError unless a file exists and has this sha256."""
    if not path.is_file() or sha256(path) != digest:
        raise UserError(f"{path}: was altered since it was written; rerun the same command to rebuild it")


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders that a killed job left in a folder into which nobody writes now.

    `.tmpXXXXXX` are those of safetensors, for which versions up to 0.1.0 did not make a folder.
    """
    for leftover in (*folder.glob(".*.tmp"), *folder.glob(".tmp??????")):
        remove(leftover)


def discard(folder: Path) -> None:
    """Remove a folder if it exists. At no moment, a power loss included, does it lack a part: its name goes first."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.tmp")
        remove(hidden)
        move(folder, hidden)
        remove(hidden)


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
