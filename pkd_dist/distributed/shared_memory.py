"""Sums and gathers between the ranks of one host through memory that all of them map.

gloo sends through sockets, also to a rank on the same host: the gradients and weights of a small student take longer on
their way than in the optimizer. Who waits for whom still goes through gloo, so a lost rank is noticed as ever.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from pkd_dist.distributed.world import World

FOLDER = "/dev/shm"
CHUNK = 1 << 20
"""Numbers that go at once: 4 MiB a rank, which stay in the cache between writer and readers."""
LEAST = 1 << 16
"""Smaller tensors are faster by gloo."""


class SharedMemory:
    """Two buffers of one slot for each rank, used in turn: before a rank writes into one again, all have met over the
    other, so all have read it.

    Args:
        slots: (2, ranks, CHUNK) float32, the same memory on every rank.
    """

    def __init__(self, world: World, slots: np.ndarray):
        self._world, self._buffers, self._turn = world, torch.from_numpy(slots), 0

    @staticmethod
    def takes(tensor: torch.Tensor) -> bool:
        """Whether a tensor can go this way, and is large enough to gain by it."""
        large = tensor.dtype == torch.float32 and tensor.numel() >= LEAST
        return large and tensor.device.type == "cpu" and tensor.is_contiguous()

    def sum(self, tensor: torch.Tensor) -> None:
        """Makes a tensor the sum over ranks, in the order of the ranks on each of them; collective."""
        for part in tensor.view(-1).split(CHUNK):
            torch.sum(self._exchange(part), dim=0, out=part)

    def gather(self, output: torch.Tensor, mine: torch.Tensor) -> None:
        """Fills `output`, (ranks * n,), with every rank's tensor of n numbers; collective. `mine` may lie in it."""
        rows = output.view(self._world.size, -1)
        for start in range(0, mine.numel(), CHUNK):
            slots = self._exchange(mine.view(-1)[start : start + CHUNK])
            rows[:, start : start + CHUNK] = slots

    def _exchange(self, part: torch.Tensor) -> torch.Tensor:
        """What every rank gave, (ranks, n)."""
        slots = self._buffers[self._turn, :, : len(part)]
        self._turn = 1 - self._turn
        slots[self._world.rank] = part
        self._world.barrier()
        return slots


def open_shared_memory(world: World) -> SharedMemory | None:
    """Memory that all ranks map; None where they are on several hosts, or there is no room for it; collective."""
    if world.size == 1 or not world.one_host:
        return None
    shape = (2, world.size, CHUNK)
    name = world.on_main(lambda: _make(4 * int(np.prod(shape))))
    if name is None:
        return None

    slots = None
    with contextlib.suppress(OSError), open(name, "r+b") as file:  # another container's, of the same host name
        slots = np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.float32).reshape(shape)
    everywhere = all(world.gather(slots is not None))
    world.on_main(lambda: Path(name).unlink(missing_ok=True))  # it lives as long as it is mapped
    return SharedMemory(world, slots) if slots is not None and everywhere else None


def _make(size: int) -> str | None:
    """A file in memory, every page of it there; None where that cannot be."""
    name = None
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(prefix="pkd-", dir=FOLDER)
        try:
            os.posix_fallocate(handle, 0, size)
            return name
        finally:
            os.close(handle)
    if name:
        Path(name).unlink(missing_ok=True)
    return None
