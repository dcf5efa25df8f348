"""The stage `teacher`: fine-tunes `teacher.model` into RUN/teacher, or takes it as it is.

Several teachers (`teacher.model: [A, B]`, or `teacher.finetune.seeds`) are fine-tuned one after the other, into RUN/teacher,
RUN/teacher-2, ...; those that are finished are kept when the stage resumes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pkd_dist.errors import UserError
from pkd_dist.files import digest_of
from pkd_dist.model import digests, encoder
from pkd_dist.stages.base import Artifacts, Inputs, Stage, absent
from pkd_dist.stages.context import Context, Teacher
from pkd_dist.stages.data import (
    DataOutput,
    open_class_weights,
    open_tokens,
    positive_input,
    scale_input,
    scored_task,
    teacher_vocabulary,
    with_learned_targets,
)
from pkd_dist.stages.progress import EpochScores, republish_training
from pkd_dist.telemetry import trackers
from pkd_dist.training import checkpoint
from pkd_dist.training.finetune import TeacherJob, finetune


@dataclass(frozen=True)
class TeacherOutput:
    """The teacher of this run, or the first of several.

    Attributes:
        weights: digest of the teacher.
        folder: folder or hub name it loads from.
        best_epoch, history: of its fine-tuning; None and empty where it was given.
        other_weights: digests of the other teachers, in order.
    """

    weights: str
    folder: str
    best_epoch: int | None = None
    history: tuple[EpochScores, ...] = ()
    other_weights: tuple[str, ...] = ()

    @property
    def all_weights(self) -> str:
        """A digest of all teachers."""
        return digest_of([self.weights, *self.other_weights]) if self.other_weights else self.weights


VERSION = 1


def inputs(context: Context) -> Inputs:
    run, data = context.resolved, context.output(DataOutput)
    if data.answers:
        return {"teacher.answers": data.answers}
    models = [digests.weights_digest(source) for source in dict.fromkeys(teacher.source for teacher in run.teachers)]
    found: Inputs = {
        "teacher.model.weights": models[0] if len(models) == 1 else models,
        "data.class_names": list(data.class_names),
    }
    if settings := run.config.teacher.finetune:
        found |= {f"teacher.finetune.{key}": value for key, value in settings.model_dump().items()}
        found |= run.training_inputs() | positive_input(context) | scale_input(context)
        found |= {f"data.{split}": data.sets[split].digest for split in ("train", "dev")}
        if settings.seeds:
            del found["run.seed"]
    return found


def run(context: Context) -> TeacherOutput:
    run, world = context.resolved, context.world
    if run.has_answers:
        return TeacherOutput(str(context.output(DataOutput).answers), "")
    if not run.finetunes:
        return world.on_main(lambda: _given(context))
    for teacher in run.teachers:
        if not world.on_main(teacher.folder.exists):
            _finetune(context, teacher)
    return world.on_main(lambda: _finished(context))


def _given(context: Context) -> TeacherOutput:
    folders = teacher_folders(context)
    for folder in folders:
        encoder.load_model(folder)  # rejects a folder that cannot be loaded
    weights, *others = map(digests.weights_digest, folders)
    return TeacherOutput(weights, folders[0], other_weights=tuple(others))


def _finetune(context: Context, teacher: Teacher) -> None:
    run = context.resolved
    job = TeacherJob(
        config=run.config,
        base=teacher.source,
        seed=teacher.seed,
        tokenizer=run.tokenizer,
        labels=context.output(DataOutput).model_fields(run.task),
        task=scored_task(context),
        train=with_learned_targets(context, open_tokens(context, "train")),
        dev=open_tokens(context, "dev"),
        class_weights_C=open_class_weights(context),
        scale=context.output(DataOutput).scale,
        used_V=teacher_vocabulary(context),
        deepspeed=run.deepspeed,
        output=teacher.folder,
        fingerprint=context.fingerprint,
    )
    finetune(job, context.world, context.telemetry)


def _finished(context: Context) -> TeacherOutput:
    first, *others = context.resolved.teachers
    committed = checkpoint.committed(first.checkpoints)
    intact = committed and checkpoint.damage(committed[-1])[0] is None  # an earlier start may have written the teacher
    progress = checkpoint.read_state(committed[-1])["progress"] if intact else {}
    return TeacherOutput(
        digests.weights_digest(str(first.folder)),
        str(first.folder),
        progress.get("best_epoch"),
        tuple(progress.get("history", ())),
        tuple(digests.weights_digest(str(other.folder)) for other in others),
    )


def missing(context: Context, output: TeacherOutput) -> str | None:
    if not context.resolved.finetunes:
        return None
    expected = (output.weights, *output.other_weights)
    problems = (
        _problem(teacher.folder, weights) for teacher, weights in zip(context.resolved.teachers, expected, strict=True)
    )
    return next(filter(None, problems), None)


def _problem(folder: Path, expected: str) -> str | None:
    if gone := absent(folder):
        return gone
    try:
        weights = digests.weights_digest(str(folder))
    except UserError as unreadable:
        return unreadable.message
    if weights != expected:
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
        raise _another(path.parent)


def artifacts(context: Context) -> Artifacts:
    run, teachers = context.resolved.paths, context.resolved.teachers
    if not context.resolved.finetunes:
        return Artifacts()
    checkpoints, records = tuple(each.checkpoints for each in teachers), tuple(each.records for each in teachers)
    tracked = tuple(path for each in teachers for path in trackers.folders(run.run, f"{each.name}_"))
    kept = (*(each.folder for each in teachers), *checkpoints, *records, *tracked)
    more = tuple(path for path in run.other_teachers if path not in kept)  # of an earlier, larger ensemble
    return Artifacts((*kept, *more), temporary=checkpoints, unverified=(*tracked, *more), records=records)


def republish(context: Context, output: TeacherOutput) -> None:
    first = context.resolved.teachers[0]
    republish_training(context, first.name, first.records, first.checkpoints, output.history)


STAGE = Stage(
    "teacher", VERSION, TeacherOutput, inputs, run, missing, artifacts,
    require_replaceable=require_replaceable, republish=republish,
)  # fmt: skip


# ------------------------------------------------------------------------------------------- for the stages after it


def teacher_folders(context: Context) -> list[str]:
    """Return where each teacher loads from; a run folder may have been moved since the marker was written. None for answers."""
    run = context.resolved
    if run.has_answers:
        return []
    return [str(teacher.folder) if run.finetunes else teacher.source for teacher in run.teachers]


def teacher_folder(context: Context) -> str:
    """Return where the teacher, or the first of several, loads from."""
    return teacher_folders(context)[0]
