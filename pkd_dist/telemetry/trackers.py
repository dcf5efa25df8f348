"""The lines of metrics.jsonl in other programs' formats: TensorBoard event files, Weights & Biases.

    RUN/tensorboard, RUN/teacher_tensorboard    `tensorboard --logdir RUN`
    RUN/wandb, RUN/teacher_wandb                `wandb sync RUN/wandb/wandb/offline-run-*`; `id` names the run for ever

A resumed run does again the steps since its checkpoint. TensorBoard is told to forget them. Weights & Biases cannot, and
loses what it has not written yet when it is killed: it gets the lines that it lacks from metrics.jsonl, and then the new.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pkd_dist.config.schema import Trackers as Settings
from pkd_dist.errors import UserError
from pkd_dist.files import remove, write_atomically
from pkd_dist.telemetry import records
from pkd_dist.telemetry.log import log


def require(settings: Settings) -> None:
    """Raises UserError where a tracker's library is not installed."""
    for key, wanted in (("tensorboard", settings.tensorboard), ("wandb", settings.wandb)):
        if wanted and getattr(importlib.util.find_spec(key), "origin", None) is None:  # a folder of that name is none
            raise UserError(
                f"trackers.{key}: the package {key} is not installed; install the extra: pip install -e '.[{key}]'"
            )


def scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The names and values under which a line of metrics.jsonl is shown: `train/loss`, `train/seconds/step`,
    `dev/accuracy`."""
    place = record.get("split", "train")
    for key, value in record.items():
        if key == "seconds":
            yield from ((f"{place}/seconds/{part}", took) for part, took in value.items())
        elif key not in ("step", "split", "time"):
            yield f"{place}/{key}", value


class Tracker(Protocol):
    name: str

    def write(self, record: dict[str, Any], new: bool) -> None: ...

    def flush(self) -> None: ...

    def close(self, done: bool) -> None: ...


class TensorBoard:
    """Event files.

    Args:
        lines: a metrics file.
        step: the last one that is not done again.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, lines: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        asked_late = not any(folder.glob("events.*"))
        self._writer: Any = SummaryWriter(str(folder), purge_step=step + 1)
        for record in records.read(lines) if asked_late else ():
            if record["step"] <= step:
                self.write(record, True)

    def write(self, record: dict[str, Any], new: bool) -> None:
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record["step"], walltime=record["time"])

    def flush(self) -> None:
        self._writer.flush()

    def close(self, done: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run that keeps its identity across resumes. Offline, its newest folder holds all of it, and is the only one.

    Args:
        lines: a metrics file.

    Raises:
        UserError: it cannot be begun, such as `online` without a key.
    """

    name = "Weights & Biases"

    def __init__(self, folder: Path, lines: Path, settings: Settings, title: str, about: dict[str, Any]):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read on import
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        identity = folder / "id"
        if not identity.exists():
            write_atomically(identity, lambda tmp: tmp.write_text(secrets.token_hex(8)))
        if settings.wandb == "offline":
            remove(folder / "wandb")
        quiet = wandb.Settings(console="off", silent=True)
        try:
            self._run = wandb.init(
                dir=folder, mode=settings.wandb, project=settings.wandb_project, id=identity.read_text(), name=title,
                config=about, resume="allow", settings=quiet,
            )  # fmt: skip
        except (wandb.Error, OSError) as error:
            why = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"trackers.wandb: {settings.wandb}: {why[0]}; `offline` needs neither key nor network"
            ) from None
        for record in records.read(lines):
            if record["step"] >= self._run.step:
                self.write(record, True)

    def write(self, record: dict[str, Any], new: bool) -> None:
        if new:
            self._run.log(dict(scalars(record)), step=record["step"])

    def flush(self) -> None:
        """What is logged is with another process already."""

    def close(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


class Tracking:
    """The trackers of one training. One that fails is left out from then on: it must not end a run."""

    def __init__(self, trackers: list[Tracker]):
        self._trackers = trackers

    def _each(self, what: str, *arguments: Any) -> None:
        for tracker in list(self._trackers):
            try:
                getattr(tracker, what)(*arguments)
            except Exception as error:
                self._trackers.remove(tracker)
                log.warning("%s: goes on without it (%s: %s)", tracker.name, type(error).__name__, error)
                log.debug("a tracker failed", exc_info=error)

    def write(self, record: dict[str, Any], new: bool) -> None:
        """A line of metrics.jsonl; `new`: it was not in it yet."""
        self._each("write", record, new)

    def flush(self) -> None:
        """Before a checkpoint counts: what came before it is not written again."""
        self._each("flush")

    def close(self, done: bool) -> None:
        self._each("close", done)


def folders(run: Path, prefix: str = "") -> tuple[Path, Path]:
    return run / f"{prefix}tensorboard", run / f"{prefix}wandb"


@dataclass(frozen=True)
class Trackers:
    """What a run is also shown with.

    Attributes:
        run: its folder.
        about: its settings.
    """

    run: Path = Path()
    settings: Settings = field(default_factory=Settings)
    about: dict[str, Any] = field(default_factory=dict)

    def open(self, job: str, lines: Path, step: int) -> Tracking:
        """For a training, `teacher` or `distill`, that has a metrics file and stands at a step.

        Raises:
            UserError: see `WeightsAndBiases`.
        """
        events, wandb = folders(self.run, "teacher_" if job == "teacher" else "")
        trackers: list[Tracker] = []
        if self.settings.tensorboard:
            trackers.append(TensorBoard(events, lines, step))
            log.info("%s: tensorboard --logdir %s", job, self.run)
        if self.settings.wandb:
            trackers.append(WeightsAndBiases(wandb, lines, self.settings, f"{self.run.name}, {job}", self.about))
            log.info("%s: %s Weights & Biases run in %s", job, self.settings.wandb, wandb)
        return Tracking(trackers)
