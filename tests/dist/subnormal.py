"""Prints how many subnormal numbers are left after an operation on two threads in the process of a rank."""

import torch

from pkd_dist.distributed.ranks import discover
from pkd_dist.distributed.world import World

world = World(discover())
torch.set_num_threads(2)
numbers = torch.full((1 << 20,), 5, dtype=torch.int32).view(torch.float32)  # by their bits: 7e-45
print(int((numbers * 1.0).view(torch.int32).count_nonzero()))
world.close()
