"""What this process may use of its host: the limits of its control group where they are below the host's, and its CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

GROUP_FILE = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def cores() -> int:
    """Return the number of cores that this process may keep busy: by its affinity, a container's quota, and the cores of a
    SLURM step on this node, which its tasks share."""
    allowed = float(len(os.sched_getaffinity(0)))
    with suppress(KeyError, ValueError):  # a SLURM without a task plugin sets no affinity
        allowed = min(allowed, int(os.environ["SLURM_CPUS_ON_NODE"]))
    for folder in _groups("cpu"):
        with suppress(OSError, ValueError, ZeroDivisionError):
            if (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                allowed = min(allowed, int(quota) / int(period))
    return max(1, int(allowed))


def free_memory() -> int:
    """Return the bytes of memory that this process can still use; what the page cache holds counts as free."""
    free = int(psutil.virtual_memory().available)
    for folder in _groups("memory"):
        for limit, used, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            with suppress(OSError, ValueError, KeyError):  # "max": no limit
                most, now = int((folder / limit).read_text()), int((folder / used).read_text())
                lines = (folder / "memory.stat").read_text().splitlines()
                free = min(free, most - now + int(dict(line.split() for line in lines)[cached]))
    return max(0, free)


def cpu_has_bfloat16() -> bool:
    """Return whether bfloat16 matrix multiplications are faster than float32 ones on this CPU; others emulate them slowly."""
    import torch

    flags = torch.cpu.get_capabilities()
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("bf16"))


@contextmanager
def subnormals_are_zero() -> Iterator[None]:
    """Count subnormal numbers (below 1e-38) as zero, in this thread and in those that are started in the block.

    An Intel CPU takes 15 times as long for them, and AdamW's momentum of a word is one after 800 steps without the word.
    """
    import torch

    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of those around it, in both versions of the kernel's interface."""
    with suppress(OSError, ValueError):
        for line in GROUP_FILE.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            top = GROUPS / controller if controllers else GROUPS
            folder = top / group.strip("/")
            yield folder
            while folder != top:
                folder = folder.parent
                yield folder
