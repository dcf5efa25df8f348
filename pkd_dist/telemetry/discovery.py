"""Target files through which Prometheus finds runs with its file-based discovery.

    DIR/pkd-DIGEST-NODE.json      DIGEST: of the absolute path of the run folder; NODE: index of the node, from 0

A run writes its file when its endpoint is up and touches it once a minute. An end that is accounted for removes it (`Target.close`).
After a crash, `kill -9` and a failed node included, the file stays: Prometheus keeps the target, cannot reach it, and an alert
fires. The next start of the same run replaces the file. `EXPIRY_SECONDS` after the last touch, the start of any other run or
`pkd metrics targets DIR --sweep` removes it.

By then another run may listen on the same address. Each scrape therefore names the file it comes from (`PARAMETER`), and an
endpoint rejects scrapes that are meant for another run.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pkd_dist.errors import UserError
from pkd_dist.files import digest_of, write_json
from pkd_dist.network import host_and_port, own_addresses

STALE_SECONDS = 600.0
"""A file that is silent for longer belongs to a run that has crashed."""
EXPIRY_SECONDS = 24 * 3600.0
"""The range in the rules PkdRunCrashed and PkdTargetDown is the same."""
PARAMETER = "target"
"""Query parameter of a scrape: the name of the target file without its extension."""
_TOUCH_SECONDS = 60.0
_OWNER = "__pkd_owner"
"""Prometheus drops labels with two leading underscores after discovery."""


def target_file(folder: Path, run: Path, node: int) -> Path:
    return folder / f"{target_name(run, node)}.json"


def target_name(run: Path, node: int) -> str:
    return f"pkd-{digest_of(str(run.absolute()))}-{node}"


class Target:
    """The target file of a run on one node, kept alive until `close`; use on the first rank of a node.

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
        self._owner = uuid.uuid4().hex
        labels = {"run": str(run.absolute()), "node": str(node), "instance": instance(run, node), _OWNER: self._owner}
        labels[f"__param_{PARAMETER}"] = target_name(run, node)
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
        self._closed = threading.Event()
        threading.Thread(target=self._touch, name="target", daemon=True).start()

    def _touch(self) -> None:
        while not self._closed.wait(_TOUCH_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.file)

    def close(self, remove: bool = True) -> None:
        """Stop touching the file.

        Args:
            remove: remove it, unless another process has resumed the run and replaced it.
        """
        self._closed.set()
        with contextlib.suppress(OSError):
            if remove and self._owner in self.file.read_text():
                self.file.unlink()


def instance(run: Path, node: int) -> str:
    """Return the label `instance`. It does not depend on the host, so that a resumed run continues its series."""
    return f"{run.absolute()}/{node}"


def reachable_address(host: str, port: int, by_name: bool) -> str:
    """Return HOST:PORT at which other hosts reach a server that listens on `host`."""
    if host in ("", "0.0.0.0", "::"):
        host = socket.gethostname() if by_name else next(iter(own_addresses()), socket.gethostname())
    return host_and_port(host, port)


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

    @property
    def expired(self) -> bool:
        return self.silent_seconds > EXPIRY_SECONDS


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
    """Remove and return the expired target files."""
    removed = []
    with contextlib.suppress(OSError):  # owned by another user
        for target in targets(folder):
            if target.expired:
                target.file.unlink(missing_ok=True)
                removed.append(target)
    return removed


def withdraw(folder: Path, run: Path, first_node: int = 0) -> list[Path]:
    """Remove the target files of a run that has ended, and return them; alerts on its crash end.

    Args:
        first_node: only those of this node and of later ones.
    """
    prefix, removed = target_name(run, 0).removesuffix("0"), []
    for file in sorted(folder.glob(f"{prefix}*.json")):
        node = file.stem.removeprefix(prefix)
        if node.isdigit() and int(node) >= first_node:
            file.unlink(missing_ok=True)
            removed.append(file)
    return removed
