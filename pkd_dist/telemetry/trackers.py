"""Trackers: the records of metrics.jsonl as TensorBoard event files and Weights & Biases runs.

    RUN/tensorboard, RUN/teacher_tensorboard    `tensorboard --logdir RUN`
    RUN/wandb, RUN/teacher_wandb                `wandb sync RUN/wandb/wandb/offline-run-*`; file `id`: the id of the W&B run

A resumed run repeats the steps since its checkpoint. TensorBoard purges them. Weights & Biases cannot, and a kill loses what it
has not written yet: on resume it first gets the records it lacks from metrics.jsonl, then only new ones.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pkd_dist.config.schema import Trackers as Settings
from pkd_dist.errors import UserError
from pkd_dist.files import remove, write_atomically
from pkd_dist.telemetry import records
from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.records import Record


def require(settings: Settings) -> None:
    """Raise UserError if the library of a selected tracker is not installed."""
    for package, selected in (("tensorboard", settings.tensorboard), ("wandb", settings.wandb)):
        # A folder of that name is found as a namespace package, without an origin.
        if selected and getattr(importlib.util.find_spec(package), "origin", None) is None:
            raise UserError(
                f"trackers.{package}: the package {package} is not installed; install the extra: "
                f"pip install 'pkd_dist[{package}]'"
            )


def scalars(record: Record) -> Iterator[tuple[str, float]]:
    """Yield the names and values that trackers show for a record: `train/loss`, `train/seconds/step`, `dev/accuracy`."""
    prefix = record.get("split", "train")
    for key, value in record.items():
        if key == "seconds":
            yield from ((f"{prefix}/seconds/{part}", seconds) for part, seconds in value.items())
        elif key not in ("step", "split", "time"):
            yield f"{prefix}/{key}", value


class Tracker(Protocol):
    name: str

    def write(self, record: Record, new: bool) -> None: ...

    def flush(self) -> None: ...

    def close(self, done: bool) -> None: ...


class TensorBoard:
    """Event files in a folder.

    Args:
        folder: for the event files.
        metrics_file: metrics.jsonl of the training, which provides the past steps if the tracker was enabled later.
        step: last step that is not repeated; later ones are purged.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, metrics_file: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        enabled_later = not any(folder.glob("events.*"))
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        for record in records.read(metrics_file) if enabled_later else ():
            if record["step"] <= step:
                self.write(record, True)

    def write(self, record: Record, new: bool) -> None:
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["step"], walltime=record["time"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self, done: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run that keeps its id across resumes. Offline, it is one folder that holds all records.

    Args:
        folder: for its files.
        metrics_file: metrics.jsonl of the training.
        name: of the run.
        config: settings to show.

    Raises:
        UserError: the run cannot be started, for example `online` without an API key.
    """

    name = "Weights & Biases"

    def __init__(self, folder: Path, metrics_file: Path, settings: Settings, name: str, config: Mapping[str, object]):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read on import
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "id"
        if not id_file.exists():
            write_atomically(id_file, lambda tmp: tmp.write_text(secrets.token_hex(8)))
        if settings.wandb == "offline":
            remove(folder / "wandb")
        quiet = wandb.Settings(console="off", silent=True)
        try:
            self._run = wandb.init(
                dir=folder, mode=settings.wandb, project=settings.wandb_project, id=id_file.read_text(), name=name,
                config=dict(config), resume="allow", settings=quiet,
            )  # fmt: skip
        except (wandb.Error, OSError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"trackers.wandb: {settings.wandb}: {reason[0]}; `offline` needs neither key nor network"
            ) from None
        for record in records.read(metrics_file):
            if record["step"] >= self._run.step:
                self.write(record, True)

    def write(self, record: Record, new: bool) -> None:
        if new:
            self._run.log(dict(scalars(record)), step=record["step"])

    def flush(self) -> None:
        """Do nothing: logged values are already in another process."""

    def close(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


class Tracking:
    """The trackers of one training. A tracker that fails is dropped with a warning; it must not end a run."""

    def __init__(self, trackers: list[Tracker]):
        self._trackers = trackers

    def _call_each(self, method: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                method(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                log.warning(
                    "%s failed and is disabled for the rest of the run (%s: %s)",
                    tracker.name, type(error).__name__, error,
                )  # fmt: skip
                log.debug("a tracker failed", exc_info=error)

    def write(self, record: Record, new: bool) -> None:
        """Write a record; `new`: whether metrics.jsonl did not have it yet."""
        self._call_each(lambda tracker: tracker.write(record, new))

    def flush(self) -> None:
        """Write out all records. Call before a checkpoint is committed: earlier records are not written again."""
        self._call_each(lambda tracker: tracker.flush())

    def close(self, done: bool) -> None:
        self._call_each(lambda tracker: tracker.close(done))


def folders(run: Path, prefix: str = "") -> tuple[Path, Path]:
    return run / f"{prefix}tensorboard", run / f"{prefix}wandb"


@dataclass(frozen=True)
class Trackers:
    """The trackers that a run has selected.

    Attributes:
        run: run folder.
        settings: section `trackers` of the configuration.
        config: whole configuration, shown by Weights & Biases.
    """

    run: Path = Path()
    settings: Settings = field(default_factory=Settings)
    config: Mapping[str, object] = field(default_factory=dict)

    def open(self, job: str, metrics_file: Path, step: int) -> Tracking:
        """Open the trackers of a training.

        Args:
            job: `teacher`, `teacher-2`, ... or `distill`.
            metrics_file: metrics.jsonl of the training.
            step: step from which it resumes; 0 at the start.

        Raises:
            UserError: see `WeightsAndBiases`.
        """
        tensorboard, wandb = folders(self.run, "" if job == "distill" else f"{job}_")
        trackers: list[Tracker] = []
        if self.settings.tensorboard:
            trackers.append(TensorBoard(tensorboard, metrics_file, step))
            log.info("%s: tensorboard --logdir %s", job, self.run)
        if self.settings.wandb:
            trackers.append(
                WeightsAndBiases(wandb, metrics_file, self.settings, f"{self.run.name}, {job}", self.config)
            )
            log.info("%s: %s Weights & Biases run in %s", job, self.settings.wandb, wandb)
        return Tracking(trackers)
