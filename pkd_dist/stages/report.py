"""The stage `report`: writes RUN/report.html.

Outputs of all stages, metrics.jsonl, predictions and the table of the exported files -> `view` -> report.run.Run -> report.pages
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from pkd_dist.config.schema import Config
from pkd_dist.data.tasks import Task
from pkd_dist.environment import Environment
from pkd_dist.evaluation import predictions
from pkd_dist.evaluation.deployment import Deployment, closing_table
from pkd_dist.evaluation.predictions import Predictions
from pkd_dist.evaluation.results import ModelResults, Scores, score_rows
from pkd_dist.files import digest_of, readable_bytes, size_of
from pkd_dist.metric_names import DIVERGENCE, MAIN_METRIC, SHARES
from pkd_dist.report import run as shown
from pkd_dist.report.notices import notices
from pkd_dist.stages.base import NAMES, Artifacts, Inputs, Markers, Stage, absent, previous_folder
from pkd_dist.stages.context import Context
from pkd_dist.stages.data import DataOutput
from pkd_dist.stages.distill import DistillOutput, length_input
from pkd_dist.stages.evaluate import EvaluateOutput
from pkd_dist.stages.export import ExportOutput, deployed
from pkd_dist.stages.init import InitOutput
from pkd_dist.stages.progress import EpochScores
from pkd_dist.stages.run_folder import environment
from pkd_dist.stages.teacher import TeacherOutput
from pkd_dist.stages.translation import translate
from pkd_dist.telemetry import records
from pkd_dist.telemetry.records import Record


@dataclass(frozen=True)
class ReportOutput:
    """The written report.

    Attributes:
        bytes: size of the page.
        notices: what it calls worth a look.
    """

    bytes: int
    notices: tuple[str, ...] = ()  # reports of 0.1.0 have none in their marker


VERSION = 1


def inputs(context: Context) -> Inputs:
    return {
        "evaluate.results": digest_of(context.output(EvaluateOutput).results),
        "export.weights": context.output(ExportOutput).weights,
        "export.files": digest_of(context.output(ExportOutput).files),
        **length_input(context),
    }


def run(context: Context) -> ReportOutput:
    return context.world.on_main(lambda: _write(context))


def _write(context: Context) -> ReportOutput:
    from pkd_dist.report import pages  # loads matplotlib, which no other stage needs

    resolved, paths = context.resolved, context.resolved.paths
    outputs = Outputs(
        data=context.output(DataOutput),
        teacher=context.output(TeacherOutput),
        init=context.output(InitOutput),
        distill=context.output(DistillOutput),
        evaluate=context.output(EvaluateOutput),
        export=context.output(ExportOutput),
    )
    page = view(
        Settings(resolved.config, resolved.task, environment(resolved, context.world)),
        outputs,
        _times(Markers(paths.run, translate)),
        list(records.read_complete(paths.records)),
        predictions.read(paths.predictions)["dev"],
        deployed(context),
    )
    return ReportOutput(pages.write(page, paths.report), tuple(notices(page)))


def _times(markers: Markers) -> list[shown.StageTime]:
    found = [(name, markers.read(name)) for name in NAMES]
    return [shown.StageTime(name, m.seconds, m.starts, m.stopped) for name, m in found if m is not None and m.done]


def missing(context: Context, output: ReportOutput) -> str | None:
    return absent(context.resolved.paths.report)


def artifacts(context: Context) -> Artifacts:
    return Artifacts((context.resolved.paths.report,))


STAGE = Stage("report", VERSION, ReportOutput, inputs, run, missing, artifacts)


def summary(context: Context) -> str:
    """Return the table a run ends with, where its export and report are, and what is worth a look."""
    paths, notices = context.resolved.paths, context.output(ReportOutput).notices
    table = closing_table(deployed(context), paths.export, paths.report, context.resolved.task.multiple_choice)
    kept = previous_folder(paths.run)
    if kept.exists():
        table += (
            f"\nearlier outputs: {kept}, {readable_bytes(size_of(kept))}; `pkd runs clean {paths.run}` removes them"
        )
    return "\n".join([table, *(["", "worth a look:", *(f"- {notice}" for notice in notices)] if notices else [])])


# ------------------------------------------------------------------------------------------------ what the page shows


@dataclass(frozen=True)
class Settings:
    """What the run was configured and resolved to."""

    config: Config
    task: Task
    environment: Environment


@dataclass(frozen=True)
class Outputs:
    """What the stages before this one handed on."""

    data: DataOutput
    teacher: TeacherOutput
    init: InitOutput
    distill: DistillOutput
    evaluate: EvaluateOutput
    export: ExportOutput


def view(
    settings: Settings,
    outputs: Outputs,
    times: Sequence[shown.StageTime],
    lines: Sequence[Record],
    dev: Predictions,
    deployment: Deployment,
) -> shown.Run:
    """Return the run as the report shows it.

    Args:
        times: of the finished stages, in order.
        lines: of metrics.jsonl.
        dev: predictions of both models on dev.
        deployment: the exported files beside the teacher.
    """
    return shown.Run(
        config=settings.config,
        task=settings.task,
        environment=settings.environment,
        stages=tuple(times),
        classes=outputs.data.classes,
        class_names=outputs.data.class_names,
        data=outputs.data.sets,
        student_data=outputs.data.student_sets,
        teacher_history=_history(outputs.teacher.history),
        initialized_from=outputs.init.made_of,
        distillation=_distillation(outputs.distill, [line for line in lines if "split" in line]),
        steps=_steps([line for line in lines if "split" not in line]),
        results=_results(outputs.evaluate),
        dev=dev,
        deployment=deployment,
        largest_difference=outputs.export.largest_difference,
        calibration=outputs.evaluate.results.get("calibration"),
        multilabel=outputs.evaluate.results.get("multilabel"),
    )


def _history(entries: Iterable[EpochScores]) -> tuple[shown.EpochScore, ...]:
    return tuple(
        shown.EpochScore(int(entry["epoch"]), int(entry["step"]), entry[MAIN_METRIC], entry.get(DIVERGENCE))
        for entry in entries
    )


def _distillation(output: DistillOutput, evaluations: Iterable[Record]) -> shown.Distillation:
    return shown.Distillation(
        best_epoch=output.best_epoch,
        best_metric=output.best_metric,
        history=_history(output.history),
        steps=output.steps,
        samples=output.samples,
        tokens=output.tokens,
        evaluation_seconds=sum(line["seconds"].get("evaluation", 0.0) for line in evaluations if "seconds" in line),
    )


def _steps(lines: Sequence[Record]) -> shown.Steps:
    losses = [records.losses(line) for line in lines]
    return shown.Steps(
        step_S=np.asarray([line["step"] for line in lines], np.int64),
        losses={
            term: np.asarray([loss.get(term, np.nan) for loss in losses], np.float64)
            for term in (losses[0] if losses else ())
        },
        learning_rate_S=np.asarray([line["learning_rate"] for line in lines], np.float64),
        grad_norm_S=np.asarray([line["grad_norm"] for line in lines], np.float64),
        seconds=tuple(line["seconds"] for line in lines if "seconds" in line),
    )


def _scores(content: Scores) -> shown.Scores:
    intervals = (content.get(f"{key}_interval_95") for key in SHARES)
    low_high = cast(list[float] | None, next(filter(None, intervals), None))
    return shown.Scores(
        main_metric=content["main_metric"],
        accuracy=content.get("accuracy"),
        share_interval=(low_high[0], low_high[1]) if low_high else None,
        precision=content.get("precision"),
        recall=content.get("recall"),
        undefined=tuple(content.get("undefined", ())),
    )


def _model_result(content: ModelResults, output: EvaluateOutput, side: str) -> shown.ModelResult:
    return shown.ModelResult(
        scores=_scores(content),
        parameters=content.get("parameters"),
        sentences_per_second=content.get("reasoningTime"),
        rates=tuple(output.rates.get(side, ())),
        latencies_ms=tuple(output.latencies_ms.get(side, ())),
        threads=content.get("threads", 0),
    )


def _results(output: EvaluateOutput) -> shown.Results:
    content, ratios = output.results, output.results["compression"]
    return shown.Results(
        task=content["task"],
        split=content["split"],
        examples=content["n"],
        models={
            "teacher": _model_result(content["teacher"], output, "teacher"),
            "student": _model_result(content["student"], output, "student"),
        },
        splits=tuple(
            shown.SplitResult(name, both["n"], _scores(both["teacher"]), _scores(both["student"]), both["agreement"])
            for name, both in content["splits"].items()
        ),
        compression=shown.Compression(
            ratios["parameters"], ratios["throughput"], ratios["retention"], ratios["agreement"]
        ),
        table=tuple(score_rows(content)),
    )
