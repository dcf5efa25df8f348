"""A worker of a sweep: it trains one point after the other until none is left."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch
from optuna.trial import TrialState

from pkd_dist.distributed.world import World
from pkd_dist.errors import DivergedError, UserError
from pkd_dist.files import is_full, make_folder
from pkd_dist.lock import Lock
from pkd_dist.search.shared import SweepConfig
from pkd_dist.search.study import REASON, WORKERS, Claim, Study, shown_value
from pkd_dist.search.trial import Bases, Found, OpenTrial, TooLargeError, clean, open_trial, train
from pkd_dist.telemetry.log import log, to_file

_FAILURES_IN_A_ROW = 5
_POLL_SECONDS = 1.0
_ON_A_GPU = 8
"""Students per step on a GPU: a guess, not measured."""


def work(sweep: SweepConfig, study: Study, name: str, objective: str, reported: str, world: World) -> None:
    """Train points until none is left, or the time is up.

    Args:
        name: Of this worker, unique in the sweep.
        objective: A key of the figures on dev.
        reported: The one that the pruner compares.

    Raises:
        Preempted: A stop signal arrived. The checkpoints of the trials are committed; another worker continues them.
        UserError: Points fail one after the other, and none has succeeded.
    """
    with _alive(sweep, name):
        bases = Bases(sweep, world)
        together = study.settings.students_per_step
        count = together if together != "auto" else _ON_A_GPU if world.device.type == "cuda" else 1
        while True:
            world.stop_here("between two trials")
            claims = list(itertools.islice(iter(lambda: study.claim(name), None), count))
            if not claims:
                if study.done:
                    return
                time.sleep(_POLL_SECONDS)  # others may add seeds, or leave a trial to continue
                continue
            opened = (_open(claim, study, bases, sweep, objective, reported) for claim in claims)
            for trial, found in train([trial for trial in opened if trial is not None]):
                if isinstance(found, Found):
                    _note(trial.claim, found, study, sweep, objective)
                else:
                    _fail(trial.claim, found, study, sweep)
            _require_success(study)


def _note(claim: Claim, found: Found, study: Study, sweep: SweepConfig, objective: str) -> None:
    """Tell the study what became of a trial."""
    log.info(
        "trial %d: %s, %s %.4g after epoch %.4g, %.1f s", claim.number, "pruned" if found.pruned else "complete", objective,
        shown_value(found.value, objective), found.epoch, found.seconds,
    )  # fmt: skip
    if found.pruned:
        study.prune(claim, found.attributes)
    else:
        study.complete(claim, found.value, found.attributes)
    clean(sweep, claim.number)


@contextmanager
def _alive(sweep: SweepConfig, name: str) -> Iterator[None]:
    """Hold the lock by which others know that this worker is alive, and log to its folder."""
    folder = sweep.folder / WORKERS / name
    make_folder(folder)
    held = Lock(folder).acquire()
    to_file(folder, 0)
    try:
        yield
    finally:
        held.release()


def _open(
    claim: Claim, study: Study, bases: Bases, sweep: SweepConfig, objective: str, reported: str
) -> OpenTrial | None:
    """Open a trial; None if it cannot be trained, which the study notes."""
    try:
        return open_trial(claim, study, bases, sweep, objective, reported)
    except TooLargeError as problem:
        log.info("trial %d: left out: %s", claim.number, problem)
        study.prune(claim, {REASON: str(problem)} | asdict(problem.footprint))
        clean(sweep, claim.number)
    except Exception as error:
        _fail(claim, error, study, sweep)
    return None


def _fail(claim: Claim, error: Exception, study: Study, sweep: SweepConfig) -> None:
    """Note that a trial failed; what is no failure of the trial is raised."""
    if isinstance(error, OSError) and is_full(error):
        reason = f"the disk is full ({error})"
    elif isinstance(error, torch.OutOfMemoryError):
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
