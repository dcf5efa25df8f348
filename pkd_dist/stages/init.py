"""The stage `init`: makes the student's initial weights, RUN/student_init."""

from __future__ import annotations

from dataclasses import dataclass

from pkd_dist.files import changed_file, file_digests, folder_written_atomically
from pkd_dist.model import digests, encoder, families, student
from pkd_dist.stages.base import Artifacts, Inputs, Stage
from pkd_dist.stages.context import Context
from pkd_dist.stages.data import DataOutput, classes_of, scale_input
from pkd_dist.stages.teacher import TeacherOutput, teacher_folder
from pkd_dist.telemetry.log import log


@dataclass(frozen=True)
class InitOutput:
    """The student's initial weights, in RUN/student_init.

    Attributes:
        made_of: for people.
        weights: digest of the initial weights.
        files: sha256 of each file of the folder.
    """

    made_of: str
    weights: str
    parameters: int
    files: dict[str, str]


VERSION = 1
_AFTER_INIT = {"dropout", "vocabulary", "min_count"}
"""Of the section `student`: these do not change its initial weights."""


def inputs(context: Context) -> Inputs:
    run, settings = context.resolved, context.resolved.config.student
    found: Inputs = {f"student.{key}": value for key, value in settings.model_dump(exclude=_AFTER_INIT).items()}
    found |= {
        "teacher.weights": context.output(TeacherOutput).weights,
        "data.class_names": list(context.output(DataOutput).class_names),
        "run.seed": run.config.run.seed,
    }
    found |= scale_input(context) | _output_names(context)
    if settings.init == "first_k":
        found["teacher.model.weights"] = digests.weights_digest(run.source)
    elif settings.init not in student.INIT_METHODS:
        found["student.init.weights"] = digests.weights_digest(encoder.locate(settings.init, "student.init"))
    return found


def _output_names(context: Context) -> Inputs:
    """Return the names of the student's outputs where they differ from those of a given teacher."""
    classes = classes_of(context)
    return {} if classes is None or classes.outputs == classes.names else {"data.outputs": list(classes.names)}


def run(context: Context) -> InitOutput:
    return context.world.on_main(lambda: _create(context))


def _create(context: Context) -> InitOutput:
    run, folder = context.resolved, context.resolved.paths.student_init
    model, made_of = student.create(
        run.config.student,
        run.source if run.has_answers else teacher_folder(context),
        run.source,
        context.output(DataOutput).model_fields(run.task),
        run.config.run.seed,
        context.output(DataOutput).scale,
    )
    with folder_written_atomically(folder) as temporary:
        encoder.save_model(model, run.student_tokenizer, temporary, run.student_length)
    log.info("init: a %d-layer student from %s", families.num_layers(model.config), made_of)
    if run.pairs_are_rounded:
        log.info(
            "init: the teacher's %d layers are not a multiple of the student's %d; the patience pairs are rounded to %s",
            run.teacher_layers, run.student_layers, list(run.layer_map.pairs),
        )  # fmt: skip
    return InitOutput(
        made_of, digests.weights_digest(str(folder)), encoder.parameter_count(model), file_digests(folder)
    )


def missing(context: Context, output: InitOutput) -> str | None:
    return changed_file(context.resolved.paths.student_init, output.files)


def artifacts(context: Context) -> Artifacts:
    return Artifacts((context.resolved.paths.student_init,))


STAGE = Stage("init", VERSION, InitOutput, inputs, run, missing, artifacts)
