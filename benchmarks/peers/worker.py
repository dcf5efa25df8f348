"""One measurement in a process of its own: python -m benchmarks.peers.worker '{"what": ..., ...}'

Writes the file it is given, on rank 0, once all is done.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pkd_dist.kernels.allocator import keep_freed_blocks


def measure_peer(what: str, config_file: str, overrides: list[str], steps: int | None) -> dict[str, Any]:
    """A peer's own program on the settings of a run."""
    from benchmarks.peers.subject import Subject
    from pkd_dist.config.load import load

    subject = Subject(load(config_file, overrides))
    if what == "authors":
        from benchmarks.peers import authors

        measured = authors.measure(subject, steps)
    elif what.startswith("textbrewer"):
        from benchmarks.peers import brewer

        measured = brewer.measure(subject, steps, padded="padded" in what)
    else:
        from benchmarks.peers import hf

        measured = hf.measure(subject, steps, bf16="bfloat16" in what)
    return asdict(measured)


def measure_peaks() -> dict[str, Any]:
    """FLOP/s of matrix products, by dtype."""
    import torch

    from benchmarks.peers.flops import peak

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {name: peak(getattr(torch, name), device) for name in ("float32", "bfloat16")}


def main() -> None:
    given = json.loads(sys.argv[1])
    what, output = given["what"], Path(given["output"])
    if what == "peaks":
        found = measure_peaks()
    elif what == "teacher":
        from benchmarks.peers import teacher
        from pkd_dist.config.load import load

        found = teacher.measure(load(given["config"], given["overrides"]))
    elif what == "engine":
        keep_freed_blocks()  # as the launcher does, before torch is imported
        from benchmarks.peers import engine

        found = engine.measure(given["config"], given["overrides"], given["block"], given["blocks"])
    else:
        found = measure_peer(what, given["config"], given["overrides"], given["steps"])
    import torch

    from pkd_dist.cli.launch import leave
    from pkd_dist.distributed.ranks import discover
    from pkd_dist.files import write_json

    ranks = discover()
    if ranks.main:
        write_json(output, found | {"threads": torch.get_num_threads(), "ranks": ranks.world_size})
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    leave(0)


if __name__ == "__main__":
    main()
