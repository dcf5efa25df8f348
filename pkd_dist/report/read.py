"""Read a run folder: raw markers, results, records and the export manifest become a typed `Run`.

This is the only module of the report that knows their keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import yaml

from pkd_dist.config.load import load
from pkd_dist.config.schema import Config
from pkd_dist.data import tasks
from pkd_dist.evaluation import predictions
from pkd_dist.evaluation.predictions import SIDES, Predictions
from pkd_dist.export import card, manifest
from pkd_dist.metric_names import MAIN_METRIC
from pkd_dist.report.run import (
    Compression,
    DataSet,
    Distillation,
    Environment,
    Evaluation,
    Export,
    ExportFile,
    ModelResult,
    Results,
    Run,
    Scores,
    SplitResult,
    StageTime,
    Steps,
)
from pkd_dist.telemetry import records
from pkd_dist.telemetry.records import Record

Json: TypeAlias = Mapping[str, Any]


def read(folder: Path, stages: Sequence[str]) -> Run:
    """Read a run folder that has finished its export.

    Args:
        stages: all stage names in the order of the run; unfinished ones are left out.

    Raises:
        UserError: a file is missing or damaged.
    """
    markers = {}
    for name in stages:
        path = folder / "stages" / f"{name}.json"
        marker = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if marker.get("done"):
            markers[name] = marker
    config_file = folder / "config.yaml"
    return from_markers(
        load(config_file),
        yaml.safe_load(config_file.read_text(encoding="utf-8"))["resolved"],
        markers,
        records.read(folder / "metrics.jsonl"),
        predictions.read(folder / predictions.FILE)["dev"],
        manifest.read(folder / "export"),
    )


def from_markers(
    config: Config,
    resolved: Json,
    markers: Mapping[str, Json],
    lines: Iterable[Record],
    dev: Predictions,
    export: Json,
) -> Run:
    """Build a `Run` from what its stages have left.

    Args:
        resolved: section `resolved` of config.yaml.
        markers: stage name -> marker, of the finished stages in the order of the run.
        lines: metrics.jsonl of the distillation.
        dev: predictions of both models on dev.
        export: manifest of the export.
    """
    outputs = {name: marker["outputs"] for name, marker in markers.items()}
    data, init = outputs["data"], outputs["init"]
    lines = list(lines)
    copied = init.get("layers")  # not in markers of earlier versions
    return Run(
        config=config,
        task=tasks.resolve(config.task),
        environment=_environment(resolved),
        stages=tuple(
            StageTime(name, marker["seconds"], marker.get("starts", 1), marker.get("stopped", 0))
            for name, marker in markers.items()
        ),
        classes=tuple(data["classes"]),
        class_names=tuple(data["class_names"]),
        data={name: _data_set(name, data[name]) for name in data["sets"]},
        teacher_history=_history(outputs["teacher"].get("history") or []),
        initialized_from=init["made_of"],
        copied_layers=None if copied is None else tuple(copied),
        distillation=_distillation(outputs["distill"], [line for line in lines if "split" in line]),
        steps=_steps([line for line in lines if "split" not in line]),
        results=_results(outputs["evaluate"]),
        dev=dev,
        export=_export(export, outputs["export"]),
    )


def _environment(resolved: Json) -> Environment:
    return Environment(
        versions=resolved["versions"],
        git_revision=resolved["git_revision"],
        world_size=resolved["world_size"],
        launcher=resolved["launcher"],
        device=resolved["device"],
        precision=resolved["precision"],
        teacher_precision=resolved["teacher_precision"],
        zero_stage=resolved["deepspeed"].get("zero_optimization", {}).get("stage", 0),
        teacher_layers=resolved["teacher_layers"],
        student_layers=resolved["student_layers"],
        patience_pairs=tuple((student, teacher) for student, teacher in resolved["patience_pairs"]),
        beta_mean=resolved["beta_mean"],
        beta_sum=resolved["beta_sum"],
    )


def _data_set(name: str, content: Json) -> DataSet:
    return DataSet(
        name=name,
        source=content["source"],
        examples=content["examples"],
        labelled=content["labelled"],
        tokens=content["tokens"],
        longest=content["longest"],
        truncated=content["truncated"],
        notes=tuple(content["notes"]),
        per_class=tuple(content.get("per_class") or ()),
    )


def _history(entries: Iterable[Json]) -> tuple[Evaluation, ...]:
    return tuple(Evaluation(entry["epoch"], entry["step"], entry[MAIN_METRIC]) for entry in entries)


def _distillation(output: Json, evaluations: Iterable[Record]) -> Distillation:
    return Distillation(
        best_epoch=output["best_epoch"],
        best_metric=output["best_metric"],
        history=_history(output["history"]),
        steps=output["steps"],
        samples=output["samples"],
        tokens=output["tokens"],
        evaluation_seconds=sum(line["seconds"]["evaluation"] for line in evaluations if "seconds" in line),
    )


def _steps(lines: Sequence[Record]) -> Steps:
    losses = [records.losses(line) for line in lines]
    return Steps(
        step_S=np.asarray([line["step"] for line in lines], np.int64),
        losses={
            term: np.asarray([loss[term] for loss in losses], np.float64) for term in (losses[0] if losses else ())
        },
        learning_rate_S=np.asarray([line["learning_rate"] for line in lines], np.float64),
        grad_norm_S=np.asarray([line["grad_norm"] for line in lines], np.float64),
        seconds=tuple(line["seconds"] for line in lines if "seconds" in line),
    )


def _scores(content: Json) -> Scores:
    low_high = content.get("accuracy_interval_95")
    return Scores(
        main_metric=content[MAIN_METRIC],
        accuracy=content.get("accuracy"),
        accuracy_interval=(low_high[0], low_high[1]) if low_high else None,
        precision=content.get("precision"),
        recall=content.get("recall"),
    )


def _results(output: Json) -> Results:
    content, ratios = output["results"], output["results"]["compression"]
    return Results(
        task=content["task"],
        split=content["split"],
        examples=content["n"],
        models={
            side: ModelResult(
                scores=_scores(content[side]),
                parameters=content[side]["parameters"],
                sentences_per_second=content[side]["reasoningTime"],
                rates=tuple(output["rates"][side]),
                latencies_ms=tuple(output["latencies_ms"][side]),
            )
            for side in SIDES
        },
        splits=tuple(
            SplitResult(name, both["n"], _scores(both["teacher"]), _scores(both["student"]), both["agreement"])
            for name, both in content["splits"].items()
        ),
        compression=Compression(ratios["parameters"], ratios["throughput"], ratios["retention"], ratios["agreement"]),
        table=tuple(card.figures(content)),
    )


def _export(content: Json, output: Json) -> Export:
    return Export(
        processor=content["measured_on"]["processor"],
        files=tuple(
            ExportFile(
                name=name,
                bytes=file["bytes"],
                main_metric=file[MAIN_METRIC],
                agreement=file["agreement"],
                latency_ms_p50=file["latency_ms_p50"],
                latency_ms_p99=file["latency_ms_p99"],
                sentences_per_second=file["reasoningTime"],
            )
            for name, file in content["files_on_dev"].items()
        ),
        largest_difference=output["largest_difference"],
    )
