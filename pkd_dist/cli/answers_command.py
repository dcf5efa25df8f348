"""`pkd answers`: a run's teacher answers as a table, which `teacher.answers` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pkd_dist.cli.options import run_command


def answers(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that was evaluated.")],
    output: Annotated[Path, typer.Option(help="The table: .csv, .jsonl or .parquet; must not exist.")],
    probabilities: Annotated[
        bool,
        typer.Option(
            "--probabilities", help="Probabilities instead of logits; a student learns the same up to rounding."
        ),
    ] = False,
) -> None:
    """Write the teacher's cached answers, and those to dev and test, by example id.

    A student that is trained from the table of logits equals the one trained from the cache, bit for bit.

    Example: pkd answers runs/demo --output answers.csv

    Then: teacher: {answers: [answers.csv], answers_are: logits}
    """

    def work() -> None:
        from pkd_dist.stages.answers_table import write_table

        rows, columns = write_table(run, output, probabilities)
        kind = "probabilities" if probabilities else "logits"
        print(
            f"{output}: {rows:,} answers, {', '.join(columns)}; use: teacher.answers=[{output}] teacher.answers_are={kind}"
        )

    run_command(work)
