"""What each of several runs at a time has to itself: GPUs, cores, and a port at which the ranks of a launcher meet."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pkd_dist.errors import UserError

_OWN_PORT = ("--master_port", "--master-port", "--rdzv_endpoint", "--rdzv-endpoint")
_OWN_DEVICES = ("--num_gpus", "--num_accelerators", "--include", "--exclude")
"""Options with which deepspeed ignores CUDA_VISIBLE_DEVICES."""


@dataclass(frozen=True)
class Share:
    """What one process may use.

    Attributes:
        devices: For CUDA_VISIBLE_DEVICES; empty: there is no GPU.
        cores: Of this process's.
        pinned: It starts ranks, which divide the cores it is bound to.
    """

    devices: tuple[str, ...]
    cores: tuple[int, ...]
    pinned: bool


def visible_devices() -> list[str]:
    """Return the names of the GPUs that this process may use, as in CUDA_VISIBLE_DEVICES."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def shares(jobs: int, devices: Sequence[str], cores: Sequence[int], one_rank: bool) -> list[Share]:
    """Divide the GPUs and the cores of this host among `jobs` processes; where there are fewer than runs, several share one.

    Args:
        one_rank: Of each, which uses one GPU.
    """
    own = [_part(devices, job, jobs)[: 1 if one_rank else None] for job in range(jobs)]
    return [Share(gpus, _part(cores, job, jobs), pinned=not one_rank) for job, gpus in enumerate(own)]


def _part(items: Sequence, job: int, jobs: int) -> tuple:  # type: ignore[type-arg]
    size = len(items) // jobs
    return tuple(items[job * size : (job + 1) * size] or items[job % len(items) :][:1]) if items else ()


def require_divisible(launcher: str, devices: Sequence[str]) -> None:
    """Check that several runs of a launcher can run side by side.

    Raises:
        UserError: It fixes the port or the GPUs, which would be the same for all runs.
    """
    fixed = _OWN_PORT + (_OWN_DEVICES if devices and "deepspeed" in _programs(launcher) else ())
    for option in shlex.split(launcher):
        if option.partition("=")[0] in fixed:
            raise UserError(
                f"{option}: with --jobs each run has a port and GPUs of its own; leave the option out", "--launcher"
            )


def train_command(launcher: str, port: int | None = None) -> list[str]:
    """Return the command that runs `pkd_dist.train` under a launcher.

    Args:
        launcher: `deepspeed`, `torchrun`, `python`, or a starter of processes such as `mpirun` or `srun`, with its options.
        port: At which its ranks meet; None: that of the launcher.
    """
    prefix, programs, module = shlex.split(launcher), _programs(launcher), "pkd_dist.train"
    if port is not None:
        takes_option = {"deepspeed", "torchrun", "torch.distributed.run"} & set(programs)
        prefix = ["env", f"MASTER_PORT={port}", *prefix, *(["--master_port", str(port)] if takes_option else [])]
    if "deepspeed" in programs:
        return [*prefix, "--module", module]
    if any(program == "torchrun" or program.startswith("python") for program in programs):
        return [*prefix, "-m", module]
    return [*prefix, sys.executable, "-m", module]


def _programs(launcher: str) -> list[str]:
    return [Path(argument).name for argument in shlex.split(launcher)]
