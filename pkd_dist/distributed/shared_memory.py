"""Sums and gathers between the ranks of one host through memory that all of them map.

gloo sends through sockets even to a rank on the same host, so the gradients and weights of a small student take longer to
send than to update. Ranks still wait for each other through gloo, so a lost rank is noticed as always.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from dataclasses import dataclass

import numpy as np
import torch

from pkd_dist.distributed.world import World
from pkd_dist.limits import free_memory

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
    block = world.on_main(lambda: _allocate(4 * int(np.prod(shape))))
    if block is None:
        return None

    slots = None
    with contextlib.suppress(OSError):  # containers may share a host name but no processes
        slots = np.frombuffer(_map(block), dtype=np.float32).reshape(shape)
    everywhere = all(world.gather(slots is not None))
    if world.main:
        os.close(block.handle)  # the memory lives as long as it is mapped
    return SharedMemory(world, slots) if slots is not None and everywhere else None


@dataclass(frozen=True)
class _Block:
    """Memory without a name, which ends with its processes; the others open it through the process that made it."""

    process: int
    handle: int
    inode: int


def _allocate(size: int) -> _Block | None:
    """Return memory with all its pages allocated, or None if there is not enough."""
    if free_memory() < 2 * size:  # the kernel would end a process rather than report an error
        return None
    with contextlib.suppress(OSError):
        handle = os.memfd_create("pkd")
        try:
            os.posix_fallocate(handle, 0, size)
        except OSError:
            os.close(handle)
            return None
        return _Block(os.getpid(), handle, os.fstat(handle).st_ino)
    return None


def _map(block: _Block) -> mmap.mmap:
    """Map a block of any process of this host.

    Raises:
        OSError: this process cannot see it, or sees another file in its place.
    """
    with open(f"/proc/{block.process}/fd/{block.handle}", "r+b", buffering=0) as file:
        if os.fstat(file.fileno()).st_ino != block.inode or "memfd:pkd" not in os.readlink(
            f"/proc/self/fd/{file.fileno()}"
        ):
            raise OSError("another file")
        return mmap.mmap(file.fileno(), 0)
