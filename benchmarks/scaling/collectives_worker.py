"""One rank of a measurement of gloo's collectives, under torchrun; rank 0 prints one line of JSON."""

from __future__ import annotations

import json
import time

import torch
import torch.distributed as dist

SIZES_BYTES = [1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 24, 1 << 26]
"""Of the whole tensor: what every rank holds after an all-gather, and before the others."""


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    n = dist.get_world_size()
    rows = []
    for size in SIZES_BYTES:
        whole, part = torch.zeros(size // 4), torch.zeros(size // 4 // n)
        calls = {
            "all_reduce": lambda whole=whole: dist.all_reduce(whole),
            "all_gather": lambda whole=whole, part=part: dist.all_gather_into_tensor(whole, part),
            "reduce_scatter": lambda whole=whole, part=part: dist.reduce_scatter_tensor(part, whole),
        }
        for kind, call in calls.items():
            seconds = []
            for _ in range(200 if size <= 1 << 18 else 20):
                dist.barrier()
                start = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - start)
            rows.append({"kind": kind, "payload_bytes": size, "seconds": min(seconds)})
    if dist.get_rank() == 0:
        print(json.dumps(rows), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
