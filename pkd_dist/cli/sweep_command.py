"""`pkd sweep`: search for a good student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pkd_dist.cli.launch import requires_extra
from pkd_dist.cli.options import load_study, run_command
from pkd_dist.errors import UserError
from pkd_dist.search import forks
from pkd_dist.telemetry.output import keep_going


def sweep(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="`show DIR`; or settings that override the file's.", metavar="[show DIR | section.key=value]"
        ),
    ] = None,
    config: Annotated[str | None, typer.Option("--config", help="The sweep's YAML.", metavar="FILE")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the study and of what comes out.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes on this machine; default: one for each GPU, without GPUs one for each core."
        ),
    ] = None,
    trials_only: Annotated[
        bool, typer.Option("--trials-only", help="End when no trial is left; another call trains the winner.")
    ] = False,
) -> None:
    """Search the space of `sweep.space` for the best student, train the winner again and export it.

    The same command resumes, and adds workers where the folder is shared.

    Example: pkd sweep --config configs/sweep.yaml --output runs/sweep

    Example: pkd sweep show runs/sweep
    """
    given = overrides or []

    def search() -> None:
        keep_going()  # the outcome is also in the folder
        if given[:1] == ["show"]:
            _show(
                given[1:],
                [
                    ("--config", config),
                    ("--output", output),
                    ("--workers", workers),
                    ("--trials-only", trials_only or None),
                ],
            )
        elif config is None or output is None:
            raise UserError("is missing", "--config" if config is None else "--output")
        else:
            load_study(config, given, output)
            from pkd_dist.search.runner import open_sweep, run
            from pkd_dist.search.summary import describe

            with forks.opened() as source:
                outcome = run(open_sweep(config, given, output), workers, trials_only, source)
            print(describe(outcome) if outcome else f"sweep: no trial is left; {output}")

    run_command(search)


def _show(arguments: list[str], options: list[tuple[str, object]]) -> None:
    """Print how far the sweep in a folder is, and its best points."""
    for option, value in options:
        if value is not None:
            raise UserError("is not allowed with show DIR", option)
    if len(arguments) != 1:
        raise UserError("give one folder: pkd sweep show DIR")
    with requires_extra("sweep"):
        from pkd_dist.search import summary
        from pkd_dist.search.study import read
    from pkd_dist.telemetry.markup import console, table

    found = read(Path(arguments[0]))
    print(summary.progress(found))
    header, body = summary.best(found, rows=20)
    if body:
        console().print(table(*header, rows=body))
