"""Run folders as the pipeline leaves them before the report stage, without running it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import TypeAdapter
from safetensors.numpy import save_file

from pkd_dist.config.load import load
from pkd_dist.config.schema import Config
from pkd_dist.data import tasks
from pkd_dist.data.tasks import Task
from pkd_dist.environment import Environment
from pkd_dist.evaluation import predictions
from pkd_dist.evaluation.deployment import Deployment, Measured, beside_teacher
from pkd_dist.evaluation.results import Speed
from pkd_dist.export import manifest
from pkd_dist.export.runtime import TITLES
from pkd_dist.report.run import Run, StageTime
from pkd_dist.stages.base import NAMES, Marker, Markers
from pkd_dist.stages.data import DataOutput
from pkd_dist.stages.distill import DistillOutput
from pkd_dist.stages.evaluate import EvaluateOutput
from pkd_dist.stages.export import ExportOutput
from pkd_dist.stages.init import InitOutput
from pkd_dist.stages.report import Outputs, Settings, view
from pkd_dist.stages.teacher import TeacherOutput
from pkd_dist.stages.translation import translate
from pkd_dist.telemetry import records

EXAMPLES = 200


def make_run(
    folder: Path,
    names: tuple[str, ...] = ("negative", "positive"),
    epochs: int = 3,
    history: bool = True,
    steps: int = 120,
    regression: bool = False,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """Write a run folder, and its dev data next to it in `data/`. `settings` are sections of the configuration."""
    data = folder.parent / "data"
    task = {"name": "custom", "data": str(data), "text": ["text"], "label": "label", "max_length": 128}
    task |= {"kind": "regression"} if regression else {}
    config = Config.model_validate({"run": {"dir": str(folder)}, "task": task, "train": {"epochs": epochs}} | settings)
    resolved = {
        "versions": {"pkd_dist": "0.1.0", "torch": "2.13.0"}, "git_revision": "54e3440", "world_size": 2,
        "launcher": "torchrun", "device": "cpu", "precision": "autocast bfloat16", "teacher_precision": "bfloat16",
        "deepspeed": {"zero_optimization": {"stage": 1}}, "teacher_layers": 6, "student_layers": 3, "copied_layers": [1, 3, 5],
        "patience_pairs": [[1, 2], [2, 4]],
        "beta_mean": 100.0, "beta_sum": 0.1302,
    }  # fmt: skip
    (folder / "stages").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json") | {"resolved": resolved}))
    labels, logits = _labels_and_logits(list(names), regression, seed)
    ids = _write_dev(data, list(names), labels, regression)
    write_predictions(folder, ids, labels, logits)
    write_export(folder / "export", labels, logits)
    for name, outputs in _outputs(folder, list(names), epochs, history, steps, regression).items():
        marker = Marker(done=True, inputs={}, fingerprint="", outputs=outputs, seconds=12.5, starts=1)
        marker.write(folder / "stages" / f"{name}.json")
    _write_metrics(folder / "metrics.jsonl", steps, epochs, seed)
    return folder


def write_predictions(folder: Path, ids: np.ndarray, labels: np.ndarray, logits: dict[str, np.ndarray]) -> None:
    tensors = {
        "dev.ids": ids,
        "dev.labels": labels,
        **{f"dev.{side}": x.astype(np.float32) for side, x in logits.items()},
    }
    save_file(tensors, folder / predictions.FILE)


def _labels_and_logits(names: list[str], regression: bool, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    if regression:
        labels = rng.uniform(0, 5, EXAMPLES).astype(np.float32)
        teacher = labels[:, None] + rng.normal(0, 0.4, (EXAMPLES, 1))
        return labels, {
            "teacher": teacher,
            "student": teacher + np.random.default_rng(seed + 1).normal(0, 0.4, (EXAMPLES, 1)),
        }
    labels = np.arange(EXAMPLES) % len(names)
    teacher = 2.5 * np.eye(len(names))[labels] + rng.normal(0, 1, (EXAMPLES, len(names)))
    noise = np.random.default_rng(seed + 1).normal(0, 0.7, teacher.shape)
    return labels, {"teacher": teacher, "student": teacher + noise}


def _write_dev(data: Path, names: list[str], labels: np.ndarray, regression: bool) -> np.ndarray:
    """Write dev.tsv and return the ids of its examples."""
    from pkd_dist.data import text
    from pkd_dist.data.tasks import Task

    data.mkdir(exist_ok=True)
    shown = [f"{label:.4f}" if regression else names[label] for label in labels]
    lines = ["text\tlabel", *(f"Sentence {i} of a film that one remembers.\t{label}" for i, label in enumerate(shown))]
    (data / "dev.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    task = Task(
        "custom", ("text",), "label", regression=regression, metric="pearson_spearman" if regression else "accuracy"
    )
    return text.read(str(data), "dev", task, None if regression else names).ids_N


def _outputs(
    folder: Path, names: list[str], epochs: int, history: bool, steps: int, regression: bool
) -> dict[str, dict[str, Any]]:
    metric = "pearson_spearman" if regression else "accuracy"
    per_epoch = [0.6 + 0.2 * e / epochs for e in range(1, epochs + 1)]
    dev = [
        {"epoch": e + 1, "step": steps * (e + 1) // epochs, metric: v, "main_metric": v}
        for e, v in enumerate(per_epoch)
    ]
    split: dict[str, Any] = {
        "source": "train.tsv", "examples": 800, "labelled": 800, "digest": "d", "input_digest": "i", "tokens": 9000,
        "longest": 60, "truncated": 0, "notes": [],
    }  # fmt: skip
    if not regression:
        split["per_class"] = [50] * len(names)
    sides = {side: figures(value, regression) for side, value in (("teacher", 0.82), ("student", 0.8))}
    sides["teacher"] |= {"parameters": 22_713_986, "reasoningTime": 180.0}
    compression = {"parameters": 2.0, "size": 2.0, "throughput": 2.06, "retention": 0.976, "agreement": 0.915}
    of_student = {k: v for k, v in sides["student"].items() if k != "accuracy_interval_95"}
    results = {
        "task": "t",
        "split": "dev",
        "n": EXAMPLES,
        **of_student,
        **sides,
        "compression": compression,
        "splits": {},
    }
    rng = np.random.default_rng(0)
    evaluation = {
        "results": results,
        "latencies_ms": {side: (scale * rng.lognormal(0, 0.2, 100)).tolist() for side, scale in (("teacher", 10), ("student", 5))},
        "rates": {"teacher": [178.0, 180.0, 181.0], "student": [366.0, 371.0, 380.0]},
    }  # fmt: skip
    names = [] if regression else names
    return {
        "data": {
            "classes": names, "class_names": names, "sets": {"train": split, "dev": {**split, "source": "dev.tsv"}},
        },
        "teacher": {"weights": "t", "folder": str(folder / "teacher")}
        | ({"best_epoch": epochs, "history": dev} if history else {}),
        "cache": {"rows": 800, "built": 1},
        "init": {"made_of": "teacher layers [1, 3, 5] (from 0)", "weights": "w", "parameters": 11_000_000, "files": {}},
        "distill": {
            "best_file": "best.safetensors", "best_epoch": epochs, "best_metric": 0.8, "history": dev, "weights": "b",
            "steps": steps, "samples": 7680, "tokens": 90000,
        },
        "evaluate": evaluation,
        "export": {"weights": "x", "largest_difference": 2e-7, "files": {}},
    }  # fmt: skip


def speed(rate: float, p50: float, threads: int = 1) -> Speed:
    return {
        "latency_ms_p50": p50, "latency_ms_p99": 2 * p50, "samples_per_second": rate, "reasoningTime": rate, "spread": 0.1,
        "threads": threads,
    }  # fmt: skip


def measured(labels: np.ndarray, logits: dict[str, np.ndarray]) -> Deployment:
    """Set a student's files beside its teacher; int8 differs a little from the others."""
    student, regression = logits["student"], labels.dtype == np.float32
    int8 = student + np.random.default_rng(9).normal(0, 0.1, student.shape)
    models = [Measured("teacher", "teacher, PyTorch", 22_713_986, 90_900_000, logits["teacher"], speed(73, 13.0))]
    models += [
        Measured(file, TITLES[file], 11_000_000, size, answers, speed(rate, p50))
        for file, size, answers, rate, p50 in (
            ("model.safetensors", 44_000_000, student, 145, 6.5), ("onnx/model.onnx", 44_100_000, student, 390, 2.5),
            ("onnx/model.int8.onnx", 11_200_000, int8, 1037, 0.8),
        )
    ]  # fmt: skip
    metric = "pearson_spearman" if regression else "accuracy"
    task = Task("t", ("text",), "label", regression=regression, metric=metric)
    return beside_teacher(task, {"dev": labels}, models, "onnx/model.int8.onnx", 64, "a processor")


def write_export(folder: Path, labels: np.ndarray, logits: dict[str, np.ndarray]) -> None:
    """Write the manifest of an export as 0.1.0 did, and the table of the files that later versions add."""
    speed = {"latency_ms_p50": 5.1, "latency_ms_p99": 9.2, "reasoningTime": 371.0}
    file = {"largest_difference": 2e-7, "agreement": 1.0, "bytes": 44_000_000, "main_metric": 0.8, **speed}
    folder.mkdir()
    about = {"files_on_dev": {"model.safetensors": file}, "measured_on": {"processor": "a processor"}}
    manifest.write(folder, about | {"deployment": asdict(measured(labels, logits))})


def figures(value: float, regression: bool) -> dict[str, Any]:
    """Return the results of one model in results_eval.json."""
    out: dict[str, Any] = {
        "parameters": 11_000_000,
        "modelSize": 44.0,
        "reasoningTime": 371.0,
        "latency_ms_p50": 5.1,
        "latency_ms_p99": 9.2,
    }
    if regression:
        return out | {"pearson": value, "spearman": value, "pearson_spearman": value, "main_metric": value}
    scores = {"accuracy": value, "MCC": 0.6, "precision": 0.7, "recall": 0.71, "f_1": 0.72, "main_metric": value}
    return out | scores | {"accuracy_interval_95": [value - 0.02, value + 0.02]}


def _write_metrics(path: Path, steps: int, epochs: int, seed: int) -> None:
    seconds = {"step": 0.1, "data": 0.004, "forward": 0.03, "backward": 0.05, "ranks": 0.002, "optimizer": 0.01}
    rng = np.random.default_rng(seed)
    lines = []
    for step in range(1, steps + 1):
        x = step / steps
        noise = 1 + 0.1 * float(rng.normal())
        losses = {"loss": noise * (1 - x / 2), "loss_ce": 0.7 - x / 2, "loss_ds": 1 - x, "loss_pt": 3e-4 * (1.1 - x)}
        rest = {"learning_rate": 1e-4 * (1 - x), "grad_norm": 1.0, "seconds": seconds, "time": 1e9 + step}
        lines.append({"step": step, "epoch": x * epochs, **losses, **rest})
    lines.append({"step": steps, "epoch": epochs, "split": "dev", "main_metric": 0.8, "seconds": {"evaluation": 0.25}})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


OUTPUTS = {
    "data": DataOutput, "teacher": TeacherOutput, "init": InitOutput, "distill": DistillOutput, "evaluate": EvaluateOutput,
    "export": ExportOutput,
}  # fmt: skip


def read(folder: Path) -> Run:
    """Return the run of a folder as the stage `report` shows it."""
    markers = Markers(folder, translate)
    found = {name: marker for name in NAMES if (marker := markers.read(name)) is not None}
    outputs = {name: TypeAdapter(kind).validate_python(found[name].outputs) for name, kind in OUTPUTS.items()}
    config = load(folder / "config.yaml")
    resolved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["resolved"]
    task = tasks.resolve(config.task)
    results = outputs["evaluate"].results
    return view(
        Settings(config, task, Environment(**resolved)),
        Outputs(**outputs),
        [StageTime(name, marker.seconds, marker.starts, marker.stopped) for name, marker in found.items()],
        list(records.read(folder / "metrics.jsonl")),
        predictions.read(folder / predictions.FILE)["dev"],
        manifest.deployment_of(manifest.read(folder / "export"), results, task.main_metric),
    )


def change(run: Path, stage: str, edit: Any) -> None:
    """Edit the outputs in the marker of a stage."""
    rewrite(run, stage, lambda marker: edit(marker["outputs"]))


def rewrite(run: Path, stage: str, edit: Any) -> None:
    """Edit the marker of a stage, as a dictionary."""
    path = run / "stages" / f"{stage}.json"
    raw = json.loads(path.read_text())
    raw.pop("checksum")
    edit(raw)
    Marker(**raw).write(path)
