"""Target files through which Prometheus finds runs with its file-based discovery.

    DIR/pkd-DIGEST-NODE.json      DIGEST: of the absolute path of the run folder; NODE: index of the node, from 0

A run writes its file when its endpoint is up and touches it once a minute. A helper process, a shell that waits for the end of
a pipe from the run, removes the file however the run ends, `kill -9` included. If the helper dies with the run (node failure,
SLURM kills the whole step), the next start of the same run overwrites the file. After `STALE_SECONDS` without a touch, the
start of any other run or `pkd metrics targets DIR --sweep` removes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pkd_dist.errors import UserError
from pkd_dist.files import digest_of, write_json
from pkd_dist.network import own_addresses

STALE_SECONDS = 600.0
_TOUCH_SECONDS = 60.0
_OWNER = "__pkd_owner"
"""Prometheus drops labels with two leading underscores after discovery."""
_REMOVE = """trap '' TERM INT HUP USR1; read -r _; grep -q "$1" "$2" && rm -f "$2" """


def target_file(folder: Path, run: Path, node: int) -> Path:
    return folder / f"pkd-{digest_of(str(run.absolute()))}-{node}.json"


class Target:
    """The target file of a run on one node, from construction to `close`; use on the first rank of a node.

    Args:
        folder: discovery folder, created if missing.
        run: run folder.
        node: index of the node, from 0.
        host, port: address the endpoint listens on. A wildcard host is replaced by an address that other hosts can reach.
        https: whether the endpoint uses TLS. If so, a wildcard host is replaced by the host name, to match the certificate.

    Raises:
        UserError: the folder is not writable.
    """

    def __init__(self, folder: Path, run: Path, node: int, host: str, port: int, https: bool):
        self.file = target_file(folder, run, node)
        owner = uuid.uuid4().hex
        labels = {"run": str(run.absolute()), "node": str(node), "instance": instance(run, node), _OWNER: owner}
        if https:
            labels["__scheme__"] = "https"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(self.file, [{"targets": [reachable_address(host, port, https)], "labels": labels}])
        except OSError as error:
            raise UserError(
                f"metrics.discovery_dir: {folder} is not writable ({error.strerror}); choose another folder"
            ) from None
        sweep(folder)
        self._helper = subprocess.Popen(
            ["/bin/sh", "-c", _REMOVE, "sh", owner, str(self.file.absolute())],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._closed = threading.Event()
        threading.Thread(target=self._touch, name="target", daemon=True).start()

    def _touch(self) -> None:
        while not self._closed.wait(_TOUCH_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.file)

    def close(self) -> None:
        """Remove the file."""
        self._closed.set()
        assert self._helper.stdin is not None
        self._helper.stdin.close()  # as the end of this process would
        with contextlib.suppress(subprocess.TimeoutExpired):  # a hanging file system
            self._helper.wait(10)


def instance(run: Path, node: int) -> str:
    """Return the label `instance`. It does not depend on the host, so that a resumed run continues its series."""
    return f"{run.absolute()}/{node}"


def reachable_address(host: str, port: int, by_name: bool) -> str:
    """Return HOST:PORT at which other hosts reach a server that listens on `host`."""
    if host in ("", "0.0.0.0", "::"):
        host = socket.gethostname() if by_name else next(iter(own_addresses()), socket.gethostname())
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True)
class TargetFile:
    """A file in a discovery folder; `address` and `run` are empty if it is unreadable."""

    file: Path
    address: str
    run: str
    silent_seconds: float

    @property
    def stale(self) -> bool:
        return self.silent_seconds > STALE_SECONDS


def targets(folder: Path) -> Iterator[TargetFile]:
    """Yield the target files in a folder, sorted by name.

    Raises:
        OSError: the folder is not writable. A file is written to read the clock of the file system.
    """
    clock = folder / f".clock.{uuid.uuid4().hex}.tmp"
    clock.touch()
    now = clock.stat().st_mtime
    clock.unlink()
    for file in sorted(folder.glob("pkd-*.json")):
        with contextlib.suppress(FileNotFoundError):  # the run just ended
            silent_seconds = now - file.stat().st_mtime
            address, run = "", ""
            with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
                [group] = json.loads(file.read_text())
                address, run = group["targets"][0], group["labels"]["run"]
            yield TargetFile(file, address, run, silent_seconds)


def sweep(folder: Path) -> list[TargetFile]:
    """Remove and return the stale target files."""
    removed = []
    with contextlib.suppress(OSError):  # owned by another user
        for target in targets(folder):
            if target.stale:
                target.file.unlink(missing_ok=True)
                removed.append(target)
    return removed


def withdraw(folder: Path, run: Path) -> None:
    """Remove the target files of a run that has ended, for all nodes."""
    for file in folder.glob(target_file(folder, run, 0).name.replace("-0.json", "-*.json")):
        file.unlink(missing_ok=True)
