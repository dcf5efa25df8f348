"""Finds the rank of this process from its environment, before anything heavy is imported.

The first of these that applies is used: the variables of `deepspeed` and `torchrun`; MPI through mpi4py under `mpirun`;
SLURM's variables under `srun`; otherwise there is one rank. Users need not export anything: the address of rank 0 and the
network interface between nodes are found as well. MASTER_ADDR, MASTER_PORT, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME are
kept if set.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pkd_dist.errors import UserError
from pkd_dist.network import (
    free_port,
    interface_towards,
    interfaces,
    is_loopback,
    local_address_towards,
    means_loopback,
    own_addresses,
)

if TYPE_CHECKING:
    from mpi4py import MPI

_MPIRUN_VARIABLES = ("OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_RANK")
_PMI_VARIABLES = ("PMI_RANK", "PMIX_RANK")  # also set by srun
_CONNECT_SECONDS = 3.0


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of the run.

    Attributes:
        local_rank, local_world_size: among the ranks of its node.
        launcher: what started the process.
        master_addr, master_port: where rank 0 listens. With one rank, port 0 means any free port.
        interface: the network interface that reaches the other nodes, loopback if all ranks are on one host; None if
            neither is known.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launcher: str
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    interface: str | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("WORLD_SIZE", self.world_size, range(1, sys.maxsize)),
            ("RANK", self.rank, range(self.world_size)),
            ("LOCAL_RANK", self.local_rank, range(sys.maxsize)),
            ("MASTER_PORT", self.master_port, range(0 if self.world_size == 1 else 1, 65536)),
        ):
            if value not in allowed:
                most = f" to {allowed[-1]}" if allowed.stop < sys.maxsize else " or more"
                raise UserError(f"environment: {name} is {value}, expected {allowed.start}{most}")

    @property
    def main(self) -> bool:
        return self.rank == 0

    def export(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Set the variables that torch.distributed and DeepSpeed read."""
        environ.update(
            RANK=str(self.rank),
            LOCAL_RANK=str(self.local_rank),
            WORLD_SIZE=str(self.world_size),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port or free_port()),
        )
        if self.interface:
            # By default gloo and NCCL use the address of the host name, which is 127.0.1.1 on Debian.
            if self.world_size == 1:  # what other jobs need does not concern one rank
                environ["GLOO_SOCKET_IFNAME"] = self.interface
            environ.setdefault("GLOO_SOCKET_IFNAME", self.interface)
            environ.setdefault("NCCL_SOCKET_IFNAME", self.interface)


def discover(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Return the rank of this process from `environ`, with the network interface toward rank 0.

    Raises:
        UserError: a variable is missing, not an integer or out of range, this host cannot reach the address of rank 0, or
            it lacks the interface that GLOO_SOCKET_IFNAME names.
    """
    ranks = _find(environ)
    names = [name for name in environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    for name in names if ranks.world_size > 1 else []:
        if name not in interfaces():
            raise UserError(
                f"environment: GLOO_SOCKET_IFNAME is {name!r}, which {socket.gethostname()} does not have; allowed: "
                f"{', '.join(sorted(interfaces()))}; unset it to use the interface towards rank 0"
            )
    return ranks


def _find(environ: Mapping[str, str]) -> Ranks:
    if all(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _from_variables(environ)
    if any(name in environ for name in _MPIRUN_VARIABLES):
        return _from_mpi(environ)
    if "SLURM_STEP_ID" in environ and _slurm_world_size(environ) > 1:
        return _from_slurm(environ)
    if any(name in environ for name in _PMI_VARIABLES):
        return _from_mpi(environ)
    if "RANK" in environ and _number(environ, "WORLD_SIZE", 1) > 1:
        raise UserError(
            "environment: RANK and WORLD_SIZE are set, but LOCAL_RANK is not; set LOCAL_RANK and LOCAL_WORLD_SIZE too "
            "(0 and 1 with one rank per host), start with torchrun, or unset RANK to run one rank alone"
        )
    return _with_interface(Ranks(0, 0, 1, 1, "python"))


def first_of_node(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this is the first process of its node. For messages before or after a failed `discover`."""
    names = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
    return all(environ.get(name, "0") == "0" for name in names)


def speaks_without_rank_0(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether this rank speaks for its node while rank 0 cannot be reached."""
    return first_of_node(environ) or environ.get("RANK") == "1"


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name) or default
    try:
        return int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(
            f"environment: {name} is {'not set' if text is None else repr(text)}, expected an integer; "
            "start under deepspeed, torchrun, mpirun or srun, or export it"
        ) from None


def _with_interface(ranks: Ranks) -> Ranks:
    """Add the interface toward rank 0 if there is more than one node; loopback if its address is there."""
    several_nodes = ranks.local_world_size < ranks.world_size
    if several_nodes or means_loopback(ranks.master_addr):
        return replace(ranks, interface=interface_towards(ranks.master_addr))
    return ranks


# ------------------------------------------------------------------------------------------------------- launchers


def _from_variables(environ: Mapping[str, str]) -> Ranks:
    """Read the ranks per node from torchrun's LOCAL_WORLD_SIZE or deepspeed's LOCAL_SIZE (uneven hostfiles too)."""
    rank, local_rank, world = (_number(environ, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    default = (
        _slurm_local_size(environ) if "SLURM_STEP_TASKS_PER_NODE" in environ else world
    )  # mapped by hand under srun
    local = _number(environ, "LOCAL_WORLD_SIZE", _number(environ, "LOCAL_SIZE", default))
    address, port = "127.0.0.1", 0
    if (
        world > 1 or environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    ):  # torchrun hosts the store, even for one rank
        port = _number(environ, "MASTER_PORT")
        if not (address := environ.get("MASTER_ADDR", "")):
            raise UserError(
                "environment: RANK and WORLD_SIZE are set, but MASTER_ADDR is not; export the address of rank 0"
            )
    return _with_interface(Ranks(rank, local_rank, world, local, "deepspeed or torchrun", address, port))


def _from_slurm(environ: Mapping[str, str]) -> Ranks:
    rank, local_rank = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID")
    world, local = _slurm_world_size(environ), _slurm_local_size(environ)
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if local == world else _slurm_master(environ))
    # Jobs and steps share nodes: each gets its own port, below the ephemeral ports and torch's default 29500.
    default_port = 10000 + (97 * _number(environ, "SLURM_JOB_ID", 0) + _number(environ, "SLURM_STEP_ID")) % 19000
    port = _number(environ, "MASTER_PORT", default_port)
    return _with_interface(Ranks(rank, local_rank, world, local, "srun", address, port))


def _slurm_world_size(environ: Mapping[str, str]) -> int:
    """Return the number of tasks of the step. An interactive shell is a step of one task in a larger job."""
    return _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))


def _slurm_local_size(environ: Mapping[str, str]) -> int:
    counts = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_NTASKS_PER_NODE", "1")))
    return counts[min(_number(environ, "SLURM_NODEID", 0), len(counts) - 1)]


def _tasks_per_node(text: str) -> list[int]:
    """Parse SLURM's notation: `2(x2),1` is [2, 2, 1]."""
    parts = (part.rstrip(")").partition("(x") for part in text.split(","))
    try:
        return [int(count) for count, _, times in parts for _ in range(int(times or 1))]
    except ValueError:
        raise UserError(
            f"environment: SLURM's tasks per node are {text!r}, expected a list such as '2(x2),1'"
        ) from None


def first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list: `gpu01-ib` for `gpu[01-03,07]-ib,login`."""
    return re.sub(r"\[(\w+)[^]]*]", r"\1", nodelist).partition(",")[0]


def _slurm_master(environ: Mapping[str, str]) -> str:
    """Return the first host of the step if its name resolves to that host here, otherwise the node that ran srun."""
    host = first_host(environ.get("SLURM_STEP_NODELIST", ""))
    with contextlib.suppress(OSError, UnicodeError):
        # Only on the first node may this name resolve to loopback (Debian's 127.0.1.1).
        if not is_loopback(local_address_towards(host)) or environ.get("SLURM_NODEID") == "0":
            return host
    if address := environ.get("SLURM_LAUNCH_NODE_IPADDR"):
        return address
    raise UserError(
        f"srun: the first host of the step {host!r} does not resolve on {socket.gethostname()}; export MASTER_ADDR"
    )


def _from_mpi(environ: Mapping[str, str]) -> Ranks:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(f"mpirun: mpi4py cannot load an MPI library ({error}); install Open MPI or MPICH") from None
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    size, local_size = world.Get_size(), node.Get_size()
    # Rank 0 decides: mpirun exports a shell's variables only on the host where it runs.
    address, port = world.bcast((environ.get("MASTER_ADDR"), _number(environ, "MASTER_PORT", free_port())))
    address = address or ("127.0.0.1" if local_size == size else _mpi_master(world, node, port))
    ranks = _with_interface(Ranks(world.Get_rank(), node.Get_rank(), size, local_size, "mpirun", address, port))
    MPI.Finalize()  # so that mpirun does not call a later os._exit improper
    return ranks


def _mpi_master(world: MPI.Comm, node: MPI.Comm, port: int) -> str:
    """Return an address of rank 0 to which every other node has connected; a host name need not resolve there."""
    main = world.Get_rank() == 0
    on_first_node = node.bcast(main)  # rank 0 is the first of its node
    with _listener(port, world.Get_size()) if main else contextlib.nullcontext():
        addresses = world.bcast(own_addresses())
        tests = not on_first_node and node.Get_rank() == 0
        reached = world.allgather({a for a in addresses if _connects(a, port)} if tests else set(addresses))
    for address in addresses:
        if all(address in found for found in reached):
            return str(address)
    raise UserError(
        f"mpirun: not every node can reach rank 0 ({', '.join(addresses) or 'no address but loopback'}) at port {port}; "
        "open the firewall, or set address and port: mpirun -x MASTER_ADDR=... -x MASTER_PORT=..."
    )


def _listener(port: int, backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", port), backlog=backlog)


def _connects(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), _CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
