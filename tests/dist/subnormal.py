"""Prints the number of threads, and how many subnormal numbers are left after an operation within the mode and outside of it."""

import torch

from pkd_dist.distributed.ranks import discover
from pkd_dist.distributed.world import World
from pkd_dist.limits import subnormals_are_zero

torch.set_num_threads(2)
world = World(discover())
numbers = torch.full((1 << 20,), 5, dtype=torch.int32).view(torch.float32)  # by their bits: 7e-45


def left(count: int) -> int:
    return int((numbers[:count] * 1.0).view(torch.int32).count_nonzero())


with subnormals_are_zero():
    within = left(1 << 20)
print(torch.get_num_threads(), within, left(1000))
world.close()
