"""Train points of a sweep in this process: the same training as that of a run of its own, on data and a cache that are open.

What a run would do beside its training is done once for all points (`Bases`).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pkd_dist import pipeline
from pkd_dist.config.schema import Config
from pkd_dist.distributed.world import World
from pkd_dist.errors import Preempted, UserError
from pkd_dist.files import discard, make_folder
from pkd_dist.lock import waiting_lock
from pkd_dist.metric_names import DIVERGENCE
from pkd_dist.search.footprint import Footprint, footprint
from pkd_dist.search.shared import BASE_STAGES, SweepConfig, make_own_folder
from pkd_dist.search.space import as_overrides
from pkd_dist.search.study import POINT, TOGETHER, WORKERS, Claim, Study, objective_value
from pkd_dist.stages import distill, init
from pkd_dist.stages.base import fingerprint_of, inputs_of
from pkd_dist.stages.context import Context, resolve, with_fingerprint
from pkd_dist.stages.distill import TeacherDev
from pkd_dist.stages.init import InitOutput
from pkd_dist.telemetry import Telemetry
from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.metrics import RunMetrics
from pkd_dist.training.hooks import Hook, evaluate
from pkd_dist.training.stacked_step import can_stack, run_together
from pkd_dist.training.step import StepResult
from pkd_dist.training.trainer import Trainer, open_trainer

TRIALS = "trials"


class Pruned(Exception):  # noqa: N818 - not an error
    """The pruner ended a training."""


@dataclass(frozen=True)
class Found:
    """What became of a trial.

    Attributes:
        pruned: The pruner ended it.
        value: To maximize; that of the best epoch, or where it was pruned in its first one.
        epoch: That of `value`.
        scores: Figures on dev after the best epoch.
        history: Figures on dev after each evaluated epoch.
        footprint: Of the student's int8 file.
        examples: Of dev.
        seconds: Of this process's work on it: opening, steps (its share of those for several students), evaluations, checkpoints.
    """

    pruned: bool
    value: float
    epoch: float
    scores: dict[str, float]
    history: list[dict[str, float]]
    parameters: int
    footprint: Footprint
    examples: int
    seconds: float

    @property
    def attributes(self) -> dict[str, object]:
        """Return what the study keeps of a trial."""
        kept = ("epoch", "scores", "history", "parameters", "examples", "seconds")
        return {key: value for key, value in vars(self).items() if key in kept} | asdict(self.footprint)


class TooLargeError(UserError):
    """The student does not meet the constraints.

    Attributes:
        footprint: Of its int8 file.
    """

    def __init__(self, problem: str, footprint: Footprint):
        super().__init__(problem)
        self.footprint = footprint


class Bases:
    """The bases of a study, each opened once in this process.

    Args:
        world: A single rank.
    """

    def __init__(self, sweep: SweepConfig, world: World):
        self._sweep, self._world = sweep, world
        self._opened: dict[Path, Context] = {}

    def of(self, point: Sequence[str]) -> Context:
        """Return the base of a point, with the outputs of its stages; it is made where it is missing.

        Raises:
            UserError, Preempted: See `pipeline.run`.
        """
        folder, overrides = self._sweep.of_base(point)
        if folder not in self._opened:
            config, lock = self._sweep.load(overrides), self._sweep.folder / WORKERS / "bases"

            def tick() -> None:
                self._world.interrupt("preparing a study")

            make_own_folder(folder)
            with waiting_lock(lock, tick):
                with waiting_lock(folder, tick):  # a run that a killed command left behind is still stopping
                    pass
                self._opened[folder] = pipeline.run(config, self._sweep.file, self._world, BASE_STAGES)
        return self._opened[folder]


@dataclass
class OpenTrial:
    """A trial whose training can start, or continues from its newest checkpoint."""

    claim: Claim
    context: Context
    trainer: Trainer
    report: Report
    footprint: Footprint
    objective: str
    opening_seconds: float

    def note_together(self, students: int) -> None:
        """Have the study know how many students share its steps."""
        if self.claim.trial.user_attrs.get(TOGETHER) != students:
            self.claim.trial.set_user_attr(TOGETHER, students)

    def found(self, pruned: bool) -> Found:
        """Return what became of it, once its training has ended."""
        progress = self.trainer.progress
        best = next((entry for entry in progress.history if entry["epoch"] == progress.best_epoch), self.report.newest)
        return Found(
            pruned=pruned,
            value=objective_value(best, self.objective),
            epoch=best["epoch"],
            scores=_figures(best),
            history=progress.history,
            parameters=self.context.output(InitOutput).parameters,
            footprint=self.footprint,
            examples=len(self.trainer.job.dev),
            seconds=self.opening_seconds + self.report.seconds,
        )


def open_trial(
    claim: Claim, study: Study, bases: Bases, sweep: SweepConfig, objective: str, reported: str
) -> OpenTrial:
    """Open the training of a trial.

    Args:
        objective: A key of the figures on dev.
        reported: The one that the pruner compares.

    Raises:
        TooLargeError: The student does not meet the constraints.
        UserError, Preempted: See `training.trainer.train`.
    """
    began = time.monotonic()
    point, folder = as_overrides(claim.trial.params), sweep.folder / TRIALS / str(claim.number)
    base = bases.of(point)
    config = sweep.load([*sweep.of_point(point, folder, claim.seed), "metrics.enabled=false"])
    make_folder(folder)
    context = _context(base, config, sweep)
    if objective == DIVERGENCE and not context.resolved.needs_teacher:
        raise UserError("divergence compares with the teacher, which this point does not use", "sweep.objective")
    context.hand_on(init.run(context))
    size = footprint(context, sweep.folder)
    if problem := size.problem(config.sweep.constraints):
        raise TooLargeError(problem, size)
    fingerprint = fingerprint_of(distill.STAGE, inputs_of(distill.STAGE, context))
    job = distill.training_job(with_fingerprint(context, fingerprint))
    if found := context.known(TeacherDev):
        base.hand_on(found)
    trainer = open_trainer(job, context.world, context.telemetry)
    report = Report(claim, study, reported, trainer)
    trainer.hooks = [*trainer.hooks, report]
    return OpenTrial(claim, context, trainer, report, size, objective, time.monotonic() - began)


def train(trials: Sequence[OpenTrial]) -> Iterator[tuple[OpenTrial, Found | Exception]]:
    """Train students; yield each as it ends, with what was found or the exception that ended it.

    Those of one shape take their steps together (`training.stacked_step`), the others one after the other.

    Raises:
        Preempted: A stop signal arrived; the checkpoints of all that were being trained are committed.
    """
    stopped: Preempted | None = None
    for group in _groups(trials):
        left = dict(enumerate(group))
        for trial in group:
            trial.note_together(len(group))
        ends = run_together([trial.trainer for trial in group]) if len(group) > 1 else _alone(group[0].trainer)
        for place, error in ends:
            if isinstance(error, Preempted):
                stopped = error
            elif error is None or isinstance(error, Pruned):
                yield group[place], group[place].found(pruned=error is not None)
            else:
                yield group[place], error
            del left[place]
            for trial in left.values() if not stopped else ():
                trial.note_together(len(left))
        if stopped:
            raise stopped


def _alone(trainer: Trainer) -> Iterator[tuple[int, Exception | None]]:
    try:
        trainer.run()
    except Exception as error:
        yield 0, error
    else:
        yield 0, None


def _groups(trials: Sequence[OpenTrial]) -> list[list[OpenTrial]]:
    """Group trials that can take their steps together."""
    groups: list[list[OpenTrial]] = []
    for trial in trials:
        for group in groups:
            if can_stack([group[0].trainer, trial.trainer]):
                group.append(trial)
                break
        else:
            groups.append([trial])
    return groups


def clean(sweep: SweepConfig, number: int) -> None:
    """Remove what a trial that has ended no longer needs: all but its metrics."""
    for name in ("checkpoints", "student_init"):
        discard(sweep.folder / TRIALS / str(number) / name)


def _context(base: Context, config: Config, sweep: SweepConfig) -> Context:
    """Return the context of a run on the data and the cache of a base, whose precision it has on every host."""
    resolved = resolve(config, sweep.file, base.world.device, base.resolved.paths.data)
    resolved = replace(resolved, precision=base.resolved.precision, teacher_precision=base.resolved.teacher_precision)
    context = Context(resolved, base.world, Telemetry(RunMetrics(), show=False), pipeline.VERSIONS)
    context.adopt(base)
    return context


def _figures(entry: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in entry.items() if key not in ("epoch", "step")}


class Report(Hook):
    """Reports dev to the study after each evaluated epoch and at the pruner's rungs, and ends the training if the pruner says so.

    Attributes:
        newest: The figures that were reported last, with their `epoch`.
        seconds: Of steps, evaluations and checkpoints in this process.
    """

    def __init__(self, claim: Claim, study: Study, reported: str, trainer: Trainer):
        self._claim, self._reported, self._looks = claim, reported, study.looks_per_epoch
        self._epochs = trainer.job.settings.epochs
        self._first_seed = claim.trial.user_attrs[POINT] is None  # the others are for the mean
        rungs = study.rungs(self._epochs) if self._first_seed else []
        self._rungs = {round(rung * trainer.steps_per_epoch / self._looks): rung for rung in rungs}
        self.newest: dict[str, float] = {}
        self.seconds = 0.0

    def on_result(self, trainer: Trainer, result: StepResult) -> None:
        self.seconds += result.seconds["step"]

    def after_checkpoint(self, trainer: Trainer, seconds: float) -> None:
        self.seconds += seconds

    def on_start(self, trainer: Trainer) -> None:
        if trainer.progress.step:  # it was stopped in an evaluation
            self.after_step(trainer)

    def after_step(self, trainer: Trainer) -> None:
        progress = trainer.progress
        rung = self._rungs.get(progress.step)
        if rung and not (progress.history and progress.history[-1]["step"] == progress.step):
            began = time.monotonic()
            figures = evaluate(trainer)
            self.seconds += time.monotonic() - began
            self._report(rung, figures)

    def on_evaluation(self, trainer: Trainer, figures: dict[str, float], seconds: float) -> None:
        self.seconds += seconds
        self._report(trainer.progress.evaluated_epochs * self._looks, figures)

    def _report(self, look: int, figures: dict[str, float]) -> None:
        epoch, trial = look / self._looks, self._claim.trial
        self.newest = {**figures, "epoch": epoch}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is trained again after a kill was reported before
            trial.report(objective_value(figures, self._reported), look)
        if self._first_seed and epoch < self._epochs and trial.should_prune():
            log.info("trial %d: pruned after epoch %.4g", self._claim.number, epoch)
            raise Pruned
