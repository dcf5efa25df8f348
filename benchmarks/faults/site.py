"""Where a trial runs: a folder, a small disk that can be filled, or two nodes with a link that can be cut."""

import os
import shutil
import subprocess
import zlib
from pathlib import Path

from benchmarks.faults.tiny import command, environment

_DISK_BYTES = 64 << 20
_ADDRESSES = ("10.77.0.1", "10.77.0.2")
_PORT = "29500"  # free, because a network namespace has its own ports
_LINK = "link0"


class Site:
    """A plain folder on this machine."""

    def __init__(self, folder: Path, ranks: int):
        self.folder, self.ranks = folder, ranks
        self.run = folder / "run"
        self.environment = environment(HF_HUB_OFFLINE="1", DS_ACCELERATOR="cpu")

    def commands(self, *arguments: str | Path) -> list[list[str]]:
        """Return one command for each node."""
        return [command(*arguments, ranks=self.ranks)]

    def __enter__(self) -> "Site":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def release(folder: Path) -> None:
    """Unmount the disk that a trial in this folder left mounted when the campaign was killed."""
    if (folder / "disk").is_mount():
        _call("umount", "--lazy", str(folder / "disk"))


class SmallDisk(Site):
    """The run folder is on its own file system, a tmpfs."""

    def __init__(self, folder: Path, ranks: int):
        super().__init__(folder, ranks)
        self.disk = folder / "disk"
        self.run = self.disk / "run"
        self._ballast = self.disk / "ballast"

    def __enter__(self) -> "SmallDisk":
        self.disk.mkdir()
        _call("mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "pkd-faults", str(self.disk))
        return self

    def __exit__(self, *_: object) -> None:
        """Move the content of the disk to a plain folder of the same name."""
        kept = self.folder / "disk.kept"
        self.empty()
        shutil.copytree(self.disk, kept, symlinks=True)
        release(self.folder)
        self.disk.rmdir()
        os.replace(kept, self.disk)

    def fill(self, free_bytes: int) -> None:
        """Fill the disk up to `free_bytes`, whatever the job writes meanwhile."""
        with open(self._ballast, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 65536)
            except OSError:
                file.truncate(max(0, file.tell() - free_bytes))

    def empty(self) -> None:
        self._ballast.unlink(missing_ok=True)


class TwoNodes(Site):
    """Two network namespaces joined by a link, with a launcher each; the disk is shared."""

    def __init__(self, folder: Path, ranks: int):
        super().__init__(folder, ranks)
        self._spaces = [f"pkd-faults-{zlib.crc32(str(folder).encode()):08x}-{node}" for node in range(2)]
        self._hosts = folder / "hosts"
        self.environment |= {"GLOO_SOCKET_IFNAME": _LINK, "TP_SOCKET_IFNAME": _LINK}

    def __enter__(self) -> "TwoNodes":
        first = self.ranks - self.ranks // 2
        self._hosts.write_text(f"node0 slots={first}\nnode1 slots={self.ranks - first}\n")
        self.remove()  # left by a campaign that was killed
        for space in self._spaces:
            _call("ip", "netns", "add", space)
        here, there = self._spaces
        _call("ip", "link", "add", _LINK, "netns", here, "type", "veth", "peer", "name", _LINK, "netns", there)
        for space, address in zip(self._spaces, _ADDRESSES, strict=True):
            _call("ip", "-n", space, "addr", "add", f"{address}/24", "dev", _LINK)
            _call("ip", "-n", space, "link", "set", "lo", "up")
            _call("ip", "-n", space, "link", "set", _LINK, "up")
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        for space in self._spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True, check=False)

    def commands(self, *arguments: str | Path) -> list[list[str]]:
        flags = ("--hostfile", str(self._hosts), "--no_ssh", "--master_addr", _ADDRESSES[0], "--master_port", _PORT)
        cores = sorted(os.sched_getaffinity(0))
        out = []
        for node, space in enumerate(self._spaces):
            # half of the cores each, so that a rank has as many threads as in the undisturbed run
            own = ",".join(map(str, cores[node::2] or cores))
            launcher = (*flags, "--node_rank", str(node))
            inside = command(*arguments, ranks=self.ranks, launcher=launcher)
            out.append(["ip", "netns", "exec", space, "taskset", "--cpu-list", own, *inside])
        return out

    def cut(self) -> None:
        _call("ip", "-n", self._spaces[0], "link", "set", _LINK, "down")

    def restore(self) -> None:
        _call("ip", "-n", self._spaces[0], "link", "set", _LINK, "up")


def _call(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True, text=True)
