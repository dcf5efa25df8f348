"""The stage `teacher`: fine-tunes `teacher.model` into RUN/teacher, or takes it as it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pkd_dist.errors import UserError
from pkd_dist.model import digests, encoder
from pkd_dist.stages.base import Artifacts, Inputs, Stage, absent
from pkd_dist.stages.context import Context
from pkd_dist.stages.data import (
    DataOutput,
    open_class_weights,
    open_tokens,
    open_training_tokens,
    positive_input,
    scale_input,
    scored_task,
    used_vocabulary,
)
from pkd_dist.stages.progress import EpochScores, republish_training
from pkd_dist.telemetry import trackers
from pkd_dist.training import checkpoint
from pkd_dist.training.finetune import TeacherJob, finetune


@dataclass(frozen=True)
class TeacherOutput:
    """The teacher of this run.

    Attributes:
        weights: digest of the teacher.
        folder: folder or hub name it loads from.
        best_epoch, history: of its fine-tuning; None and empty where it was given.
    """

    weights: str
    folder: str
    best_epoch: int | None = None
    history: tuple[EpochScores, ...] = ()


VERSION = 1


def inputs(context: Context) -> Inputs:
    run, data = context.resolved, context.output(DataOutput)
    found: Inputs = {
        "teacher.model.weights": digests.weights_digest(run.source),
        "data.class_names": list(data.class_names),
    }
    if settings := run.config.teacher.finetune:
        found |= {f"teacher.finetune.{key}": value for key, value in settings.model_dump().items()}
        found |= run.training_inputs() | positive_input(context) | scale_input(context)
        found |= {f"data.{split}": data.sets[split].digest for split in ("train", "dev")}
    return found


def run(context: Context) -> TeacherOutput:
    run, paths, world = context.resolved, context.resolved.paths, context.world
    if not run.finetunes:
        world.on_main(lambda: encoder.load_model(run.source) and None)  # rejects a folder that cannot be loaded
        return TeacherOutput(digests.weights_digest(run.source), run.source)
    if not world.on_main(paths.teacher.exists):
        _finetune(context)
    return world.on_main(lambda: _finished(context))


def _finetune(context: Context) -> None:
    run = context.resolved
    job = TeacherJob(
        config=run.config,
        base=run.source,
        tokenizer=run.tokenizer,
        labels=context.output(DataOutput).model_fields(run.task),
        task=scored_task(context),
        train=open_training_tokens(context, "train"),
        dev=open_tokens(context, "dev"),
        class_weights_C=open_class_weights(context),
        scale=context.output(DataOutput).scale,
        used_V=used_vocabulary(context, "train", "dev"),
        deepspeed=run.deepspeed,
        output=run.paths.teacher,
        fingerprint=context.fingerprint,
    )
    finetune(job, context.world, context.telemetry)


def _finished(context: Context) -> TeacherOutput:
    paths = context.resolved.paths
    committed = checkpoint.committed(paths.teacher_checkpoints)
    intact = committed and checkpoint.damage(committed[-1])[0] is None  # an earlier start may have written the teacher
    progress = checkpoint.read_state(committed[-1])["progress"] if intact else {}
    return TeacherOutput(
        digests.weights_digest(str(paths.teacher)),
        str(paths.teacher),
        progress.get("best_epoch"),
        tuple(progress.get("history", ())),
    )


def missing(context: Context, output: TeacherOutput) -> str | None:
    folder = context.resolved.paths.teacher
    if not context.resolved.finetunes:
        return None
    if gone := absent(folder):
        return gone
    try:
        weights = digests.weights_digest(str(folder))
    except UserError as unreadable:
        return unreadable.message
    if weights != output.weights:
        raise _another(folder)
    return None


def _another(folder: Path) -> UserError:
    return UserError(
        f"{folder}: is not the teacher that this run made and cached; put that one back, remove the folder to fine-tune "
        "the teacher again, or use --fresh"
    )


def require_replaceable(context: Context, path: Path) -> None:
    """Refuse weights that may be those of another teacher; a file that a disk lost or emptied is made again."""
    is_weights = path.suffix in encoder.WEIGHT_SUFFIXES
    if is_weights and path.is_file() and path.stat().st_size:
        raise _another(context.resolved.paths.teacher)


def artifacts(context: Context) -> Artifacts:
    paths = context.resolved.paths
    if not context.resolved.finetunes:
        return Artifacts()
    tracked, records = trackers.folders(paths.run, "teacher_"), paths.teacher_records
    kept = (paths.teacher, paths.teacher_checkpoints, records, *tracked)
    return Artifacts(kept, temporary=(paths.teacher_checkpoints,), unverified=tuple(tracked), records=(records,))


def republish(context: Context, output: TeacherOutput) -> None:
    paths = context.resolved.paths
    republish_training(context, "teacher", paths.teacher_records, paths.teacher_checkpoints, output.history)


STAGE = Stage(
    "teacher", VERSION, TeacherOutput, inputs, run, missing, artifacts,
    require_replaceable=require_replaceable, republish=republish,
)  # fmt: skip


# ------------------------------------------------------------------------------------------- for the stages after it


def teacher_folder(context: Context) -> str:
    """Return where the teacher loads from; a run folder may have been moved since the marker was written."""
    run = context.resolved
    return str(run.paths.teacher) if run.finetunes else run.source
