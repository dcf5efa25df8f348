"""Two hosts to connect and to cut off from one another: namespaces of this machine, joined by a virtual cable.

A host is one process with a network, a name, a process table and an /etc/hosts of its own; as on Debian, that file says
127.0.1.1 for the host's own name. The process lives as long as a pipe from here is open, so nothing outlives the tests,
however they end: with it go all that run on its host, its interfaces and its names. Making a host needs root.
"""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

ADDRESSES = {"node0": "10.99.0.1", "node1": "10.99.0.2"}
BOOT = """
mount --bind "$1" /etc/hosts
hostname "$0"
ip link set lo up
echo up
exec cat
"""


class Host:
    """One host, from `with Host(...)` to its end."""

    def __init__(self, name: str, folder: Path):
        self.name, self._file = name, folder / f"{name}.hosts"
        known = ADDRESSES | {"localhost": "127.0.0.1", name: "127.0.1.1"}
        self._file.write_text("".join(f"{address} {name}\n" for name, address in known.items()))

    def __enter__(self) -> "Host":
        boot = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-ec", BOOT]
        self._root = subprocess.Popen(
            [*boot, self.name, str(self._file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.namespace = str(self._root.pid)
        if self._root.stdout.readline() != "up\n":
            raise OSError(f"{self.name} does not start: no right to make namespaces here?")
        return self

    def __exit__(self, *_: object) -> None:
        self._root.communicate(timeout=20)  # closes the pipe

    def on(self, *command: str) -> list[str]:
        """A command of this host, as one that can be started here."""
        pid = f"--pid=/proc/{self.namespace}/ns/pid_for_children"
        return ["nsenter", f"--target={self.namespace}", "--net", "--uts", "--mount", pid, *command]

    def on_its_network(self, *command: str) -> list[str]:
        """Like `on`, but sees the processes and files of this machine, other hosts among them."""
        return ["nsenter", f"--target={self.namespace}", "--net", "--uts", *command]

    def link(self, state: str) -> None:
        """`down` cuts the cable, `up` mends it."""
        subprocess.run(self.on("ip", "link", "set", "eth0", state), check=True)


@contextlib.contextmanager
def cable(folder: Path) -> Iterator[list[Host]]:
    """The two hosts, joined."""
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(Host(name, folder)) for name in ADDRESSES]
        ends = [["eth0", "netns", host.namespace] for host in hosts]
        subprocess.run(["ip", "link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1]], check=True)
        for host in hosts:
            subprocess.run(host.on("ip", "address", "add", f"{ADDRESSES[host.name]}/24", "dev", "eth0"), check=True)
            host.link("up")
        yield hosts
