"""Record which states of a folder a power loss could have left, while a program writes it.

    python benchmarks/faults/recorder.py FOLDER STORE program.py ARGUMENTS

A file's content is certain as of its last fsync, and a name as of the last fsync of the folder that it is in; nothing else is.
STORE/cuts.jsonl gets a line before each fsync, rename, removal and new folder of the program, STORE/DIGEST each content.
"""

import hashlib
import json
import os
import resource
import runpy
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

VARIANTS = ("forgotten", "empty", "zeros")
_EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir")

Tree = dict[str, tuple[str | None, int] | None]
"""Path -> digest of its content on disk (None: it was never flushed) and its size at the cut; None for a folder."""


@dataclass(frozen=True)
class Cut:
    """A moment before `event`: the tree that is certain, and the tree as programs see it."""

    event: str
    certain: Tree
    seen: Tree


def rebuild(cut: Cut, variant: str, store: Path, folder: Path) -> None:
    """Write a state that a power loss at this cut may leave.

    Args:
        variant: `forgotten`: nothing beyond what is certain; `empty`: all names, but contents as of their last fsync;
            `zeros`: the same, with zeros up to the size.
    """
    for name, content in (cut.certain if variant == "forgotten" else cut.seen).items():
        path = folder / name
        if content is None:
            path.mkdir(parents=True, exist_ok=True)
            continue
        digest, size = content
        data = (store / digest).read_bytes() if digest else b""
        path.write_bytes(data.ljust(size, b"\0") if variant == "zeros" else data)


class Recorder:
    """Keeps what is certain of a folder, by inode; `install` has it notice what this process does. What exists is certain."""

    def __init__(self, folder: Path, store: Path):
        self._folder, self._store = folder.resolve(), store
        self._entries: dict[int, dict[str, tuple[int, bool]]] = {}
        self._contents: dict[int, str] = {}
        self._held: list[int] = []  # descriptors, so that the number of no inode is used again
        self._lock, self._busy = threading.RLock(), False
        self._last: tuple[Tree, Tree] | None = None
        self._fsync = os.fsync
        for place, _, names in os.walk(self._folder):
            for path in (place, *(os.path.join(place, name) for name in names)):
                self._flushed(os.open(path, os.O_RDONLY))

    def install(self) -> None:
        os.fsync = self.fsync
        sys.addaudithook(lambda event, args: self.cut(event, args[0]) if event in _EVENTS else None)

    def fsync(self, descriptor: int) -> None:
        """Flush as `os.fsync` does; from then on the content is certain."""
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        self._fsync(descriptor)
        if Path(path).is_relative_to(self._folder):
            with self._lock:
                self.cut("os.fsync", path)
                self._flushed(os.dup(descriptor))

    def _flushed(self, descriptor: int) -> None:
        inode, mode = os.fstat(descriptor).st_ino, os.fstat(descriptor).st_mode
        known = inode in self._entries or inode in self._contents
        if stat.S_ISDIR(mode):
            with os.scandir(descriptor) as found:
                self._entries[inode] = {one.name: (one.inode(), one.is_dir(follow_symlinks=False)) for one in found}
        else:
            content = Path(f"/proc/self/fd/{descriptor}").read_bytes()
            self._contents[inode] = digest = hashlib.sha256(content).hexdigest()
            (self._store / digest).write_bytes(content)
        if known:
            os.close(descriptor)
        else:
            self._held.append(descriptor)

    def cut(self, event: str, path: object) -> None:
        """Note the state before an event, unless it is the one noted last."""
        with self._lock:
            if self._busy:
                return
            self._busy = True
            with suppress(FileNotFoundError):  # a thread removed it meanwhile
                trees = dict(self._certain(self._folder.stat().st_ino, "")), dict(self._seen(self._folder, ""))
                if trees != self._last:
                    self._last = trees
                    with open(self._store / "cuts.jsonl", "a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(Cut(f"{event} {path}", *trees))) + "\n")
            self._busy = False

    def _certain(self, inode: int, prefix: str) -> Iterator[tuple[str, tuple[str | None, int] | None]]:
        for name, (child, is_folder) in self._entries.get(inode, {}).items():
            yield f"{prefix}{name}", None if is_folder else (self._contents.get(child), 0)
            if is_folder:
                yield from self._certain(child, f"{prefix}{name}/")

    def _seen(self, folder: Path, prefix: str) -> Iterator[tuple[str, tuple[str | None, int] | None]]:
        for entry in list(os.scandir(folder)):
            if entry.is_dir(follow_symlinks=False):
                yield f"{prefix}{entry.name}", None
                yield from self._seen(Path(entry.path), f"{prefix}{entry.name}/")
            else:
                status = entry.stat(follow_symlinks=False)
                yield f"{prefix}{entry.name}", (self._contents.get(status.st_ino), status.st_size)


def read(store: Path) -> list[Cut]:
    """Return the cuts of a recording, in order."""
    return [Cut(**json.loads(line)) for line in (store / "cuts.jsonl").read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    folder, store, *sys.argv = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    Recorder(Path(folder), Path(store)).install()
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
