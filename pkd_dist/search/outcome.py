"""What comes out of a sweep: the winner, its configuration and its final runs, and the table of all trials."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import yaml
from optuna.trial import FrozenTrial, TrialState

from pkd_dist.config.sweep import Constraints
from pkd_dist.errors import UserError
from pkd_dist.evaluation.results import Results
from pkd_dist.export import manifest
from pkd_dist.export.manifest import ExportManifest
from pkd_dist.export.runtime import ONNX_FILES
from pkd_dist.files import make_folder, read_object, write_atomically
from pkd_dist.metric_names import DIVERGENCE
from pkd_dist.search.footprint import Footprint
from pkd_dist.search.processes import Processes
from pkd_dist.search.shared import SweepConfig
from pkd_dist.search.space import as_overrides
from pkd_dist.search.study import REASON, SEED, STATES, Study, seeds_of, shown_value
from pkd_dist.telemetry.log import log

BEST, TABLE, FINAL, PAGE = "best.yaml", "trials.parquet", "final", "sweep.html"
_INT8 = ONNX_FILES["onnx-int8"]


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

    @property
    def overrides(self) -> list[str]:
        return as_overrides(self.trials[0].params)

    @property
    def footprint(self) -> Footprint:
        return _footprint(self.trials[0])


@dataclass(frozen=True)
class Final:
    """The winner, trained again with another seed in a run of its own."""

    folder: Path
    results: Results
    manifest: ExportManifest


@dataclass(frozen=True)
class Outcome:
    """What a sweep found.

    Attributes:
        points: The best first; the first that meets the constraints is the winner.
        objective: What was maximized (`divergence`: minimized).
        finals: Seed -> the winner, trained again.
        searched: Seeds on which it was chosen.
        trials: All of the study.
        looks_per_epoch: See `Study`.
    """

    folder: Path
    winner: Point
    points: list[Point]
    objective: str
    finals: dict[int, Final]
    searched: tuple[int, ...]
    trials: list[FrozenTrial]
    looks_per_epoch: int

    @property
    def seconds(self) -> float:
        """Of all workers' trials."""
        return float(sum(trial.user_attrs.get("seconds", 0.0) for trial in self.trials))

    def score(self, point: Point) -> float:
        """Return the mean score of a point on dev, as people read it."""
        return shown_value(point.value, self.objective)

    @property
    def fresh(self) -> dict[int, Final]:
        """The final runs with seeds on which the winner was not chosen."""
        return {seed: final for seed, final in self.finals.items() if seed not in self.searched}


def scores_of(results: Results) -> dict[str, float]:
    """Return the student's main metric on each labeled split."""
    found = {results["split"]: results["student"]["main_metric"]}
    return found | {split: scores["student"]["main_metric"] for split, scores in results["splits"].items()}


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


def find(sweep: SweepConfig, study: Study, objective: str, processes: Processes) -> Outcome:
    """Write trials.parquet and best.yaml, and train the winner with the final seeds.

    The winner is the best point whose exported int8 file meets the constraints.

    Raises:
        UserError: No point was trained to its end or meets the constraints, or a final run failed.
    """
    write_table(study, sweep.folder)
    trials, limits = study.trials, study.settings.constraints
    points = ranked(trials, len(study.settings.seeds))
    known = study.known_left_out(limits.model_dump())
    for point in (point for point in points if str(point.number) not in known):
        candidate = sweep.folder / FINAL / "candidate.yaml"
        _write_config(candidate, sweep, study, point)
        finals: dict[int, Final] = {}
        problem = None if study.settings.final.seeds else point.footprint.problem(limits, slack=1.0)
        for seed in study.settings.final.seeds:
            finals[seed] = _final_run(sweep, candidate, seed, processes)
            if problem := _exported(finals[seed]).problem(limits, slack=1.0):
                break
        if problem is None:
            _write_config(sweep.folder / BEST, sweep, study, point)
            seeds, looks = tuple(study.settings.seeds), study.looks_per_epoch
            return Outcome(sweep.folder, point, points, objective, finals, seeds, trials, looks)
        log.info("sweep: point %d is left out: %s", point.number, problem)
        study.left_out(point.number, limits.model_dump(), problem)
    raise UserError(_why_none(sweep.folder, trials, limits))


def _why_none(folder: Path, trials: Sequence[FrozenTrial], limits: Constraints) -> str:
    """Return why there is no winner, with the point that came closest to the constraints."""
    failed = [trial for trial in trials if trial.state is TrialState.FAIL]
    measured = [trial for trial in trials if "bytes" in trial.user_attrs]
    if limits == Constraints() or not measured:
        why = f"; the last failure: {failed[-1].user_attrs[REASON]}" if failed else ""
        return f"{folder}: no point was trained to its end{why}"

    def excess(trial: FrozenTrial) -> float:
        found = _footprint(trial)
        return max(
            found.bytes / 1e6 / limits.size_mb if limits.size_mb else 0.0,
            found.latency_ms / limits.latency_ms if limits.latency_ms else 0.0,
        )

    closest = min(measured, key=excess)
    found = _footprint(closest)
    return (
        f"{folder}: no point meets sweep.constraints; point {closest.number} came closest, with {found.bytes / 1e6:.2f} MB and "
        f"{found.latency_ms:.3g} ms: {' '.join(as_overrides(closest.params))}"
    )


def _footprint(trial: FrozenTrial) -> Footprint:
    return Footprint(**{key: trial.user_attrs[key] for key in ("bytes", "latency_ms", "processor")})


def _exported(final: Final) -> Footprint:
    """Return the footprint of the int8 file of a final run, as its export measured it."""
    figures, processor = final.manifest["files_on_dev"][_INT8], final.manifest["measured_on"]["processor"]
    return Footprint(figures["bytes"], figures["latency_ms_p50"], processor)


def _write_config(path: Path, sweep: SweepConfig, study: Study, point: Point) -> None:
    """Write the configuration of a point's first trial: a run of it has the same scores."""
    overrides = sweep.of_point(point.overrides, (sweep.folder / "best").absolute(), study.settings.seeds[0])
    config = sweep.load(overrides)
    content = config.model_dump(mode="json", exclude={"sweep"})
    content["export"]["formats"] = list(dict.fromkeys([*config.export.formats, "onnx-int8"]))
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    head = f"# Point {point.number} of a sweep. deepspeed launcher/train.py --config {BEST}\n"
    make_folder(path.parent)
    write_atomically(path, lambda tmp: tmp.write_text(head + text, encoding="utf-8"))


def _final_run(sweep: SweepConfig, config: Path, seed: int, processes: Processes) -> Final:
    folder = (sweep.folder / FINAL / f"seed-{seed}").absolute()
    make_folder(folder)
    log.info("sweep: %s: the winner with seed %d, exported", folder, seed)
    arguments = ["--config", str(config), f"run.seed={seed}", f"run.dir={json.dumps(str(folder))}"]
    processes.run(arguments, folder / "log.txt")
    return Final(folder, cast(Results, read_object(folder / "results_eval.json")), manifest.read(folder / "export"))


def write_table(study: Study, folder: Path) -> None:
    """Write trials.parquet: a row for each trial."""
    import pandas as pd

    columns = {
        key: _of_one_type([trial.params.get(key) for trial in study.trials]) for key in study.space.distributions
    }
    rows = [
        {
            "number": trial.number,
            "seed": trial.user_attrs.get(SEED),
            "state": STATES[trial.state],
            **{key: columns[key](trial.params.get(key)) for key in study.space.distributions},
            "value": trial.value if trial.state is TrialState.COMPLETE else None,
            "epoch": trial.user_attrs.get("epoch"),
            **{f"dev_{key}": value for key, value in trial.user_attrs.get("scores", {}).items()},
            **{key: trial.user_attrs.get(key) for key in ("parameters", "bytes", "latency_ms")},
            "reason": trial.user_attrs.get(REASON),
            "seconds": trial.user_attrs.get("seconds"),
        }
        for trial in study.trials
    ]
    write_atomically(folder / TABLE, lambda path: pd.DataFrame(rows).to_parquet(path, index=False))


def _of_one_type(values: Sequence[object]) -> Callable[[object], object]:
    """Return how a column writes its values: as they are, or as JSON where they are of several types."""
    types = {type(value) for value in values if value is not None}
    return (lambda value: value) if len(types) < 2 or types <= {int, float} else json.dumps
