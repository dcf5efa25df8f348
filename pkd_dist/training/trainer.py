"""The one training loop, for teachers and students.

    job -> engine, newest checkpoint -> Trainer: train_step, train_step, ... -> Progress
                                                    |
                                                  hooks: metrics, records, progress bar, evaluation, checkpoints

A step's loss is a weighted sum over the global batch, so the same training on any number of ranks does the same
optimization. The position is one number, the optimizer step; batch and random seed follow from it (`StepInputs`).
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from pkd_dist.data.batches import steps_per_epoch
from pkd_dist.distributed.world import World
from pkd_dist.errors import Preempted
from pkd_dist.files import discard
from pkd_dist.telemetry import Telemetry
from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.progress import Bar
from pkd_dist.telemetry.records import Records, cut_after
from pkd_dist.training import checkpoint
from pkd_dist.training.eager_step import EagerStep
from pkd_dist.training.engine import Engine, deepspeed_features, open_engine
from pkd_dist.training.graph_step import open_graph_step
from pkd_dist.training.hooks import BarHook, CheckpointHook, EvaluationHook, Hook, MetricsHook, RecordsHook
from pkd_dist.training.job import Job, Progress
from pkd_dist.training.optimization import Schedule
from pkd_dist.training.plain_engine import PlainEngine
from pkd_dist.training.step import NonFiniteError, StepInputs, StepResult, TrainStep


def train(open_job: Callable[[], Job], world: World, telemetry: Telemetry) -> Progress:
    """Run a job to its end, from its newest checkpoint if there is one; collective.

    Args:
        open_job: called again if the training has to start over, because its best weights were damaged meanwhile.

    Returns:
        The end, whose best weights are intact.

    Raises:
        DivergedError: a loss or gradient is not finite. Nothing of that step is saved.
        Preempted: a rank received a stop signal. A checkpoint is committed.
        UserError: the checkpoints belong to another run, or none is intact; the disk is full.
    """
    job = open_job()
    progress = open_trainer(job, world, telemetry).run()
    folder, best, digest = job.folder, progress.best_file, progress.best_sha256
    problem = world.on_main(lambda: checkpoint.best_damage(folder, best, digest))
    if problem is None:
        return progress
    log.warning("%s: %s, and no later epoch is better; training again from the start", job.name, problem)
    world.on_main(lambda: discard(folder))
    return open_trainer(open_job(), world, telemetry).run()


def open_trainer(job: Job, world: World, telemetry: Telemetry) -> Trainer:
    """Return a trainer at the position of the job's newest checkpoint; collective."""
    schedule = Schedule.of(job.settings, len(job.train), world.size)
    engine = open_engine(job.module, job.deepspeed, schedule, world)
    progress = resume(job, world, engine, telemetry)
    step = open_step(StepInputs(job, world, engine))
    hooks = open_hooks(job, world, telemetry, progress, schedule.total_steps)
    return Trainer(job, world, engine, progress, step, hooks)


def resume(job: Job, world: World, engine: Engine, telemetry: Telemetry) -> Progress:
    """Load a job's newest checkpoint into an engine; collective.

    Returns:
        Its position; the start if there is no checkpoint.
    """
    schedule = engine.schedule

    def earlier_total(state: checkpoint.TrainingState) -> int:
        return state.get("total_steps", schedule.total_steps)

    found = checkpoint.find(
        world, job.folder, job.fingerprint, log.info,
        lambda state: schedule.continues(int(state["progress"]["step"]), earlier_total(state)),
    )  # fmt: skip
    progress = _restore(found, engine) if found else Progress()
    earlier = earlier_total(found.state) if found else 0
    if schedule.branch_step is not None and earlier != schedule.total_steps:  # a shorter training took another course
        world.on_main(lambda: cut_after(job.records, progress.step))
    if found is None:
        return progress
    telemetry.metrics.checkpoint_time.set((found.path / checkpoint.COMMIT).stat().st_mtime)
    if progress.step < schedule.total_steps:
        log.info("%s: resuming from step %d of %d (%s)", job.name, progress.step, schedule.total_steps, found.path.name)
    return progress


def _restore(found: checkpoint.Found, engine: Engine) -> Progress:
    engine.state.restore(checkpoint.Shards(found.path), found.state["counters"])
    progress = Progress(**found.state["progress"])
    if found.best_damage and progress.best_step == progress.step:
        progress.forget_evaluation()
    return progress


def open_step(inputs: StepInputs) -> TrainStep:
    """Return how this training does its steps: a `GraphStep` if it can, else an `EagerStep`.

    A `GraphStep` needs a single rank on a GPU, the plain engine, and one micro-batch per step.
    """
    engine, world = inputs.engine, inputs.world
    if world.device.type != "cuda" or world.size > 1:
        return EagerStep(inputs)
    if not isinstance(engine, PlainEngine):
        features = ", ".join(deepspeed_features(inputs.job.deepspeed))
        log.info("steps run kernel by kernel, not as a CUDA graph: train.deepspeed asks for %s", features)
        return EagerStep(inputs)
    if engine.schedule.gradient_accumulation_steps > 1:
        log.info(
            "steps run kernel by kernel, not as a CUDA graph: micro-batches are accumulated (train.micro_batch_size)"
        )
        return EagerStep(inputs)
    return open_graph_step(inputs, engine)


def open_hooks(job: Job, world: World, telemetry: Telemetry, progress: Progress, total_steps: int) -> list[Hook]:
    """Return a training's hooks; collective."""
    hooks: list[Hook] = [MetricsHook(telemetry.metrics)]

    def open_records() -> None:
        records = Records(job.records)
        hooks.append(RecordsHook(records, telemetry.trackers.open(job.name, job.records, progress.step)))

    world.on_main(open_records)
    epochs = f"{job.settings.epochs} epoch{'s' if job.settings.epochs > 1 else ''}"
    bar = Bar(f"{job.name}, {epochs}", total_steps, progress.step, telemetry.show)
    return [*hooks, BarHook(bar), EvaluationHook(), CheckpointHook()]


@dataclass
class Trainer:
    """A training in progress. `open_trainer` makes one."""

    job: Job
    world: World
    engine: Engine
    progress: Progress
    step: TrainStep
    hooks: Sequence[Hook]

    @property
    def total_steps(self) -> int:
        return self.engine.schedule.total_steps

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.job.train), self.job.settings.batch_size)

    @property
    def ended(self) -> bool:
        """Whether all epochs are done, or dev has not improved for `train.patience_epochs`."""
        settings, progress = self.job.settings, self.progress
        return progress.step >= self.total_steps or progress.out_of_patience(settings.patience_epochs)

    def run(self) -> Progress:
        """Train to the end; collective. See `train`."""
        for _ in self.steps():
            pass
        return self.progress

    def steps(self) -> Iterator[None]:
        """Train to the end, and yield after each step; collective."""
        completed = False
        try:
            yield from self._steps()
            completed = True
        finally:
            for hook in reversed(self.hooks):
                hook.on_end(self, completed)

    def _steps(self) -> Iterator[None]:
        self.engine.train()
        for hook in self.hooks:
            hook.on_start(self)
        while not self.ended:
            self.train_step()
            if number := self.step.stop_signal():
                self.stop(number)
            self.after_step()
            yield
        progress = self.progress
        if progress.step < self.total_steps:
            log.info(
                "%s: stopped after epoch %d of %d: dev has not improved for %d epoch(s); the best was epoch %d",
                self.job.name, progress.evaluated_epochs, self.job.settings.epochs,
                progress.evaluated_epochs - progress.best_epoch, progress.best_epoch,
            )  # fmt: skip

    def train_step(self) -> None:
        """Do one optimizer step; collective."""
        self.world.at(f"{self.job.name}, step {self.progress.step + 1}")
        self._report(lambda: self.step(self.progress.step))
        self.progress.step += 1

    def flush(self) -> None:
        """Wait for the last step and report its result, unless that was done before; call it before using the weights."""
        self._report(self.step.flush)

    def _report(self, wait: Callable[[], StepResult | None]) -> None:
        """Wait for a result, if there is one, and report it to the hooks."""
        try:
            result = wait()
        except NonFiniteError as error:
            for hook in self.hooks:
                hook.on_diverged(self, error.terms)
            raise
        if result is not None:
            self.progress.samples += result.examples
            self.progress.tokens += result.tokens
            for hook in self.hooks:
                hook.on_result(self, result)

    def after_step(self) -> None:
        for hook in self.hooks:
            hook.after_step(self)

    def stop(self, number: int) -> NoReturn:
        """Save a checkpoint and raise Preempted; collective.

        Args:
            number: the stop signal.
        """
        for hook in self.hooks:
            hook.on_stop(self)
        raise Preempted(
            f"{self.job.name}: stopped by {signal.Signals(number).name}; a checkpoint of step {self.progress.step} is "
            f"committed in {self.job.folder}; rerun the same command to resume",
            number,
        )
