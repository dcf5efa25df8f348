"""Where this process stands among the others: found from its environment, before anything heavy is imported.

In this order: the variables that `deepspeed` and `torchrun` set, SLURM's under `srun`, MPI's own world through mpi4py
under `mpirun`; else there is one rank.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from pkd_dist.errors import UserError

_MPI_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "MV2_COMM_WORLD_RANK")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands. `launcher` is what started it."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launcher: str

    @property
    def main(self) -> bool:
        return self.rank == 0


def discover(environ: dict[str, str] | None = None) -> Ranks:
    """Finds this process's place from its environment; reads nothing else, except MPI's own world under `mpirun`."""
    env = os.environ if environ is None else environ
    if all(name in env for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        world = int(env["WORLD_SIZE"])
        local = int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", world)))
        return Ranks(int(env["RANK"]), int(env["LOCAL_RANK"]), world, local, "deepspeed or torchrun")
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_STEP_ID" in env:
        counts = _tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_NTASKS_PER_NODE", "1")))
        local = counts[min(int(env.get("SLURM_NODEID", "0")), len(counts) - 1)]
        return Ranks(int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), int(env["SLURM_NTASKS"]), local, "srun")
    if any(name in env for name in _MPI_VARIABLES):
        return _discover_mpi()
    return Ranks(0, 0, 1, 1, "python")


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's `2(x2),1` -> [2, 2, 1]."""
    parts = (part.rstrip(")").partition("(x") for part in text.split(","))
    return [int(count) for count, _, times in parts for _ in range(int(times or 1))]


def _discover_mpi() -> Ranks:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"started by mpirun, but mpi4py cannot load an MPI library ({error}); install Open MPI or MPICH"
        ) from None
    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    address, port = world.bcast((socket.gethostname(), free_port()) if world.Get_rank() == 0 else None)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1" if node.Get_size() == world.Get_size() else address)
    os.environ.setdefault("MASTER_PORT", str(port))
    return Ranks(world.Get_rank(), node.Get_rank(), world.Get_size(), node.Get_size(), "mpirun")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
