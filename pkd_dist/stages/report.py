"""The stage `report`: writes RUN/report.html."""

from __future__ import annotations

from dataclasses import dataclass

from pkd_dist.files import digest_of
from pkd_dist.report import pages
from pkd_dist.stages.base import Artifacts, Inputs, Stage, absent
from pkd_dist.stages.context import Context
from pkd_dist.stages.evaluate import EvaluateOutput
from pkd_dist.stages.export import ExportOutput


@dataclass(frozen=True)
class ReportOutput:
    """Attributes:
    bytes: size of the page.
    """

    bytes: int


VERSION = 1


def inputs(context: Context) -> Inputs:
    return {
        "evaluate.results": digest_of(context.output(EvaluateOutput).results),
        "export.weights": context.output(ExportOutput).weights,
    }


def run(context: Context) -> ReportOutput:
    return context.world.on_main(lambda: ReportOutput(pages.write(context.resolved.paths.run)["bytes"]))


def missing(context: Context, output: ReportOutput) -> str | None:
    return absent(context.resolved.paths.report)


def artifacts(context: Context) -> Artifacts:
    return Artifacts((context.resolved.paths.report,))


STAGE = Stage("report", VERSION, ReportOutput, inputs, run, missing, artifacts)
