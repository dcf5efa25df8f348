"""Take one measurement in its own process: python -m benchmarks.peers.worker '{"what": ..., ...}'

Rank 0 writes the output file when all is done. A contestant imports only what it needs, because its memory is measured.
"""

import json
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from pkd_dist.loading import keep_freed_blocks

MODULES = {"authors": "authors", "textbrewer": "brewer", "hf": "hf"}
"""First word of a contestant's name -> module of this package."""


def measure(what: str, given: dict[str, Any]) -> dict[str, Any]:
    settings = given["config"], given["overrides"]
    if what == "engine":
        keep_freed_blocks()  # like the launcher, before torch is imported
    if what in ("engine", "teacher"):
        from benchmarks.peers import own

        return own.engine(*settings, *given["blocks"]) if what == "engine" else own.teacher_pass(*settings)
    import torch

    from benchmarks.peers.subject import Subject, peaks
    from pkd_dist.config.load import load

    if what == "peaks":
        return peaks(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    contestant, *variant = what.split("-")
    module = import_module(f"benchmarks.peers.{MODULES[contestant]}")
    return asdict(module.measure(Subject(load(*settings)), given["steps"], *variant[:1]))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    found = measure(given["what"], given)
    import torch

    from pkd_dist.cli.launch import leave
    from pkd_dist.distributed.ranks import discover
    from pkd_dist.files import write_json

    ranks = discover()
    if ranks.main:
        write_json(Path(given["output"]), found | {"threads": torch.get_num_threads(), "ranks": ranks.world_size})
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    leave(0)
