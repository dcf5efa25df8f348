"""A worker of a study: it trains one trial after the other until none is left."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from optuna.trial import TrialState

from pkd_dist.distributed.world import World
from pkd_dist.errors import DivergedError, FullDiskError, UserError
from pkd_dist.files import is_full, make_folder
from pkd_dist.lock import Lock
from pkd_dist.search.runner import Opened
from pkd_dist.search.shared import SweepConfig
from pkd_dist.search.study import REASON, WORKERS, Claim, Study, shown_value
from pkd_dist.search.trial import Bases, Found, OpenTrial, TooLargeError, clean, open_trial, train
from pkd_dist.telemetry.log import log, to_file, to_terminal

_FAILURES_IN_A_ROW = 5
_POLL_SECONDS = 1.0
_ON_A_GPU = 8
"""Students per step on a GPU: a guess, not measured."""


def work(
    study: Study, name: str, train: Callable[[list[Claim]], None], pause: Callable[[], None], count: int = 1
) -> None:
    """Train trials until none is left, or the time is up.

    Args:
        name: Of this worker, unique in the study.
        train: Trains claimed trials, and tells the study what became of them.
        pause: Called between trials; raises Preempted where a stop signal has arrived.
        count: Trials to claim at a time.

    Raises:
        Preempted: A stop signal arrived. Another worker continues the claimed trials.
    """
    folder = study.folder / WORKERS / name
    make_folder(folder)
    held = Lock(folder).acquire()  # by which others know that this worker is alive
    try:
        while True:
            pause()
            if claims := list(itertools.islice(iter(lambda: study.claim(name), None), count)):
                train(claims)
            elif study.done:
                return
            else:
                time.sleep(_POLL_SECONDS)  # others may add seeds, or leave a trial to continue
    finally:
        held.release()


def search(opened: Opened, name: str, world: World) -> None:
    """Train the trials of a sweep, several at a time where `sweep.students_per_step` says so; see `work`.

    Raises:
        UserError: What all points share cannot be made, or points fail one after the other, and none has succeeded.
    """
    sweep, study, bases = opened.sweep, opened.study(), Bases(opened.sweep, world)
    if opened.one_base:
        bases.of([])  # what is wrong with it is no failure of a trial
        to_terminal(True)  # leaves the log file of the base
    to_file(sweep.folder / WORKERS / name, 0)

    def train_claims(claims: list[Claim]) -> None:
        trials = (_open(claim, study, bases, opened) for claim in claims)
        for trial, found in train([trial for trial in trials if trial is not None]):
            if isinstance(found, Found):
                _note(trial.claim, found, study, opened)
            else:
                _fail(trial.claim, found, study, sweep)
        _require_success(study)

    together = study.settings.students_per_step
    count = together if together != "auto" else _ON_A_GPU if world.device.type == "cuda" else 1
    work(study, name, train_claims, lambda: world.stop_here("between two trials"), count)


def _note(claim: Claim, found: Found, study: Study, opened: Opened) -> None:
    """Tell the study what became of a trial."""
    objective = opened.objective
    log.info(
        "trial %d: %s, %s %.4g after epoch %.4g, %.1f s", claim.number, "pruned" if found.pruned else "complete", objective,
        shown_value(found.value, objective), found.epoch, found.seconds,
    )  # fmt: skip
    if found.pruned:
        study.prune(claim, found.attributes)
    else:
        study.complete(claim, found.value, found.attributes)
    clean(opened.sweep, claim.number)


def _open(claim: Claim, study: Study, bases: Bases, opened: Opened) -> OpenTrial | None:
    """Open a trial; None if it cannot be trained, which the study notes."""
    try:
        return open_trial(claim, study, bases, opened.sweep, opened.objective, opened.reported)
    except TooLargeError as problem:
        log.info("trial %d: left out: %s", claim.number, problem)
        study.prune(claim, {REASON: str(problem)} | asdict(problem.footprint))
        clean(opened.sweep, claim.number)
    except Exception as error:
        _fail(claim, error, study, opened.sweep)
    return None


def _fail(claim: Claim, error: Exception, study: Study, sweep: SweepConfig) -> None:
    """Note that a trial failed; what is no failure of the trial is raised."""
    if isinstance(error, FullDiskError) or is_full(error):
        raise error
    if isinstance(error, torch.OutOfMemoryError):
        reason = "out of memory; lower sweep.students_per_step, or leave large students out"
    elif isinstance(error, UserError | DivergedError):
        reason = str(error)
    else:
        raise error
    log.info("trial %d: failed: %s", claim.number, reason)
    study.fail(claim, reason)
    clean(sweep, claim.number)


def _require_success(study: Study) -> None:
    """Raise UserError if the last trials have failed one after the other, as on a full disk."""
    ended = [trial for trial in study.trials if trial.state.is_finished() and trial.datetime_complete]
    last = sorted(ended, key=lambda trial: trial.datetime_complete or 0)[-_FAILURES_IN_A_ROW:]
    if len(last) == _FAILURES_IN_A_ROW and all(trial.state is TrialState.FAIL for trial in last):
        raise UserError(
            f"the last {len(last)} trials failed; the last one: {last[-1].user_attrs[REASON]}", "sweep.space"
        )
