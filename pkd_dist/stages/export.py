"""The stage `export`: writes RUN/export, the student alone, each file proved on all of dev."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from pkd_dist import __version__
from pkd_dist.evaluation import predictions
from pkd_dist.evaluation.compare import Side
from pkd_dist.evaluation.deployment import Deployment
from pkd_dist.evaluation.metrics import labelled_by
from pkd_dist.evaluation.thresholds import cutoffs
from pkd_dist.export import build, card, manifest
from pkd_dist.files import changed_file, digest_of, sha256
from pkd_dist.model import encoder
from pkd_dist.model.head import divide_logits, shift_logits
from pkd_dist.stages.base import Artifacts, Inputs, Stage
from pkd_dist.stages.context import Context
from pkd_dist.stages.data import (
    SAMPLE,
    DataOutput,
    StudentTexts,
    classes_of,
    open_tokens,
    scored_task,
    student_reading_input,
    student_texts,
)
from pkd_dist.stages.distill import DistillOutput, length_input, require_weights
from pkd_dist.stages.evaluate import EvaluateOutput, best_student, temperature_of, thresholds_of
from pkd_dist.stages.init import InitOutput
from pkd_dist.stages.run_folder import environment
from pkd_dist.stages.teacher import teacher_folder
from pkd_dist.telemetry.log import log


@dataclass(frozen=True)
class ExportOutput:
    """The finished export.

    Attributes:
        weights: sha256 of model.safetensors.
        largest_difference: of a logit on dev, between the reloaded and the trained student.
        files: sha256 of each file.
    """

    weights: str
    largest_difference: float
    files: dict[str, str]


VERSION = 1


def inputs(context: Context) -> Inputs:
    return {
        "distill.weights": context.output(DistillOutput).weights,
        "evaluate.results": digest_of(context.output(EvaluateOutput).results),
        "export.formats": context.resolved.config.export.formats,
        "data.class_names": list(context.output(DataOutput).class_names),
        "export.reads": dict(manifest.of_task(context.resolved.task, context.resolved.student_length)),
        **length_input(context),
        **student_reading_input(context),
    }


def run(context: Context) -> ExportOutput:
    return context.world.on_main(lambda: _export(context))


def _export(context: Context) -> ExportOutput:
    run, folder = context.resolved, context.resolved.paths.export
    about = {"main_metric": run.task.main_metric, "pkd_dist": __version__}
    made = build.export(
        _subject(context), run.config.export.formats, folder,
        lambda figures: card.render(_facts(context), figures), about, lambda: context.world.interrupt("export"),
    )  # fmt: skip
    log.info("export: %s: %s; every file was checked on dev", folder, ", ".join(made["files_on_dev"]))
    if run.config.export.prune:
        log.info("export: verified; its checkpoints are removed (export.prune)")
    return ExportOutput(
        weights=made["files"]["model.safetensors"],
        largest_difference=made["files_on_dev"]["model.safetensors"]["largest_difference"],
        files=made["files"] | {manifest.MANIFEST: sha256(folder / manifest.MANIFEST)},
    )


def _subject(context: Context) -> build.Subject:
    run, texts, kept = context.resolved, student_texts(context), context.output(DataOutput).vocabulary
    sample = json.loads((run.paths.data / SAMPLE).read_text(encoding="utf-8"))
    dev = texts.splits["dev"]
    if not run.task.has_labels:
        dev = labelled_by(predictions.read(run.paths.predictions)["dev"].logits["teacher"], dev)
    student, temperature, thresholds = best_student(context), temperature_of(context), thresholds_of(context)
    if temperature is not None:
        divide_logits(student, temperature)
    if thresholds is not None:
        shift_logits(student, cutoffs(np.asarray(list(thresholds.values()))))
        student.config.thresholds_in_bias = thresholds
    return build.Subject(
        student=student,
        tokenizer=texts.tokenizer,
        task=scored_task(context),
        labels=list(context.output(DataOutput).class_names),
        dev=dev,
        texts=tuple(sample["texts"]),
        max_length=run.student_length,
        evaluate=run.config.evaluate,
        reference=_reference(context, texts),
        kept=(kept.kept, kept.total) if kept else None,
        temperature=temperature,
        thresholds=thresholds,
    )


def _reference(context: Context, texts: StudentTexts) -> build.Reference:
    answers = predictions.read(context.resolved.paths.predictions)
    test = texts.splits["test"] if "test" in answers and answers["test"].labelled else None
    pad_id, teacher = context.resolved.tokenizer.pad_token_id, None
    if not context.resolved.has_answers:
        teacher = Side(encoder.load_model(teacher_folder(context)), {"dev": open_tokens(context, "dev")}, pad_id)
    return build.Reference(teacher, test, answers)


def _facts(context: Context) -> card.CardFacts:
    run, data = context.resolved, context.output(DataOutput)
    return card.CardFacts(
        config=run.config,
        results=context.output(EvaluateOutput).results,
        main_metric=run.task.main_metric,
        task=run.task,
        classes=classes_of(context),
        train=data.sets["train"],
        dev=data.sets["dev"],
        best_epoch=context.output(DistillOutput).best_epoch,
        initialized_from=context.output(InitOutput).made_of,
        max_length=run.student_length,
        environment=environment(run, context.world),
    )


def missing(context: Context, output: ExportOutput) -> str | None:
    return changed_file(context.resolved.paths.export, output.files)


def artifacts(context: Context) -> Artifacts:
    paths = context.resolved.paths
    return Artifacts((paths.export,), temporary=(paths.checkpoints,) if context.resolved.config.export.prune else ())


def deployed(context: Context) -> Deployment:
    """Return the table of the exported files beside the teacher."""
    run = context.resolved
    return manifest.deployment_of(
        manifest.read(run.paths.export), context.output(EvaluateOutput).results, run.task.main_metric
    )


STAGE = Stage("export", VERSION, ExportOutput, inputs, run, missing, artifacts, require_rerunnable=require_weights)
