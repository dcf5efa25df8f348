"""Sums and gathers between the ranks of one host through memory that all of them map.

gloo sends through sockets even to a rank on the same host, so the gradients and weights of a small student take longer to
send than to update. Ranks still wait for each other through gloo, so a lost rank is noticed as always.
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
CHUNK_NUMEL = 1 << 20
"""Elements exchanged at once: 4 MiB per rank, which stays in the cache between writer and readers."""
MIN_NUMEL = 1 << 16
"""Smaller tensors are faster through gloo."""


class SharedMemory:
    """Two buffers with one slot per rank, used in turn.

    Before a rank writes into a buffer again, all ranks have met over the other one, so all have read it.

    Args:
        slots: (2, ranks, CHUNK_NUMEL) float32, the same memory on every rank.
    """

    def __init__(self, world: World, slots: np.ndarray):
        self._world, self._buffers, self._turn = world, torch.from_numpy(slots), 0

    @staticmethod
    def accepts(tensor: torch.Tensor) -> bool:
        """Return whether a tensor can be exchanged here and is large enough to gain from it."""
        large = tensor.dtype == torch.float32 and tensor.numel() >= MIN_NUMEL
        return large and tensor.device.type == "cpu" and tensor.is_contiguous()

    def sum(self, tensor: torch.Tensor) -> None:
        """Replace a tensor by its sum over ranks, added in rank order on every rank; collective."""
        for chunk in tensor.view(-1).split(CHUNK_NUMEL):
            torch.sum(self._exchange(chunk), dim=0, out=chunk)

    def gather(self, output: torch.Tensor, own: torch.Tensor) -> None:
        """Fill `output`, (ranks * n,), with every rank's tensor of n elements; collective.

        Args:
            own: this rank's tensor; may be a view of `output`.
        """
        rows = output.view(self._world.size, -1)
        for start in range(0, own.numel(), CHUNK_NUMEL):
            slots = self._exchange(own.view(-1)[start : start + CHUNK_NUMEL])
            rows[:, start : start + CHUNK_NUMEL] = slots

    def _exchange(self, chunk: torch.Tensor) -> torch.Tensor:
        """Return the chunks of all ranks, (ranks, n)."""
        slots = self._buffers[self._turn, :, : len(chunk)]
        self._turn = 1 - self._turn
        slots[self._world.rank] = chunk
        self._world.barrier()
        return slots


def open_shared_memory(world: World) -> SharedMemory | None:
    """Return memory that all ranks map, or None if they are on several hosts or there is not enough; collective."""
    if world.size == 1 or not world.one_host:
        return None
    shape = (2, world.size, CHUNK_NUMEL)
    name = world.on_main(lambda: _allocate(4 * int(np.prod(shape))))
    if name is None:
        return None

    slots = None
    with contextlib.suppress(OSError), open(name, "r+b") as file:  # containers may share a host name but no memory
        slots = np.frombuffer(mmap.mmap(file.fileno(), 0), dtype=np.float32).reshape(shape)
    everywhere = all(world.gather(slots is not None))
    world.on_main(lambda: Path(name).unlink(missing_ok=True))  # the memory lives as long as it is mapped
    return SharedMemory(world, slots) if slots is not None and everywhere else None


def _allocate(size: int) -> str | None:
    """Create a file in memory with all its pages allocated; return its name, or None if there is not enough memory."""
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
