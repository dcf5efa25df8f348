"""A worker of a study, as `pkd sweep` and `pkd compare` start it: `python -m pkd_dist.cli.worker KIND ... section.key=value`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pkd_dist.cli.launch import guarded, in_world, leave
from pkd_dist.telemetry.log import to_terminal

if TYPE_CHECKING:
    from pkd_dist.distributed.world import World


def work(argv: Sequence[str]) -> int:
    """Train trials until none is left, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pkd_dist.cli.worker")
    parser.add_argument("kind", choices=("sweep", "comparison"))
    for option in ("--config", "--output", "--worker"):
        parser.add_argument(option, required=True)
    parser.add_argument("--launcher", help="of the runs of a comparison")
    parser.add_argument("--own-port", action="store_true", help="the ranks of each run meet at a free port")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(argv)
    file, overrides, folder = options.config, options.overrides, Path(options.output)

    def train(world: World) -> None:
        if options.kind == "sweep":
            from pkd_dist.search.runner import open_sweep
            from pkd_dist.search.worker import search

            search(open_sweep(file, overrides, folder), options.worker, world)
        else:
            from pkd_dist.comparison.runs import train_here
            from pkd_dist.search.shared import SweepConfig

            train_here(SweepConfig(file, tuple(overrides), folder), options.worker, world)

    def launch() -> None:
        from pkd_dist.comparison.runs import train_under
        from pkd_dist.search.shared import SweepConfig

        train_under(options.launcher, options.own_port, SweepConfig(file, tuple(overrides), folder), options.worker)

    if options.launcher:
        to_terminal(True)
        return guarded(launch)
    return in_world(file, [*overrides, f"run.dir={json.dumps(options.output)}"], train, alone=True)


if __name__ == "__main__":
    leave(work(sys.argv[1:]))
