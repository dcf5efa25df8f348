"""Where this process stands among the others: found from its environment, before anything heavy is imported.

In this order: the variables that `deepspeed` and `torchrun` set; MPI's own world through mpi4py under `mpirun`; SLURM's
variables under `srun`; else there is one rank. Nobody needs to export anything: where rank 0 listens and over which
interface nodes talk is found here too, and a user's MASTER_ADDR, MASTER_PORT, GLOO_ and NCCL_SOCKET_IFNAME are kept.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from pkd_dist.errors import UserError
from pkd_dist.network import free_port, interface_towards, is_loopback, local_address_towards, own_addresses

_MPIRUN_VARIABLES = ("OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_RANK")
_PMI_VARIABLES = ("PMI_RANK", "PMIX_RANK")  # srun sets these too
_CONNECT_SECONDS = 3.0


@dataclass(frozen=True)
class Ranks:
    """Where this process stands.

    `launcher` is what started it, `master_addr` and `master_port` are where rank 0 listens, and `interface` is the
    network interface by which other nodes are reached; None where no other node takes part.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launcher: str
    master_addr: str = "127.0.0.1"
    master_port: int = 0  # 0, for one rank alone: any free port
    interface: str | None = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def export(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Tells torch.distributed and DeepSpeed, which read the environment."""
        environ.update(
            RANK=str(self.rank),
            LOCAL_RANK=str(self.local_rank),
            WORLD_SIZE=str(self.world_size),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port or free_port()),
        )
        if self.interface:
            # Left alone, gloo and NCCL take the host name's address, which on Debian is 127.0.1.1.
            environ.setdefault("GLOO_SOCKET_IFNAME", self.interface)
            environ.setdefault("NCCL_SOCKET_IFNAME", self.interface)


def discover(environ: Mapping[str, str] = os.environ) -> Ranks:
    """Finds this process's place from `environ`, and the way to rank 0 from this host's interfaces.

    Raises:
        UserError: a variable is missing or not a number, or rank 0's address cannot be reached from here.
    """
    if all(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _from_variables(environ)
    if any(name in environ for name in _MPIRUN_VARIABLES):
        return _from_mpi(environ)
    if "SLURM_STEP_ID" in environ and _slurm_world_size(environ) > 1:
        return _from_slurm(environ)
    if any(name in environ for name in _PMI_VARIABLES):
        return _from_mpi(environ)
    return Ranks(0, 0, 1, 1, "python")


def first_of_node(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process speaks for its node where `discover` failed: as far as its environment says."""
    names = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")
    return all(environ.get(name, "0") == "0" for name in names)


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name) or default
    try:
        return int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UserError(
            f"environment: {name} is {'not set' if text is None else repr(text)}, where a whole number is needed; "
            "start under deepspeed, torchrun, mpirun or srun, or export it"
        ) from None


def _place(rank: int, local_rank: int, world: int, local_world: int, launcher: str, address: str, port: int) -> Ranks:
    """The ranks of a launcher, with the interface towards rank 0 where more than one node takes part."""
    interface = interface_towards(address) if local_world < world else None
    return Ranks(rank, local_rank, world, local_world, launcher, address, port, interface)


# ------------------------------------------------------------------------------------------------------- launchers


def _from_variables(environ: Mapping[str, str]) -> Ranks:
    """torchrun says how many ranks a node has in LOCAL_WORLD_SIZE, deepspeed in LOCAL_SIZE (uneven hostfiles too)."""
    rank, local_rank, world = (_number(environ, name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    default = _slurm_local_size(environ) if "SLURM_STEP_TASKS_PER_NODE" in environ else world  # mapped under srun
    local = _number(environ, "LOCAL_WORLD_SIZE", _number(environ, "LOCAL_SIZE", default))
    address, port = "127.0.0.1", 0
    if world > 1 or environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun holds the store, for one rank too
        port = _number(environ, "MASTER_PORT")
        if not (address := environ.get("MASTER_ADDR", "")):
            raise UserError("environment: RANK and WORLD_SIZE are set, but MASTER_ADDR is not; export rank 0's address")
    return _place(rank, local_rank, world, local, "deepspeed or torchrun", address, port)


def _from_slurm(environ: Mapping[str, str]) -> Ranks:
    rank, local_rank = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID")
    world, local = _slurm_world_size(environ), _slurm_local_size(environ)
    address = environ.get("MASTER_ADDR") or ("127.0.0.1" if local == world else _slurm_master(environ))
    # Jobs and their steps share nodes: neighbours get ports of their own, below the ephemeral ones and torch's 29500.
    port = 10000 + (97 * _number(environ, "SLURM_JOB_ID", 0) + _number(environ, "SLURM_STEP_ID")) % 19000
    return _place(rank, local_rank, world, local, "srun", address, _number(environ, "MASTER_PORT", port))


def _slurm_world_size(environ: Mapping[str, str]) -> int:
    """The step's tasks; an interactive shell is a step of one in a job of many."""
    return _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))


def _slurm_local_size(environ: Mapping[str, str]) -> int:
    counts = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_NTASKS_PER_NODE", "1")))
    return counts[min(_number(environ, "SLURM_NODEID", 0), len(counts) - 1)]


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's `2(x2),1` -> [2, 2, 1]."""
    parts = (part.rstrip(")").partition("(x") for part in text.split(","))
    return [int(count) for count, _, times in parts for _ in range(int(times or 1))]


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `gpu[01-03,07]-ib,login` -> `gpu01-ib`."""
    return re.sub(r"\[(\w+)[^]]*]", r"\1", nodelist).partition(",")[0]


def _slurm_master(environ: Mapping[str, str]) -> str:
    """The step's first host, where its name means that host from here; else the node where srun was started."""
    host = first_host(environ.get("SLURM_STEP_NODELIST", ""))
    with contextlib.suppress(OSError, UnicodeError):
        # The first node alone may know this name as 127.0.1.1: it is its own.
        if not is_loopback(local_address_towards(host)) or environ.get("SLURM_NODEID") == "0":
            return host
    if address := environ.get("SLURM_LAUNCH_NODE_IPADDR"):
        return address
    raise UserError(
        f"srun: the step's first host {host!r} does not resolve on {socket.gethostname()}; export MASTER_ADDR"
    )


def _from_mpi(environ: Mapping[str, str]) -> Ranks:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"started by mpirun, but mpi4py cannot load an MPI library ({error}); install Open MPI or MPICH"
        ) from None
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    size, local_size = world.Get_size(), node.Get_size()
    # Rank 0's word: mpirun hands a shell's variables to its own host alone.
    address, port = world.bcast((environ.get("MASTER_ADDR"), _number(environ, "MASTER_PORT", free_port())))
    address = address or ("127.0.0.1" if local_size == size else _mpi_master(world, node, port))
    place = _place(world.Get_rank(), node.Get_rank(), size, local_size, "mpirun", address, port)
    MPI.Finalize()  # its work is done, and a process may now end in any way without mpirun calling that improper
    return place


def _mpi_master(world: Any, node: Any, port: int) -> str:
    """An address of rank 0 to which every other node can connect: tried, since a host's name says little."""
    main = world.Get_rank() == 0
    at_home = node.bcast(main)  # rank 0 is the first of its node
    with _listener(port, world.Get_size()) if main else contextlib.nullcontext():
        addresses = world.bcast(own_addresses())
        tries = not at_home and node.Get_rank() == 0
        reached = world.allgather({a for a in addresses if _connects(a, port)} if tries else set(addresses))
    for address in addresses:
        if all(address in found for found in reached):
            return str(address)
    raise UserError(
        f"mpirun: not every node reaches an address of rank 0 ({', '.join(addresses) or 'which has only loopback'}) at "
        f"port {port}; open the firewall, or name address and port: mpirun -x MASTER_ADDR=... -x MASTER_PORT=..."
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
