"""What happens around the steps: metrics, records, the progress bar, evaluation and checkpoints.

`Trainer` calls every hook in the order of its list. Calls marked collective come at the same point on every rank, so a hook
may communicate there.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
from safetensors.torch import save_file

from pkd_dist.errors import Preempted
from pkd_dist.evaluation.metrics import agreement, divergence, score
from pkd_dist.evaluation.scoring import evaluating, predict_logits
from pkd_dist.evaluation.thresholds import choose, shifted
from pkd_dist.files import make_folder, sha256, write_atomically
from pkd_dist.metric_names import AGREEMENT, DIVERGENCE, MAIN_METRIC
from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.metrics import RunMetrics, Step
from pkd_dist.telemetry.progress import Bar, timed
from pkd_dist.telemetry.records import Records
from pkd_dist.telemetry.trackers import Tracking
from pkd_dist.training import checkpoint
from pkd_dist.training.job import Job
from pkd_dist.training.step import StepResult

if TYPE_CHECKING:
    from pkd_dist.training.trainer import Trainer


class Hook:
    """Override what is needed."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, after a resume; collective."""

    def on_result(self, trainer: Trainer, result: StepResult) -> None:
        """A step's result is known: at once, or with the next step (see `TrainStep`)."""

    def on_diverged(self, trainer: Trainer, terms: dict[str, float]) -> None:
        """The loss terms of a step that is not finite; the training ends."""

    def after_step(self, trainer: Trainer) -> None:
        """A step has ended and nothing asks to stop; collective."""

    def on_evaluation(self, trainer: Trainer, figures: dict[str, float], seconds: float) -> None:
        """The dev metrics of the newest entry of the history; collective."""

    def before_checkpoint(self, trainer: Trainer) -> None:
        """A checkpoint is about to be saved; collective."""

    def after_checkpoint(self, trainer: Trainer, seconds: float) -> None:
        """A checkpoint is committed; collective."""

    def on_stop(self, trainer: Trainer) -> None:
        """The ranks agreed to stop for a signal; collective."""

    def on_end(self, trainer: Trainer, completed: bool) -> None:
        """The training ended, by itself or by an exception. Not collective."""


class MetricsHook(Hook):
    """Prometheus metrics. Gauges continue from the checkpoint; counters do so by themselves (see `RunMetrics`)."""

    def __init__(self, metrics: RunMetrics):
        self._metrics = metrics
        self._started = (0, 0.0)  # step, clock

    def on_start(self, trainer: Trainer) -> None:
        job, progress = trainer.job, trainer.progress
        self._started = (progress.step, time.monotonic())
        self._metrics.start_training(
            job.name, progress.step, progress.step / trainer.steps_per_epoch, trainer.total_steps
        )
        if progress.history:
            self._metrics.show_scores(job.name, {"dev": progress.history[-1]})

    def on_result(self, trainer: Trainer, result: StepResult) -> None:
        metrics, stage = self._metrics, trainer.job.name
        epoch = result.step / trainer.steps_per_epoch
        metrics.show_step(
            stage,
            Step(result.step, epoch, result.terms, result.learning_rate, result.grad_norm, result.loss_scale),
        )
        metrics.samples.inc(result.examples)
        metrics.tokens.inc(result.tokens)
        metrics.step_seconds.observe(result.seconds["step"])
        metrics.data_wait.inc(result.seconds["data"])
        first, began = self._started
        step_seconds = (time.monotonic() - began) / (result.step - first)
        metrics.expect_end(stage, time.time() + (trainer.total_steps - result.step) * step_seconds)

    def on_diverged(self, trainer: Trainer, terms: dict[str, float]) -> None:
        self._metrics.show_losses(trainer.job.name, terms)

    def on_evaluation(self, trainer: Trainer, figures: dict[str, float], seconds: float) -> None:
        self._metrics.show_scores(trainer.job.name, {"dev": figures})

    def on_end(self, trainer: Trainer, completed: bool) -> None:
        if completed:
            self._metrics.expect_steps(trainer.job.name, trainer.progress.step)
        self._metrics.end_training()

    def before_checkpoint(self, trainer: Trainer) -> None:
        self._metrics.save_counters()

    def after_checkpoint(self, trainer: Trainer, seconds: float) -> None:
        self._metrics.checkpoint_seconds.set(seconds)
        self._metrics.checkpoint_time.set(time.time())


class RecordsHook(Hook):
    """metrics.jsonl and the trackers that copy it; for rank 0."""

    def __init__(self, records: Records, tracking: Tracking):
        self._records, self._tracking = records, tracking

    def on_result(self, trainer: Trainer, result: StepResult) -> None:
        if result.step % trainer.job.settings.log_every_steps:
            return
        self._write(
            {
                "step": result.step,
                "epoch": round(result.step / trainer.steps_per_epoch, 6),
                "loss": result.terms["total"],
                **{f"loss_{name}": value for name, value in result.terms.items() if name != "total"},
                "learning_rate": result.learning_rate,
                "grad_norm": result.grad_norm,
                **({} if result.loss_scale is None else {"loss_scale": result.loss_scale}),
                "samples_per_second": result.samples_per_second,
                "seconds": {part: round(value, 6) for part, value in result.seconds.items()},
            }
        )

    def on_evaluation(self, trainer: Trainer, figures: dict[str, float], seconds: float) -> None:
        place = {"step": trainer.progress.step, "epoch": trainer.progress.evaluated_epochs, "split": "dev"}
        self._write({**place, **figures, "seconds": {"evaluation": round(seconds, 6)}})

    def _write(self, line: dict[str, object]) -> None:
        line["time"] = time.time()
        self._tracking.write(line, self._records.write(line))

    def before_checkpoint(self, trainer: Trainer) -> None:
        self._tracking.flush()
        self._records.sync()

    def on_end(self, trainer: Trainer, completed: bool) -> None:
        self._tracking.close(completed)
        self._records.close()


class BarHook(Hook):
    """The progress bar."""

    def __init__(self, bar: Bar):
        self._bar = bar

    def on_start(self, trainer: Trainer) -> None:
        self._bar.__enter__()

    def on_result(self, trainer: Trainer, result: StepResult) -> None:
        terms = result.terms
        parts = " ".join(f"{name} {value:.4g}" for name, value in terms.items() if name != "total")
        self._bar.advance(1, f"loss {terms['total']:.4f} ({parts}) {result.samples_per_second:.0f} samples/s")

    def on_end(self, trainer: Trainer, completed: bool) -> None:
        if completed:
            self._bar.finish()
        self._bar.__exit__(None, None, None)


class EvaluationHook(Hook):
    """Scores dev every `evaluate.every_epochs` epochs and after the last, and keeps the best weights so far."""

    def on_start(self, trainer: Trainer) -> None:
        if self._due(trainer):  # the run was stopped in this evaluation
            trainer.after_step()

    def after_step(self, trainer: Trainer) -> None:
        if self._due(trainer):
            self._evaluate(trainer)

    @staticmethod
    def _due(trainer: Trainer) -> bool:
        job, progress = trainer.job, trainer.progress
        epoch, steps = divmod(progress.step, trainer.steps_per_epoch)
        wanted = epoch % job.evaluate.every_epochs == 0 or epoch == job.settings.epochs
        return steps == 0 and wanted and progress.evaluated_epochs < epoch

    def _evaluate(self, trainer: Trainer) -> None:
        job, progress = trainer.job, trainer.progress
        epoch = progress.step // trainer.steps_per_epoch
        began = time.perf_counter()
        figures = evaluate(trainer)
        progress.history.append({"epoch": epoch, "step": progress.step, **figures})
        progress.evaluated_epochs = epoch
        better = progress.improves(figures, job.evaluate.best_by)
        if better:
            progress.best_step, progress.best_epoch = progress.step, epoch
            progress.best_metric, progress.best_divergence = figures[MAIN_METRIC], figures.get(DIVERGENCE)
            self._keep_weights(trainer)
        for hook in trainer.hooks:
            hook.on_evaluation(trainer, figures, time.perf_counter() - began)
        log.info(
            "%s: epoch %d of %d: dev %s %.4f%s%s", job.name, epoch, job.settings.epochs, job.task.main_metric,
            figures[MAIN_METRIC], f", {DIVERGENCE} {figures[DIVERGENCE]:.4g}" if DIVERGENCE in figures else "",
            " (best so far, kept)" if better else "",
        )  # fmt: skip

    @staticmethod
    def _keep_weights(trainer: Trainer) -> None:
        """Write the weights as the plain model has them; collective."""
        job, progress, engine = trainer.job, trainer.progress, trainer.engine
        weights = job.module.with_full_vocabulary(engine.full_weights(), engine.schedule.decay(progress.step))
        path = job.folder / checkpoint.best_name(progress.step)

        def write() -> str:
            make_folder(job.folder)
            write_atomically(path, lambda tmp: save_file(weights, tmp), sum(w.nbytes for w in weights.values()))
            checkpoint.retain_best(job.folder, path.name)
            return sha256(path)

        progress.best_file, progress.best_sha256 = path.name, trainer.world.on_main(write)


class CheckpointHook(Hook):
    """Saves every `checkpoint.every_steps` steps, after evaluations, and on a stop signal.

    A checkpoint sooner than `checkpoint.min_seconds` after the one before is skipped, except the last one, a stop's, and the
    one from which a training with more epochs continues.
    """

    def __init__(self) -> None:
        self._saved = time.monotonic()

    def after_step(self, trainer: Trainer) -> None:
        job, progress = trainer.job, trainer.progress
        evaluated = bool(progress.history) and progress.history[-1]["step"] == progress.step
        wanted = evaluated or progress.step % job.checkpoint.every_steps == 0
        required = trainer.ended or progress.step == trainer.engine.schedule.branch_step
        if required or (wanted and self._enough_to_lose(trainer)):
            self._save(trainer)

    def on_stop(self, trainer: Trainer) -> None:
        self._save(trainer)

    def _enough_to_lose(self, trainer: Trainer) -> bool:
        """Return whether the last checkpoint is old enough; collective, because clocks differ."""
        return trainer.world.broadcast(time.monotonic() - self._saved >= trainer.job.checkpoint.min_seconds)

    def _save(self, trainer: Trainer) -> None:
        job, engine, progress = trainer.job, trainer.engine, trainer.progress
        trainer.flush()
        trainer.world.at(f"{job.name}, checkpoint of step {progress.step}", loop=False)
        for hook in trainer.hooks:
            hook.before_checkpoint(trainer)
        with timed() as seconds:
            checkpoint.save(
                trainer.world, job.folder, progress.step, engine.state.slices(), _state(trainer), job.checkpoint.keep,
                engine.schedule.branch_step,
            )  # fmt: skip
        for hook in trainer.hooks:
            hook.after_checkpoint(trainer, seconds[0])
        self._saved = time.monotonic()
        log.debug("%s: checkpoint at step %d in %.1f s", job.name, progress.step, seconds[0])


def evaluate(trainer: Trainer) -> dict[str, float]:
    """Return the figures on dev of the weights as they are; collective.

    Raises:
        Preempted: A rank received a stop signal. A checkpoint is committed.
    """
    trainer.flush()
    job, progress = trainer.job, trainer.progress
    trainer.world.at(f"{job.name}, evaluation after step {progress.step}")
    # 16-bit numbers have ties that change the ranks of predictions: no autocast where ranks count.
    forward = trainer.engine if job.task.has_single_classes else job.module
    try:
        with evaluating(job.module):
            logits_NC = predict_logits(
                lambda inputs: forward(inputs)[0], job.dev, trainer.world, job.evaluate.batch_size, job.pad_id
            )
    except Preempted as stop:
        trainer.stop(stop.signal)
    return trainer.world.on_main(lambda: _figures(job, logits_NC))


def _state(trainer: Trainer) -> checkpoint.TrainingState:
    progress = trainer.progress
    return {
        "fingerprint": trainer.job.fingerprint,
        "best_file": progress.best_file,
        "best_sha256": progress.best_sha256,
        "progress": vars(progress),
        "counters": trainer.engine.state.counters(),
        "decay": trainer.engine.schedule.decay(progress.step),
        "total_steps": trainer.total_steps,
    }


def _figures(job: Job, logits_NC: np.ndarray) -> dict[str, float]:
    """Return the metrics on dev and, if the loss has a teacher, how far the student is from it.

    Where a text can have several classes, they are those above thresholds that are chosen for these logits.
    """
    labels_N, teacher_NC, multilabel = np.asarray(job.dev.labels_N), job.teacher_dev_NC, job.task.multilabel

    def decided(of_NC: np.ndarray) -> np.ndarray:
        return shifted(of_NC, choose(of_NC, labels_N)) if multilabel else of_NC

    figures = score(decided(logits_NC), labels_N, job.task)
    if teacher_NC is None:
        return figures
    agreed = agreement(decided(teacher_NC), decided(logits_NC), multilabel)
    return figures | {AGREEMENT: agreed, DIVERGENCE: divergence(teacher_NC, logits_NC, multilabel)}
