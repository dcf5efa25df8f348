"""Where Prometheus finds a run: a file in a folder that its file-based discovery watches, for as long as the run lives.

    DIR/pkd-DIGEST-NODE.json      DIGEST of the run folder's absolute path, NODE counted from 0

A run writes its file when its endpoint is up and renews the time stamp while it lives. A helper process, a shell that waits
for the run's end of a pipe to close, removes it however the run ends, kill -9 included. Where helper and run go together (a
node dies, SLURM kills a step), the same run's next start overwrites the file, any other run's start removes it once the time
stamp is `STALE_SECONDS` old, and so does `pkd metrics targets DIR --sweep`.
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
_RENEW_SECONDS = 60.0
_OWNER = "__pkd_owner"
"""Labels of two underscores are for finding a target, and not part of its series."""
_REMOVE = """trap '' TERM INT HUP USR1; read -r _; grep -q "$1" "$2" && rm -f "$2" """


def target_file(folder: Path, run: Path, node: int) -> Path:
    return folder / f"pkd-{digest_of(str(run.absolute()))}-{node}.json"


class Target:
    """A run's file from its making to `close`; use on the first rank of a node.

    Args:
        folder: made if missing.
        run: run folder.
        node: counted from 0.
        host, port: where the endpoint listens; a host that means every address is replaced by one that others reach.
        https: whether it speaks TLS: then a certificate decides, and this host's name is given, not an address.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path, run: Path, node: int, host: str, port: int, https: bool):
        self.file = target_file(folder, run, node)
        owner = uuid.uuid4().hex
        labels = {"run": str(run.absolute()), "node": str(node), "instance": instance(run, node), _OWNER: owner}
        if https:
            labels["__scheme__"] = "https"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(self.file, [{"targets": [address(host, port, https)], "labels": labels}])
        except OSError as error:
            raise UserError(
                f"metrics.discovery_dir: {folder} cannot be written ({error.strerror}); choose another"
            ) from None
        sweep(folder)
        self._helper = subprocess.Popen(
            ["/bin/sh", "-c", _REMOVE, "sh", owner, str(self.file.absolute())],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._closed = threading.Event()
        threading.Thread(target=self._renew, name="target", daemon=True).start()

    def _renew(self) -> None:
        while not self._closed.wait(_RENEW_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.file)

    def close(self) -> None:
        """Removes the file, as the end of this process would."""
        self._closed.set()
        assert self._helper.stdin is not None
        self._helper.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # a file system that hangs
            self._helper.wait(10)


def instance(run: Path, node: int) -> str:
    """The label `instance`: the same wherever the run goes on, so that its series go on too."""
    return f"{run.absolute()}/{node}"


def address(host: str, port: int, by_name: bool) -> str:
    """HOST:PORT under which another host reaches what listens on `host`."""
    if host in ("", "0.0.0.0", "::"):
        host = socket.gethostname() if by_name else next(iter(own_addresses()), socket.gethostname())
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True)
class Found:
    """A file in a discovery folder; `address` and `run` are empty where it cannot be read."""

    file: Path
    address: str
    run: str
    silent_seconds: float

    @property
    def stale(self) -> bool:
        return self.silent_seconds > STALE_SECONDS


def targets(folder: Path) -> Iterator[Found]:
    """The runs' files in a folder, by name.

    Raises:
        OSError: the folder cannot be written: its own clock is asked for.
    """
    clock = folder / f".clock.{uuid.uuid4().hex}.tmp"
    clock.touch()
    now = clock.stat().st_mtime
    clock.unlink()
    for file in sorted(folder.glob("pkd-*.json")):
        with contextlib.suppress(FileNotFoundError):  # it ended just now
            silent = now - file.stat().st_mtime
            where, run = "", ""
            with contextlib.suppress(ValueError, LookupError, TypeError):
                [group] = json.loads(file.read_text())
                where, run = group["targets"][0], group["labels"]["run"]
            yield Found(file, where, run, silent)


def sweep(folder: Path) -> list[Found]:
    """Removes the files of runs that have been silent for too long, and returns them."""
    gone = []
    with contextlib.suppress(OSError):  # another's to remove
        for found in targets(folder):
            if found.stale:
                found.file.unlink(missing_ok=True)
                gone.append(found)
    return gone


def withdraw(folder: Path, run: Path) -> list[Path]:
    """Removes the files of a run that is over, on whichever nodes it was."""
    gone = [file for file in folder.glob(target_file(folder, run, 0).name.replace("-0.json", "-*.json"))]
    for file in gone:
        file.unlink(missing_ok=True)
    return gone
