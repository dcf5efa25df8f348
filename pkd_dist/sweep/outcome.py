"""What comes out of a sweep: the winner, its configuration and its final runs, and the table of all trials."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import yaml
from optuna.trial import FrozenTrial, TrialState

from pkd_dist.errors import UserError
from pkd_dist.evaluation.results import Results
from pkd_dist.files import make_folder, read_object, write_atomically
from pkd_dist.metric_names import DIVERGENCE
from pkd_dist.sweep.processes import Processes
from pkd_dist.sweep.shared import SweepConfig
from pkd_dist.sweep.space import as_overrides
from pkd_dist.sweep.study import REASON, SEED, STATES, Study, seeds_of

BEST, TABLE, FINAL = "best.yaml", "trials.parquet", "final"


@dataclass(frozen=True)
class Point:
    """A point whose trials are all complete.

    Attributes:
        trials: One for each seed, by number.
        value: Mean over the seeds, to maximize.
        divergence: Mean over the seeds; infinity without a teacher.
    """

    trials: tuple[FrozenTrial, ...]
    value: float
    divergence: float

    @property
    def number(self) -> int:
        return self.trials[0].number


@dataclass(frozen=True)
class Outcome:
    """What a sweep found.

    Attributes:
        winner: The best point.
        objective: What was maximized (`divergence`: minimized).
        finals: Seed -> results of the winner, trained again.
        searched: Seeds on which it was chosen.
        states: State -> number of trials.
        seconds: Of all workers' trials.
    """

    winner: Point
    objective: str
    finals: dict[int, Results]
    searched: tuple[int, ...]
    states: dict[str, int]
    seconds: float
    folder: Path


def ranked(trials: Sequence[FrozenTrial], seeds: int) -> list[Point]:
    """Return the points with a complete trial for each seed, the best first; equal values by their divergence."""
    points = []
    for group in seeds_of(trials).values():
        complete = tuple(trial for trial in group if trial.state is TrialState.COMPLETE)
        if len(complete) < seeds:
            continue
        values = [cast(float, trial.value) for trial in complete]
        distances = [trial.user_attrs["scores"].get(DIVERGENCE, float("inf")) for trial in complete]
        points.append(Point(complete, float(np.mean(values)), float(np.mean(distances))))
    return sorted(points, key=lambda point: (-point.value, point.divergence, point.number))


def write_outcome(sweep: SweepConfig, study: Study, objective: str, processes: Processes) -> Outcome:
    """Write best.yaml and trials.parquet, and train the winner with the final seeds.

    Raises:
        UserError: No point was trained to its end, or a final run failed.
    """
    write_table(study, sweep.folder)
    points = ranked(study.trials, len(study.settings.seeds))
    if not points:
        failed = [trial for trial in study.trials if trial.state is TrialState.FAIL]
        why = f"; the last failure: {failed[-1].user_attrs[REASON]}" if failed else ""
        raise UserError(f"{sweep.folder}: no point was trained to its end{why}")
    winner = points[0]
    _write_best(sweep, study, winner)
    finals = {seed: _final_run(sweep, seed, processes) for seed in study.settings.final.seeds}
    states = [STATES[trial.state] for trial in study.trials]
    return Outcome(
        winner, objective, finals, tuple(study.settings.seeds), {state: states.count(state) for state in dict.fromkeys(states)},
        sum(trial.user_attrs.get("seconds", 0.0) for trial in study.trials), sweep.folder,
    )  # fmt: skip


def _write_best(sweep: SweepConfig, study: Study, winner: Point) -> None:
    """Write the configuration of the winner's first trial: a run of it has the same scores."""
    seed, point = study.settings.seeds[0], as_overrides(winner.trials[0].params)
    config = sweep.load(sweep.of_point(point, (sweep.folder / "best").absolute(), seed))
    text = yaml.safe_dump(config.model_dump(mode="json", exclude={"sweep"}), sort_keys=False, allow_unicode=True)
    head = f"# Point {winner.number} of a sweep. deepspeed launcher/train.py --config {BEST}\n"
    write_atomically(sweep.folder / BEST, lambda path: path.write_text(head + text, encoding="utf-8"))


def _final_run(sweep: SweepConfig, seed: int, processes: Processes) -> Results:
    folder = (sweep.folder / FINAL / f"seed-{seed}").absolute()
    make_folder(folder)
    arguments = ["--config", str(sweep.folder / BEST), f"run.seed={seed}", f"run.dir={json.dumps(str(folder))}"]
    processes.run(["-m", "pkd_dist.train", *arguments], folder / "log.txt")
    return cast(Results, read_object(folder / "results_eval.json"))


def write_table(study: Study, folder: Path) -> None:
    """Write trials.parquet: a row for each trial."""
    import pandas as pd

    rows = [
        {
            "number": trial.number,
            "seed": trial.user_attrs.get(SEED),
            "state": STATES[trial.state],
            **{key: trial.params.get(key) for key in study.space.distributions},
            "value": trial.value,
            "epoch": trial.user_attrs.get("epoch"),
            **{f"dev_{key}": value for key, value in trial.user_attrs.get("scores", {}).items()},
            "parameters": trial.user_attrs.get("parameters"),
            "reason": trial.user_attrs.get(REASON),
            "seconds": trial.user_attrs.get("seconds"),
        }
        for trial in study.trials
    ]
    write_atomically(folder / TABLE, lambda path: pd.DataFrame(rows).to_parquet(path, index=False))
