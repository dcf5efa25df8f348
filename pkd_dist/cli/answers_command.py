"""`pkd answers`: a run's teacher answers as a table, which `teacher.answers` reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from pkd_dist.cli.options import require_run, run_command
from pkd_dist.errors import UserError

if TYPE_CHECKING:
    from pkd_dist.evaluation.results import Results


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

    Then: deepspeed launcher/train.py --config my.yaml teacher.answers=answers.csv teacher.answers_are=logits
    """

    def work() -> None:
        from pkd_dist.config.load import load
        from pkd_dist.data.answers import PREDICTION
        from pkd_dist.data.target_scale import TargetScale
        from pkd_dist.distillation.answers_table import write_table
        from pkd_dist.evaluation import predictions
        from pkd_dist.stages.base import Markers
        from pkd_dist.stages.translation import translate

        require_run(run)
        markers = Markers(run, translate)
        marker, evaluated = markers.read("data"), markers.read("evaluate")
        if marker is None or not marker.outputs or evaluated is None or not evaluated.outputs:
            raise UserError(f"{run}: is not evaluated yet; rerun the run's command to resume it")
        names = list(map(str, cast(list[str], marker.outputs["class_names"])))
        scale = cast(dict[str, float] | None, marker.outputs.get("scale"))
        found = cast("Results", evaluated.outputs["results"]).get("multilabel")
        thresholds = list(found["thresholds"]["teacher"].values()) if found else None
        cached = load(str(run / "config.yaml")).cache.dir
        count = write_table(
            output, Path(cached) if cached else run / "cache", run / predictions.FILE, names,
            TargetScale(**scale) if scale else None, probabilities, thresholds,
        )  # fmt: skip
        kind = "" if not names else f" teacher.answers_are={'probabilities' if probabilities else 'logits'}"
        columns = ", ".join(names or [PREDICTION])
        print(f"{output}: {count:,} answers, {columns}; use: teacher.answers={output}{kind}")

    run_command(work)
