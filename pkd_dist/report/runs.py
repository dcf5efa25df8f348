"""What a run folder says of itself, and how its figures are written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pkd_dist.config.load import load
from pkd_dist.config.schema import Config
from pkd_dist.data import tasks
from pkd_dist.errors import UserError
from pkd_dist.evaluation import predictions as answers
from pkd_dist.evaluation.predictions import Predictions
from pkd_dist.evaluation.results import SIDES
from pkd_dist.export import manifest
from pkd_dist.metric_names import METRICS
from pkd_dist.telemetry import records


@dataclass(frozen=True)
class Run:
    """A run whose evaluation is done.

    Attributes:
        resolved: what the run was resolved to, beside its settings.
        markers: stage -> its marker, of stages that are done.
        steps, evaluations: the lines of metrics.jsonl.
        answers: split -> what both models said; `dev` always.
        export: the manifest of the export; empty where there is none yet.
    """

    folder: Path
    config: Config
    resolved: dict[str, Any]
    markers: dict[str, dict[str, Any]]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    answers: dict[str, Predictions]
    export: manifest.Manifest

    @cached_property
    def outputs(self) -> dict[str, dict[str, Any]]:
        """Stage -> what its marker remembers."""
        return {name: marker["outputs"] for name, marker in self.markers.items()}

    @property
    def results(self) -> dict[str, Any]:
        return self.outputs["evaluate"]["results"]

    @cached_property
    def task(self) -> tasks.Task:
        return tasks.resolve(self.config.task)

    @property
    def class_names(self) -> list[str]:
        """Empty for a regression."""
        return self.outputs["data"]["class_names"]

    @cached_property
    def confusion(self) -> dict[str, np.ndarray]:
        """Side -> (C, C) counts of the dev split, rows the true class; empty for a regression."""
        dev = self.answers["dev"]
        return {} if self.task.regression else {side: dev.confusion(side) for side in SIDES}

    def shown(self, value: float) -> str:
        """A value of the metric that chose the best epoch."""
        return percent(value) if self.task.main_metric == "accuracy" else f"{value:.3f}"

    @property
    def metric(self) -> str:
        return METRICS[self.task.main_metric]


def read(folder: Path) -> Run:
    """Reads a run folder.

    Raises:
        UserError: it is none, or its evaluation is not done.
    """
    settings = folder / "config.yaml"
    if not settings.is_file() or not (folder / "stages").is_dir():
        raise UserError(f"{folder}: is not a run folder (it needs config.yaml and stages/); give what `run.dir` named")
    config = load(settings)
    resolved = yaml.safe_load(settings.read_text(encoding="utf-8")).get("resolved")
    if not resolved:
        raise UserError(f"{settings}: has no section `resolved`: a run did not write it; give what `run.dir` named")
    markers = {path.stem: _marker(path) for path in sorted((folder / "stages").glob("*.json"))}
    done = {name: marker for name, marker in markers.items() if marker["done"]}
    if any(name not in done for name in ("data", "teacher", "init", "distill", "evaluate")):
        so_far = ", ".join(done) or "none"
        raise UserError(
            f"{folder}: its evaluation is not done (stages that are: {so_far}); run launcher/train.py --config {settings}"
        )
    said = answers.read(folder / answers.FILE)
    lines = list(records.read(folder / "metrics.jsonl"))
    steps, evaluations = ([line for line in lines if ("split" in line) == of_a_split] for of_a_split in (False, True))
    made = folder / "export"
    exported = manifest.read(made) if (made / manifest.MANIFEST).exists() else {}
    return Run(folder, config, resolved, done, steps, evaluations, said, exported)


def _marker(path: Path) -> dict[str, Any]:
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        if not marker["done"] or "outputs" in marker:
            return marker  # type: ignore[no-any-return]
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise UserError(f"{path}: cannot be read; remove it, and the run's own command makes it again")


def percent(share: float) -> str:
    return f"{share:.1%}"


def size(number: int) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
