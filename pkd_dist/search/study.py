"""A study: its points, who trains them, and what came out, in a journal that any number of processes share.

Storage, sampling and pruning are Optuna's. A point is a trial of the study for one seed; a sweep chooses its points, a comparison
names its runs. The state of a trial:

    waiting -> running (the worker's name is in `worker`) -> complete | pruned | failed (`reason`)

A running trial whose worker no longer holds its lock is continued by the next worker that looks for work.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.storages.journal._file import get_lock_file
from optuna.trial import FrozenTrial, Trial, TrialState

from pkd_dist.config.sweep import Sweep
from pkd_dist.errors import UserError
from pkd_dist.files import make_folder
from pkd_dist.lock import Lock, waiting_lock
from pkd_dist.metric_names import DIVERGENCE
from pkd_dist.search.space import Point, Space

JOURNAL, WORKERS = "study.journal", "workers"
DEFAULT_POINTS = 100
SEED, WORKER, REASON, POINT, NAMED, TOGETHER = "seed", "worker", "reason", "point", "named", "together"
"""Attributes of a trial: seed of the student, folder name of its worker, why it failed, number of the trial of the same point
with the first seed, the point of a comparison (`Named`), and how many students share its steps (absent: one)."""
STATES = {
    TrialState.WAITING: "waiting", TrialState.RUNNING: "running", TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}  # fmt: skip
"""What people read of a state."""
SWEEP, COMPARISON = "sweep", "comparison"
"""Kinds of a study."""

optuna.logging.set_verbosity(logging.WARNING)


class Named(NamedTuple):
    """A point that has a name, not values of a space. `overrides` are arguments of its runs; `facts`, JSON, are for readers of the study."""

    name: str
    overrides: list[str]
    facts: dict[str, object]


@dataclass(frozen=True)
class Claim:
    """A trial that this worker is to train."""

    trial: Trial
    seed: int

    @property
    def number(self) -> int:
        return self.trial.number


class Study:
    """The study in a folder.

    Args:
        folder: Of the study.
        settings: The section `sweep`.
        space: Of the configuration.
        kind: `SWEEP` or `COMPARISON`.

    Raises:
        UserError: The folder has a study of another kind.
    """

    def __init__(self, folder: Path, settings: Sweep, space: Space, kind: str = SWEEP):
        make_folder(folder / WORKERS / "study")
        self.folder, self.settings, self.space, self.kind = folder, settings, space, kind
        path = str((folder / JOURNAL).absolute())  # Optuna's lock is a link to it
        _drop_torn_line(path)
        storage, pruner = JournalStorage(JournalFileBackend(path)), _pruner(settings)
        if others := set(optuna.get_all_study_names(storage)) - {kind}:
            raise UserError(f"{folder}: has a {others.pop()}; choose another folder", "--output")
        try:
            self._study = optuna.load_study(study_name=kind, storage=storage, pruner=pruner)
        except KeyError:
            self._study = optuna.create_study(
                study_name=kind, storage=storage, pruner=pruner, direction="maximize", load_if_exists=True
            )

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        """Let one process at a time change which trials there are, and whose they are."""
        return waiting_lock(self.folder / WORKERS / "study")

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials, by number."""
        return self._study.get_trials(deepcopy=False)

    @property
    def completed(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials if trial.state is TrialState.COMPLETE]

    @property
    def ended(self) -> int:
        return sum(trial.state.is_finished() for trial in self.trials)

    def as_optuna(self) -> optuna.Study:
        """Return the study for Optuna's own analyses."""
        return self._study

    def prepare(self, identity: Mapping[str, object], objective: str) -> None:
        """Add the points that are known in advance: all of a grid, or as many as `sweep.trials` asks for.

        Args:
            identity: What decides the results; a study with another one is rejected.
            objective: See `Reading`.

        Raises:
            UserError: The folder has the study of another configuration, other data or another teacher.
        """
        with self._locked():
            self._require_same(identity)
            first, known = self.settings.seeds[0], sum(1 for trial in self.trials if trial.user_attrs[POINT] is None)
            points = list(self._points())
            for point in points[known:]:
                self._study.enqueue_trial(point, {SEED: first, POINT: None})
            self._study.set_user_attr("objective", objective)
            self._study.set_user_attr("began", self._study.user_attrs.get("began") or time.time())

    def _require_same(self, identity: Mapping[str, object]) -> None:
        content = json.loads(json.dumps(identity))
        before = self._study.user_attrs.get("identity")
        if before is None:
            self._study.set_user_attr("identity", content)
            return
        before.pop("precision", None)  # of earlier versions: what this kind of host computes in
        changed = [key for key in {**before, **content} if before.get(key) != content.get(key)]
        if changed:
            raise UserError(
                f"{self.folder}: has a {self.kind} with another {', '.join(sorted(changed)[:5])}; choose another folder, or restore "
                "what was changed",
                "--output",
            )

    def request(self, points: Sequence[Named], seeds: Sequence[int]) -> None:
        """Have named points trained with each seed, and nothing else.

        What is complete stays; what failed is tried again. What another call asked for and did not complete is withdrawn, until a
        call asks for it again.

        Raises:
            UserError: Training of a point of that name has begun with other settings.
        """
        with self._locked():
            wanted, known = {point.name: point for point in points}, set()
            for trial in self.trials:
                named, seed = Named(*trial.user_attrs[NAMED]), trial.user_attrs[SEED]
                same = named == wanted.get(named.name, named)
                if not same and trial.datetime_start and REASON not in trial.user_attrs:
                    had = f"{named.name} has other settings in {self.folder} ({' '.join(named.overrides)})"
                    raise UserError(f"{had}; choose another name", "--method")
                if same and named.name in wanted and seed in seeds and trial.state is not TrialState.FAIL:
                    known.add((named.name, seed))
                elif trial.state is TrialState.WAITING or self._is_left(trial):
                    self._study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            for seed, point in itertools.product(seeds, points):
                if (point.name, seed) not in known:
                    self._study.enqueue_trial({}, {SEED: seed, POINT: None, NAMED: point})

    def _points(self) -> Iterator[Point]:
        if self.kind == COMPARISON:
            return
        if self.settings.sampler == "grid":
            points = list(self.space.points())
            random.Random(self.settings.seed).shuffle(points)  # the pruner compares a point with those that came before
            yield from itertools.islice(points, self.settings.trials)
        elif not self._open_ended:
            yield from ({} for _ in range(self.settings.trials or DEFAULT_POINTS))

    def claim(self, worker: str) -> Claim | None:
        """Return a trial to train: one that waits or a new one, while there is time, else one that a worker left.

        Args:
            worker: Name of the folder whose lock the caller holds.
        """
        with self._locked():
            trials = self.trials
            waiting = next((trial.number for trial in trials if trial.state is TrialState.WAITING), None)
            if waiting is None and self._open_ended and not self.out_of_time:
                waiting = len(trials)
                self._study.enqueue_trial({}, {SEED: self.settings.seeds[0], POINT: None})
            if waiting is not None and not self.out_of_time:
                self._study.sampler = _sampler(self.settings, waiting)  # so that no two workers draw the same point
                trial = self._study.ask(self.space.distributions)
            elif left := next((trial for trial in trials if self._is_left(trial)), None):
                self._study.sampler = _sampler(self.settings, left.number)
                trial = Trial(self._study, left._trial_id)
                for name, distribution in self.space.distributions.items():
                    trial._suggest(name, distribution)  # what a kill left out; known values are kept
            else:
                return None
            trial.set_user_attr(WORKER, worker)
        return Claim(trial, int(trial.user_attrs[SEED]))

    @property
    def _open_ended(self) -> bool:
        """Whether the number of points depends on the time alone."""
        settings = self.settings
        return settings.budget is not None and settings.trials is None and settings.sampler != "grid"

    def _is_left(self, trial: FrozenTrial) -> bool:
        return trial.state is TrialState.RUNNING and not self.is_alive(trial.user_attrs.get(WORKER))

    def is_alive(self, worker: str | None) -> bool:
        """Return whether a worker still holds its lock."""
        folder = self.folder / WORKERS / str(worker)
        if worker is None or not folder.exists():
            return False
        try:
            Lock(folder).acquire().release()
        except UserError:
            return True
        return False

    @property
    def out_of_time(self) -> bool:
        limit = self.settings.budget_seconds
        return limit is not None and time.time() - float(self._study.user_attrs["began"]) > limit

    def complete(self, claim: Claim, value: float, found: Mapping[str, object]) -> None:
        """Note a finished training, and have its point trained with its other seeds.

        Args:
            value: To maximize.
            found: Attributes of the trial.
        """
        for key, each in found.items():
            claim.trial.set_user_attr(key, each)
        with self._locked():
            if claim.trial.user_attrs[POINT] is None:
                known = {trial.user_attrs[SEED] for trial in self.trials if trial.user_attrs.get(POINT) == claim.number}
                for seed in (seed for seed in self.settings.seeds[1:] if seed not in known):
                    self._study.enqueue_trial(claim.trial.params, {SEED: seed, POINT: claim.number})
            self._study.tell(claim.trial, value)

    def prune(self, claim: Claim, found: Mapping[str, object]) -> None:
        """Note that the pruner ended a training."""
        for key, each in found.items():
            claim.trial.set_user_attr(key, each)
        self._study.tell(claim.trial, state=TrialState.PRUNED)

    def fail(self, claim: Claim, reason: str) -> None:
        """Note that a trial cannot be trained, and why."""
        claim.trial.set_user_attr(REASON, reason)
        self._study.tell(claim.trial, state=TrialState.FAIL)

    def left_out(self, number: int, limits: Mapping[str, object], problem: str) -> None:
        """Note that a point's exported student does not meet the constraints."""
        self._study.set_user_attr("left_out", self.known_left_out(limits) | {str(number): problem, "limits": limits})

    def known_left_out(self, limits: Mapping[str, object]) -> dict[str, object]:
        """Return the problems that were noted under the same constraints, by number of the point."""
        known: dict[str, object] = self._study.user_attrs.get("left_out", {})
        return known if known.get("limits") == limits else {}

    @property
    def looks_per_epoch(self) -> int:
        """How many steps of Optuna's an epoch has: the pruner's rungs are whole numbers of steps."""
        return self.settings.looks_per_epoch if self.settings.pruner == "asha" else 1

    def rungs(self, epochs: int) -> list[int]:
        """Return after which of Optuna's steps the pruner decides in a training of `epochs` epochs."""
        if self.settings.pruner == "none":
            return []
        powers = (self.settings.reduction**rung for rung in itertools.count())
        return list(itertools.takewhile(lambda step: step < epochs * self.looks_per_epoch, powers))

    @property
    def done(self) -> bool:
        """Whether there is nothing left to train."""
        trials, out_of_time = self.trials, self.out_of_time
        left = [
            trial
            for trial in trials
            if not trial.state.is_finished() and (trial.state is TrialState.RUNNING or not out_of_time)
        ]
        return bool(trials) and not left and (out_of_time or not self._open_ended)


@dataclass(frozen=True)
class Reading:
    """A study as another process finds it.

    Attributes:
        objective: What is maximized, a key of the figures on dev (`divergence`: minimized).
        seeds: Of each point.
        looks_per_epoch: See `Study`.
    """

    folder: Path
    trials: list[FrozenTrial]
    objective: str
    seeds: tuple[int, ...]
    looks_per_epoch: int


def read(folder: Path) -> Reading:
    """Read the study in a folder; writes nothing.

    Raises:
        UserError: There is none.
    """
    if not folder.exists():
        raise UserError(f"no such folder: {folder}; give a folder that `pkd sweep` wrote")
    if not (folder / JOURNAL).is_file():
        raise UserError(f"{folder}: no {JOURNAL}; give a folder that `pkd sweep` wrote")
    try:
        study = optuna.load_study(study_name=SWEEP, storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))))
        identity = study.user_attrs["identity"]
        seeds = tuple(identity["sweep.seeds"])
        looks = int(identity.get("sweep.looks_per_epoch", 1)) if identity.get("sweep.pruner") == "asha" else 1
        return Reading(folder, study.get_trials(deepcopy=False), study.user_attrs["objective"], seeds, looks)
    except (KeyError, ValueError) as error:
        raise UserError(f"{folder / JOURNAL}: is damaged, or has no study yet ({error})") from None


def objective_value(figures: Mapping[str, float], objective: str) -> float:
    """Return the value of an evaluation on dev that the study maximizes."""
    return -figures[DIVERGENCE] if objective == DIVERGENCE else figures[objective]


def shown_value(value: float, objective: str) -> float:
    """Return a score as people read it, of a value that the study maximizes."""
    return -value if objective == DIVERGENCE else value


def _sampler(settings: Sweep, number: int) -> optuna.samplers.BaseSampler:
    """Return the sampler of a trial; the points of a grid are in the study from the start."""
    seed = int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0])
    if settings.sampler == "tpe":
        return optuna.samplers.TPESampler(
            seed=seed, multivariate=True, constant_liar=True, warn_independent_sampling=False
        )
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(settings: Sweep) -> optuna.pruners.BasePruner:
    if settings.pruner == "none":
        return optuna.pruners.NopPruner()
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=settings.reduction)


def _drop_torn_line(path: str) -> None:
    """Cut the end of a journal that a power loss left incomplete; Optuna would append to it."""
    file = Path(path)
    if not file.exists():
        return
    with get_lock_file(JournalFileSymlinkLock(path)), open(file, "r+b") as journal:
        content = journal.read()
        if content and not content.endswith(b"\n"):
            journal.truncate(content.rfind(b"\n") + 1)


def seeds_of(trials: Sequence[FrozenTrial]) -> dict[int, list[FrozenTrial]]:
    """Group the trials of each point: number of its first trial -> its trials, by number."""
    groups: dict[int, list[FrozenTrial]] = {}
    for trial in trials:
        first = trial.user_attrs.get(POINT)
        groups.setdefault(trial.number if first is None else first, []).append(trial)
    return groups
