"""The stage `evaluate`: scores and times teacher and student on every split, into results_eval.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import SkipValidation
from transformers import PreTrainedModel

from pkd_dist.data import submission
from pkd_dist.data.examples import is_labelled
from pkd_dist.data.multilabel import listed
from pkd_dist.evaluation import predictions
from pkd_dist.evaluation.calibration import ece_sentence
from pkd_dist.evaluation.compare import ModelComparison, Side, compare_models
from pkd_dist.evaluation.results import Results, class_facts
from pkd_dist.evaluation.thresholds import MultiLabel, describe
from pkd_dist.export import hf
from pkd_dist.files import make_folder, write_json
from pkd_dist.model import encoder, vocabulary
from pkd_dist.stages.base import Artifacts, Inputs, Stage, absent
from pkd_dist.stages.context import Context
from pkd_dist.stages.data import (
    DataOutput,
    classes_of,
    open_answers,
    open_tokens,
    positive_input,
    scored_task,
    student_reading_input,
    student_texts,
)
from pkd_dist.stages.distill import DistillOutput, best_weights, require_weights
from pkd_dist.stages.teacher import TeacherOutput, teacher_folders
from pkd_dist.telemetry.log import log


@dataclass(frozen=True)
class EvaluateOutput:
    """The scores and speed of both models.

    Attributes:
        results: the content of results_eval.json.
        latencies_ms: model -> milliseconds of each single-sentence request.
        rates: model -> sentences per second of each pass.
    """

    results: SkipValidation[Results]
    latencies_ms: dict[str, list[float]]
    rates: dict[str, list[float]]


VERSION = 1


def inputs(context: Context) -> Inputs:
    run, data = context.resolved, context.output(DataOutput)
    return {
        "distill.weights": context.output(DistillOutput).weights,
        "teacher.weights": context.output(TeacherOutput).all_weights,
        **{f"data.{split}": data.sets[split].digest for split in data.scored},
        "data.class_names": list(data.class_names),
        "task.metric": run.task.metric,
        **positive_input(context),
        "evaluate.calibrate": run.config.evaluate.calibrate,
        "evaluate.result_dir": run.config.evaluate.result_dir,
        **student_reading_input(context),
    }


def run(context: Context) -> EvaluateOutput:
    splits = {split: open_tokens(context, split) for split in context.output(DataOutput).scored}
    run, task, classes, texts = context.resolved, scored_task(context), classes_of(context), student_texts(context)
    teachers = [
        Side(encoder.load_model(folder), splits, run.tokenizer.pad_token_id) for folder in teacher_folders(context)
    ]
    student = Side(best_student(context), texts.splits, texts.tokenizer.pad_token_id)
    sides = dict(zip(("teacher",), teachers, strict=False)) | {"student": student}
    answers = open_answers(context) if run.has_answers else {}
    compared = compare_models(
        sides,
        task,
        run.config.evaluate,
        context.world,
        teachers[1:],
        {split: answers[split] for split in splits if answers},
    )
    if teachers[1:]:
        log.info("evaluate: %s", _ensemble_line(compared.results))
    if "calibration" in compared.results:
        found = compared.results["calibration"]
        log.info("evaluate: calibration: %s", found.get("unfitted") or ece_sentence(found))
    if classes:
        compared.results.update(class_facts(classes))
    if task.multiple_choice:
        compared.results["options"] = len(context.output(DataOutput).classes)
    if classes and compared.thresholds is not None:
        compared.results["multilabel"] = _of_classes(compared, classes.names)
    context.world.on_main(lambda: _write(context, compared))
    output = EvaluateOutput(
        compared.results,
        {name: timing.latencies_ms_R.round(4).tolist() for name, timing in compared.timings.items()},
        {name: timing.rates for name, timing in compared.timings.items()},
    )
    republish(context, output)
    return output


def _of_classes(compared: ModelComparison, names: Sequence[str]) -> MultiLabel:
    """Return the thresholds and the scores of each class, and log what dev could not decide."""
    assert compared.thresholds is not None
    labels = {split: np.asarray(found.labels_N) for split, found in compared.splits.items()}
    labels = {split: labels_NC for split, labels_NC in labels.items() if is_labelled(labels_NC).all()}
    found = describe(compared.thresholds, compared.logits, labels, names)
    shown = [f"{name} {value:.3f}" for name, value in found["thresholds"]["student"].items()]
    log.info("evaluate: thresholds of the student, chosen on dev: %s", listed(shown))
    if found["unfitted"]:
        log.info("evaluate: the threshold is 0.5 for classes without an example in dev: %s", listed(found["unfitted"]))
    return found


def _ensemble_line(results: Results) -> str:
    ensemble = results["ensemble"]
    mean, first = results["teacher"]["main_metric"], ensemble["first"]["dev"]["main_metric"]
    return (
        f"the teacher's answers are the mean of {ensemble['teachers']} teachers: main metric on dev {mean:.4f}, the first "
        f"alone {first:.4f}; size and speed are the first's"
    )


def _write(context: Context, compared: ModelComparison) -> None:
    paths, splits = context.resolved.paths, compared.splits
    make_folder(paths.results.parent)
    write_json(paths.results, compared.results)
    predictions.write(paths.predictions, splits, compared.logits)
    for split in splits.keys() - {"dev", *compared.results["splits"]}:
        for name, logits_NC in compared.logits[split].items():
            _submit(context, split, name, logits_NC)


def _submit(context: Context, split: str, name: str, logits_NC: np.ndarray) -> None:
    folder = context.resolved.paths.submissions / name
    make_folder(folder)
    path = submission.write(folder, split, context.resolved.task, logits_NC, context.output(DataOutput).classes)
    log.info("evaluate: %s has no labels; the %s's predictions are in %s", split, name, path)


def missing(context: Context, output: EvaluateOutput) -> str | None:
    paths = context.resolved.paths
    return absent(paths.results) or absent(paths.predictions)


def artifacts(context: Context) -> Artifacts:
    paths = context.resolved.paths
    return Artifacts((paths.results, paths.submissions, paths.predictions))


def republish(context: Context, output: EvaluateOutput) -> None:
    """Set the gauges to the scores of the finished student."""
    scores = {"dev": output.results, **output.results["splits"]}
    context.telemetry.metrics.show_scores("evaluate", {split: of["student"] for split, of in scores.items()})


STAGE = Stage(
    "evaluate", VERSION, EvaluateOutput, inputs, run, missing, artifacts,
    require_rerunnable=require_weights, republish=republish,
)  # fmt: skip


# ------------------------------------------------------------------------------------------- for the stages after it


def temperature_of(context: Context) -> float | None:
    """Return the temperature that the student's logits were divided by; None: it is not calibrated."""
    found = context.output(EvaluateOutput).results.get("calibration")
    return found["temperature"] if found else None


def thresholds_of(context: Context) -> dict[str, float] | None:
    """Return the student's threshold of each class, by name; None: a text has one class."""
    found = context.output(EvaluateOutput).results.get("multilabel")
    return found["thresholds"]["student"] if found else None


def best_student(context: Context) -> PreTrainedModel:
    """Load the student of the best epoch as a plain model, with the tokens that it keeps, before calibration."""
    distilled, kept_K = context.output(DistillOutput), student_texts(context).kept_K
    best = hf.best_student(context.resolved.paths.student_init, best_weights(context, distilled), distilled.weights)
    if kept_K is not None:
        vocabulary.trim_embedding(best, kept_K)
    return best
