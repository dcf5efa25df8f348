"""`pkd compare`: several methods over several seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pkd_dist.cli.options import ConfigFile, Overrides, load_study, numbers, run_command
from pkd_dist.errors import UserError
from pkd_dist.search import forks


def compare(
    config: ConfigFile,
    output: Annotated[Path, typer.Option(help="Folder of all runs and of the table.")],
    overrides: Overrides = None,
    methods: Annotated[
        str, typer.Option(help="Among finetune, kd, pkd-skip, pkd-last, random, first-k, tokens, seed, strong.")
    ] = "finetune,kd,pkd-skip,pkd-last",
    method: Annotated[
        list[str] | None, typer.Option(help='Your own: "NAME: section.key=value ...". May be repeated.')
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the students.")] = "1,2,3",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; each has its share of the GPUs and cores.")] = 1,
    launcher: Annotated[str, typer.Option(help="Launcher of each run, such as deepspeed; default: this Python.")] = "",
) -> None:
    """Train several methods over several seeds on one teacher and one cache; print and plot the table.

    Another call with the same output adds its methods and seeds to the table.

    Example: pkd compare --config configs/movie-reviews.yaml --output runs/compare --methods finetune,kd,pkd-skip --seeds 1,2,3

    Example: pkd compare --config my.yaml --output runs/pairs --method "pairs: distill.patience=[1,5]" --jobs 2
    """

    def work() -> None:
        from pkd_dist.comparison.methods import parse_methods
        from pkd_dist.telemetry.output import keep_going

        keep_going()  # the table is also in the folder
        chosen, wanted = parse_methods(methods, method or []), _seeds(seeds)
        load_study(config, overrides or [], output, "pkd_dist.comparison.runs")
        from pkd_dist.comparison.study import open_comparison

        with forks.opened() as source:
            made = open_comparison(config, overrides or [], chosen, wanted, output, launcher, jobs).run_all(source)
        # Only now: matplotlib starts threads.
        from pkd_dist.comparison.table import MIN_SEEDS, rows
        from pkd_dist.telemetry.markup import console, table

        header, body = rows(made)
        console().print(table(*header, rows=body))
        print(
            f"{' and '.join(dict.fromkeys((made['metric'], 'agreement')))} in percent, ± half of the 95% interval of the mean over {MIN_SEEDS} or more seeds"
        )
        print(f"table: {output / 'compare.md'}\nplot:  {output / 'compare.png'}\ndata:  {output / 'compare.json'}")

    run_command(work)


def _seeds(given: str) -> list[int]:
    seeds = numbers(given, "--seeds", "1,2,3")
    if max(seeds) >= 2**31:
        raise UserError(f"{max(seeds)} is too large; allowed: integers below 2147483648", "--seeds")
    return seeds
