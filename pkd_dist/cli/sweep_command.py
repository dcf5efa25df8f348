"""`pkd sweep`: search for a good student."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pkd_dist.cli.launch import in_world, requires_extra
from pkd_dist.cli.options import ConfigFile, Overrides, run_command

if TYPE_CHECKING:
    from pkd_dist.distributed.world import World
    from pkd_dist.sweep.runner import Opened


def sweep(
    config: ConfigFile,
    output: Annotated[Path, typer.Option(help="Folder of the study and of what comes out.")],
    overrides: Overrides = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes on this machine; default: one for each GPU, without GPUs one for each core."
        ),
    ] = None,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Search the space of `sweep.space` for the best student, train the winner again and export it.

    The same command resumes, and adds workers where the folder is shared. docs/sweep.md has examples.

    Example: pkd sweep --config configs/sweep.yaml --output runs/sweep
    """

    def opened() -> Opened:
        with requires_extra("sweep"):
            from pkd_dist.sweep.runner import open_sweep

            return open_sweep(config, overrides or [], output)

    if worker is not None:

        def train(world: World) -> None:
            from pkd_dist.sweep.worker import work

            found = opened()
            work(found.sweep, found.study(), worker, found.objective, world)

        raise typer.Exit(in_world(config, [*(overrides or []), f"run.dir={output}"], train, alone=True))

    def search() -> None:
        from pkd_dist.telemetry.output import keep_going

        keep_going()  # the outcome is also in the folder
        found = opened()
        from pkd_dist.sweep.runner import run
        from pkd_dist.sweep.summary import describe

        print(describe(run(found, workers)))

    run_command(search)
