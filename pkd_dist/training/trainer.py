"""The one training loop: step, log, checkpoint, evaluate, keep the best. Teachers and students both go through it.

A step's loss is a weighted sum over the global batch, so the same run on any number of ranks does the same optimisation.
Position is one number, the optimizer step; the batch follows from (seed, epoch, step, rank), see `data/batches.py`.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors.torch import save_file

from pkd_dist.config.schema import Checkpoint as CheckpointConfig
from pkd_dist.data.batches import Batch, TrainingBatches, collate, micro_batches
from pkd_dist.data.on_device import PendingBatch, open_device_tokens
from pkd_dist.data.tasks import Task
from pkd_dist.data.tokens import TokenSet
from pkd_dist.distributed.world import World
from pkd_dist.errors import DivergedError, Preempted
from pkd_dist.evaluation.metrics import score
from pkd_dist.evaluation.scoring import evaluating, predict
from pkd_dist.files import sha256, write_atomically
from pkd_dist.model.encoder import Encoder
from pkd_dist.telemetry import Telemetry
from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.progress import Bar, timed
from pkd_dist.telemetry.records import Records
from pkd_dist.telemetry.trackers import Tracking
from pkd_dist.training import checkpoint
from pkd_dist.training.checkpoint import Shards
from pkd_dist.training.clock import PARTS, StepClock
from pkd_dist.training.engine import Engine, Optimization, resolve_precision
from pkd_dist.training.graph_step import Values

TERMS = ("total", "ce", "ds", "pt")
LossTerms = Callable[[Any, Batch], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Job:
    """All that one training needs.

    Attributes:
        name: what it is called in messages.
        module: trained in place.
        losses: (engine or module, batch) -> per-example terms (B,), among `TERMS`, `total` always. Of tensors alone: it may
            be captured and replayed.
        answers: adds to a batch what the teacher says to it; None: the losses need nothing of it.
        train, dev: token sets.
        deepspeed: the DeepSpeed JSON.
        folder: where checkpoints live.
        records: the metrics file.
        fingerprint: of everything that decides the outcome; a checkpoint of another one is refused.
    """

    name: str
    module: Encoder
    losses: LossTerms
    train: TokenSet
    dev: TokenSet
    task: Task
    pad_id: int
    seed: int
    epochs: int
    batch_size: int
    micro_batch_size: int | str
    learning_rate: float
    weight_decay: float
    warmup_ratio: float
    max_grad_norm: float
    adam_epsilon: float
    eval_batch_size: int
    eval_every_epochs: int
    log_every_steps: int
    checkpoint: CheckpointConfig
    deepspeed: dict[str, Any]
    folder: Path
    records: Path
    fingerprint: str
    teacher_outputs: Callable[[Batch], Batch] | None = None


@dataclass(frozen=True)
class Launched:
    """A step that the device may still be doing: what the host knows of it."""

    values: Values
    step: int
    learning_rate: float
    examples: int
    tokens: int
    data_seconds: float
    answers_seconds: float


@dataclass
class Progress:
    """What a checkpoint remembers beside weights; the same on all ranks."""

    step: int = 0
    evaluated_epochs: int = 0
    samples: int = 0
    tokens: int = 0
    best_step: int = 0
    best_epoch: int = 0
    best_metric: float = float("-inf")
    best_file: str | None = None
    best_sha256: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Runs one `Job` to its end, from wherever its newest checkpoint stands."""

    def __init__(self, job: Job, world: World, telemetry: Telemetry):
        self.job, self.world, self.telemetry = job, world, telemetry
        self.batches = TrainingBatches(
            job.train, job.batch_size, job.micro_batch_size, job.seed, world.rank, world.size, job.pad_id
        )
        self.total_steps = job.epochs * self.batches.steps
        size, count = micro_batches(job.batch_size, world.size, job.micro_batch_size)
        deepspeed, self.precision = resolve_precision(job.deepspeed, world.device)
        plan = Optimization(
            job.learning_rate, job.weight_decay, job.warmup_ratio, job.max_grad_norm, job.adam_epsilon, self.total_steps,
            job.batch_size, size, count,
        )  # fmt: skip
        self.engine = Engine(job.module, deepspeed, plan, world)
        self.progress = Progress()
        self._resume()
        self._whole = self.engine.graph_step(job.losses, TERMS)
        self._resident = (
            open_device_tokens(job.train, job.teacher_outputs, job.pad_id, world.device) if self._whole else None
        )
        self._launched: Launched | None = None
        self._landed, self._saved = 0.0, time.monotonic()
        self.records = Records(job.records) if world.main else None
        self.tracking = Tracking([])
        world.on_main(self._track)

    def _track(self) -> None:
        self.tracking = self.telemetry.trackers.open(self.job.name, self.job.records, self.progress.step)

    def _resume(self) -> None:
        found = checkpoint.find(self.world, self.job.folder, self.job.fingerprint, log.info)
        if found is None:
            return
        path, state = found
        self.engine.state.restore(Shards(path), state["counters"])
        self.progress = Progress(**state["progress"])
        self.telemetry.metrics.checkpoint_time.set((path / checkpoint.COMMIT).stat().st_mtime)
        if self.progress.step < self.total_steps:
            log.info(
                "%s: going on from step %d of %d (%s)", self.job.name, self.progress.step, self.total_steps, path.name
            )

    def run(self) -> Progress:
        """Trains to the end.

        Raises:
            DivergedError: a loss or gradient is not finite; nothing of the bad step is saved.
            Preempted: a stop signal came; a checkpoint is committed.
        """
        try:
            self._run()
        except BaseException:
            self.tracking.close(False)
            raise
        self.tracking.close(True)
        if self.records:
            self.records.close()
        return self.progress

    def _run(self) -> None:
        job, progress = self.job, self.progress
        self._show_position()
        epochs_shown = f"{job.epochs} epoch{'s' if job.epochs > 1 else ''}"
        bar = Bar(f"{job.name}, {epochs_shown}", self.total_steps, progress.step, self.telemetry.show)
        with bar:
            while progress.step < self.total_steps or self._due():
                if self._due():
                    self._evaluate(progress.step // self.batches.steps)
                    if progress.step == self.total_steps or self._enough_to_lose():
                        self._save()
                    continue
                epoch, step_in_epoch = divmod(progress.step, self.batches.steps)
                order = self.batches.order(epoch)
                self.engine.train()
                for step in range(step_in_epoch, self.batches.steps):
                    note, stop = self._step(order, step)
                    bar.advance(1, note)
                    if stop:
                        self._preempted(stop)
                    passed = progress.step % job.checkpoint.every_steps == 0
                    if passed and not self._due() and self._enough_to_lose():
                        self._save()

    def _enough_to_lose(self) -> bool:
        """Whether the last checkpoint is so long ago that another is worth its time; collective."""
        return self.world.broadcast(time.monotonic() - self._saved >= self.job.checkpoint.min_seconds)

    def _due(self) -> bool:
        """Whether an epoch has ended that is to be evaluated, and is not yet."""
        epochs, within = divmod(self.progress.step, self.batches.steps)
        wanted = epochs % self.job.eval_every_epochs == 0 or epochs == self.job.epochs
        return within == 0 and wanted and self.progress.evaluated_epochs < epochs

    def _show_position(self) -> None:
        """Gauges go on where the checkpoint left them. (Counters do so by themselves: see `RunMetrics`.)"""
        metrics, progress = self.telemetry.metrics, self.progress
        metrics.step.set(progress.step)
        metrics.epoch.set(progress.step / self.batches.steps)
        metrics.eval_metric.clear()  # of another training
        if progress.history:
            metrics.show_evaluation("dev", progress.history[-1])

    def _step(self, order: np.ndarray, step: int) -> tuple[str, int]:
        """One optimizer step; returns what to show of it, and the stop signal that any rank has got (0: none)."""
        return self._launch(order, step) if self._whole else self._in_parts(order, step)

    def _in_parts(self, order: np.ndarray, step: int) -> tuple[str, int]:
        """A step through the engine, part by part."""
        clock = StepClock(self.world.device)
        self.world.at(f"{self.job.name}, step {self.progress.step + 1}")
        self._seed()
        micro = self.batches.step(order, step)
        clock.ended("data")
        sums = np.zeros(len(TERMS) + 3)  # terms, tokens, not finite, stop signal
        for i, batch in enumerate(micro):
            batch = self.answered(batch).to(self.world.device)
            terms = self.job.losses(self.engine, batch)
            weighted = {name: (value * batch.weight_B).sum() for name, value in terms.items()}
            clock.ended("forward")
            self.engine.backward(weighted["total"])
            for k, name in enumerate(TERMS):
                if name in weighted:
                    sums[k] += float(weighted[name].detach())
            sums[len(TERMS)] += batch.tokens
            if i + 1 < len(micro):
                self.engine.micro_step()
            clock.ended("backward")
        local = sums[: len(TERMS)].copy()
        sums[-2] = not np.isfinite(local).all()
        sums[-1] = self.world.stop_signal()
        sums = self.world.sum(sums)
        clock.ended("ranks")
        progress = self.progress
        if sums[-2]:
            self._show_loss(sums)
            self._diverged("the loss", progress.step + 1, local, [])
        try:
            norm, learning_rate = self.engine.step(progress.step)
        except DivergedError:
            self._diverged("the gradient", progress.step + 1, local, micro)
        clock.ended("optimizer")
        examples = min(self.job.batch_size, len(self.job.train) - step * self.job.batch_size)
        progress.step += 1
        progress.samples += examples
        progress.tokens += int(sums[len(TERMS)])
        seconds = {"step": time.perf_counter() - clock.start, **clock.seconds}
        note = self._log_step(progress.step, sums, learning_rate, norm, examples, int(sums[len(TERMS)]), seconds)
        stop = max(self.world.gather(self.world.stop_signal())) if sums[-1] else 0
        return note, stop

    def _launch(self, order: np.ndarray, step: int) -> tuple[str, int]:
        """A lone rank's step as one launch; what is shown is the step before, which the device has done by then."""
        assert self._whole is not None
        progress, began = self.progress, time.perf_counter()
        if self._launched is None:
            self._landed = began
        self.world.at(f"{self.job.name}, step {progress.step + 1}")
        ((rows, weight),) = self.batches.rows(order, step)
        batch: Batch | PendingBatch
        if self._resident:
            batch = self._resident.rows(rows, weight)
            made = time.perf_counter()
        else:
            batch = collate(self.job.train, rows, weight, self.job.pad_id)
            made = time.perf_counter()
            batch = self.answered(batch)
        answered = time.perf_counter()
        rate = self.engine.rate(progress.step)
        values = self._whole(batch, rate, self._seed_of_step)
        examples = min(self.job.batch_size, len(self.job.train) - step * self.job.batch_size)
        progress.step += 1
        progress.samples += examples
        progress.tokens += batch.tokens
        note = self._land()
        self._launched = Launched(values, progress.step, rate, examples, batch.tokens, made - began, answered - made)
        return note, self.world.stop_signal()

    def _land(self) -> str:
        """Waits for the step that was launched last, if there is one, and logs it; returns what to show of it."""
        if self._launched is None:
            return ""
        done, self._launched = self._launched, None
        values, on_device = done.values.read()
        terms, norm = values[: len(TERMS)], float(values[-1])
        if not np.isfinite(values).all():  # its update was not done, and what came after it is dropped
            self._show_loss(terms)
            self._diverged("the gradient" if np.isfinite(terms).all() else "the loss", done.step, terms, [])
        before, self._landed = self._landed, time.perf_counter()
        took = self._landed - before
        idle = max(0.0, took - on_device)  # the device goes on while the host makes a batch
        data = min(done.data_seconds, idle)
        parts = {"data": data, "forward": min(done.answers_seconds, idle - data), "device": on_device}
        seconds = {"step": took, **dict.fromkeys(PARTS, 0.0), **parts}
        return self._log_step(done.step, terms, done.learning_rate, norm, done.examples, done.tokens, seconds)

    def answered(self, batch: Batch) -> Batch:
        """A batch with the teacher's answers, where the losses need them."""
        return self.job.teacher_outputs(batch) if self.job.teacher_outputs else batch

    def _show_loss(self, values: Iterable[float]) -> None:
        for name, value in zip(TERMS, values, strict=False):
            self.telemetry.metrics.loss.labels(term=name).set(value)

    def _log_step(
        self,
        step: int,
        terms: np.ndarray,
        learning_rate: float,
        norm: float,
        examples: int,
        tokens: int,
        seconds: dict[str, float],
    ) -> str:
        """Says what step number `step` was to metrics and records; returns it in short. `terms`: first, those of `TERMS`."""
        metrics, losses = self.telemetry.metrics, dict(zip(TERMS, terms.tolist(), strict=False))
        metrics.step.set(step)
        metrics.epoch.set(step / self.batches.steps)
        metrics.samples.inc(examples)
        metrics.tokens.inc(tokens)
        metrics.step_seconds.observe(seconds["step"])
        metrics.data_wait.inc(seconds["data"])
        self._show_loss(losses.values())
        metrics.learning_rate.set(learning_rate)
        metrics.grad_norm.set(norm)
        metrics.loss_scale.set(self.engine.loss_scale)
        pace = examples / seconds["step"]
        if self.records and step % self.job.log_every_steps == 0:
            self._record(
                {
                    "step": step,
                    "epoch": round(step / self.batches.steps, 6),
                    "loss": losses["total"],
                    **{f"loss_{name}": losses[name] for name in TERMS[1:]},
                    "learning_rate": learning_rate,
                    "grad_norm": norm,
                    **({"loss_scale": self.engine.loss_scale} if self.engine.loss_scale_expected else {}),
                    "samples_per_second": pace,
                    "seconds": {part: round(value, 6) for part, value in seconds.items()},
                    "time": time.time(),
                }
            )
        parts = " ".join(f"{name} {losses[name]:.4g}" for name in TERMS[1:] if losses[name])
        return f"loss {losses['total']:.4f} ({parts}) {pace:.0f} samples/s"

    def _record(self, line: dict[str, Any]) -> None:
        if self.records:
            self.tracking.write(line, self.records.write(line))

    def _evaluate(self, epoch: int) -> None:
        """Scores dev and keeps the weights where the task's metric is better than ever before."""
        job, progress = self.job, self.progress
        self._land()
        self.world.at(f"{job.name}, evaluation of epoch {epoch}")
        began = time.perf_counter()
        with evaluating(job.module):
            try:
                logits = predict(
                    lambda inputs: self.engine(inputs)[0], job.dev, self.world, job.eval_batch_size, job.pad_id
                )
            except Preempted as stop:
                self._preempted(stop.signal)
        self.engine.train()
        figures = self.world.on_main(lambda: score(logits, np.asarray(job.dev.labels_N), job.task))
        progress.history.append({"epoch": epoch, "step": progress.step, **figures})
        progress.evaluated_epochs = epoch
        better = figures["main_metric"] > progress.best_metric
        if better:
            progress.best_step, progress.best_epoch, progress.best_metric = progress.step, epoch, figures["main_metric"]
            progress.best_file = checkpoint.best_name(progress.step)
            weights = job.module.whole(self.engine.full_weights(), self.engine.decay(progress.step))
            path = job.folder / progress.best_file

            def keep() -> str:
                job.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(path, lambda tmp: save_file(weights, tmp), sum(w.nbytes for w in weights.values()))
                checkpoint.retain_best(job.folder, path.name)
                return sha256(path)

            progress.best_sha256 = self.world.on_main(keep)
        self.telemetry.metrics.show_evaluation("dev", figures)
        if self.records:
            took = {"evaluation": round(time.perf_counter() - began, 6)}
            line = {"step": progress.step, "epoch": epoch, "split": "dev", **figures, "seconds": took}
            self._record({**line, "time": time.time()})
        log.info(
            "%s: epoch %d of %d: dev %s %.4f%s", job.name, epoch, job.epochs, job.task.main_metric, figures["main_metric"],
            " (best so far, kept)" if better else "",
        )  # fmt: skip

    def _save(self) -> None:
        job, progress = self.job, self.progress
        self._land()
        self.world.at(f"{job.name}, checkpoint of step {progress.step}", loop=False)
        state = {
            "fingerprint": job.fingerprint,
            "best_file": progress.best_file,
            "best_sha256": progress.best_sha256,
            "progress": vars(progress),
            "counters": self.engine.state.counters(),
            "decay": self.engine.decay(progress.step),
        }
        self.tracking.flush()
        self.telemetry.metrics.note()
        with timed() as seconds:
            checkpoint.save(
                self.world, job.folder, progress.step, self.engine.state.slices(), state, job.checkpoint.keep
            )
        self.telemetry.metrics.checkpoint_seconds.set(seconds[0])
        self.telemetry.metrics.checkpoint_time.set(time.time())
        self._saved = time.monotonic()
        log.debug("%s: checkpoint at step %d in %.1f s", job.name, progress.step, seconds[0])

    def _diverged(self, what: str, step: int, local: np.ndarray, micro: list[Batch]) -> NoReturn:
        """Ends the run on every rank; names the rank and the terms. `micro`: where a gradient is to be looked at again."""
        finite = np.isfinite(local).all() and self._gradient_is_finite(micro)
        every = self.world.gather((bool(finite), dict(zip(TERMS, local.tolist(), strict=False))))
        bad = next((rank for rank, (good, _) in enumerate(every) if not good), 0)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in every[bad][1].items())
        raise DivergedError(
            f"{self.job.name}: {what} is not finite at step {step} (rank {bad}: {shown}); nothing of this step is saved; "
            f"lower the learning rate, or look at the data of this step"
        )

    def _gradient_is_finite(self, micro: list[Batch]) -> bool:
        """Does the backward passes again, and looks at this rank's own gradients before they are averaged; collective."""
        good: list[torch.Tensor] = []
        for parameter in self.job.module.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: good.append(torch.isfinite(gradient).all()))
        self._seed()
        for i, batch in enumerate(micro):
            terms = self.job.losses(self.engine, self.answered(batch).to(self.world.device))
            self.engine.backward((terms["total"] * batch.weight_B.to(terms["total"].device)).sum())
            if i + 1 < len(micro):
                self.engine.micro_step()
        return all(bool(flag) for flag in good)

    def _preempted(self, number: int) -> NoReturn:
        self._save()
        raise Preempted(
            f"{self.job.name}: stopped by {signal.Signals(number).name}; a checkpoint of step {self.progress.step} is committed "
            f"in {self.job.folder}; the same command goes on from it",
            number,
        )

    @property
    def _seed_of_step(self) -> int:
        """What is drawn in a step depends on nothing else, so a resume needs no random state."""
        words = [self.job.seed, self.progress.step, self.world.rank]
        return int(np.random.SeedSequence(words).generate_state(1)[0])

    def _seed(self) -> None:
        if self.world.device.type == "cpu":
            torch.default_generator.manual_seed(self._seed_of_step)  # without a note to accelerators that are not there
        else:
            torch.manual_seed(self._seed_of_step)
