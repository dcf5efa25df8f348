"""`manifest.json` of an export: the sha256 of every file, and the check that all files are as written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from pkd_dist.data.tasks import Task
from pkd_dist.errors import UserError
from pkd_dist.evaluation import deployment
from pkd_dist.evaluation.deployment import Deployment, ModelRow
from pkd_dist.evaluation.results import Results, Speed
from pkd_dist.export.runtime import TITLES, WEIGHTS_FILE, to_deploy
from pkd_dist.files import changed_file, digest_of, file_digests, write_json
from pkd_dist.metric_names import MAIN_METRIC

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_REMEDY = "; export it again"


class _Quantization(TypedDict, total=False):
    """The way to int8 that was chosen among those tried."""

    quantisation: str
    tried: dict[str, dict[str, float]]


class BatchEffect(TypedDict):
    """What batches of 64 texts of mixed lengths change, compared with each text alone and without padding.

    `batch_effect` is the largest difference of a probability, for a regression as a share of the range of its values;
    `batch_effect_mean` is the mean over the examples; `batch_changed_labels` is the number of examples with another label.
    """

    batch_effect: float
    batch_effect_mean: float
    batch_changed_labels: int


class _Calibrated(TypedDict, total=False):
    """The expected calibration error of a calibrated student; see `evaluation.calibration`."""

    ece: float


class FileFigures(_Quantization, _Calibrated, BatchEffect, Speed):
    """What was measured of one file on all of dev; `Speed` for its speed.

    `largest_difference` is that of a logit to PyTorch's in float32, `agreement` see `evaluation.metrics.agreement`.
    """

    bytes: int
    main_metric: float
    largest_difference: float
    agreement: float


class MeasuredOn(TypedDict):
    processor: str
    cores: int
    threads: int


class Vocabulary(TypedDict):
    """How many of the teacher's tokens the tokenizer and the word embedding hold."""

    kept: int
    total: int


class _OptionalFigures(TypedDict, total=False):
    teacher: Speed
    deployment: dict[str, Any]
    vocabulary: Vocabulary
    temperature: float
    thresholds: dict[str, float]


class ExportFigures(_OptionalFigures):
    """What an export found of its files; `files_on_dev` is by path within the folder.

    `teacher` is its speed, measured in turn with the files; `deployment` are the fields of a `Deployment`. `vocabulary` is
    absent where all tokens are kept, `temperature` where the student is not calibrated, and `thresholds` (by class name) where a
    text has one class. The weights of all files contain both.
    """

    formats: list[str]
    opset: int
    files_on_dev: dict[str, FileFigures]
    measured_on: MeasuredOn


class ExportManifest(TypedDict, total=False):
    """manifest.json. An export of a checkpoint has `step` and `dtype` in place of the figures.

    `max_length` is the number of tokens at which training truncated, `pair` says whether an example is two texts, and
    `text_columns` are the columns that they were read from. `options`, of multiple choice, are the columns that its options were
    read from, `option_lists` says whether that is one column of lists, and `gap` is the text in a question whose place an option
    takes.
    """

    format_version: int
    task: str
    main_metric: str
    pkd_dist: str
    formats: list[str]
    opset: int
    files_on_dev: dict[str, FileFigures]
    measured_on: MeasuredOn
    teacher: Speed
    deployment: dict[str, Any]
    vocabulary: Vocabulary
    temperature: float
    thresholds: dict[str, float]
    max_length: int
    pair: bool
    text_columns: list[str]
    options: list[str]
    option_lists: bool
    gap: str | None
    step: int
    dtype: str
    files: dict[str, str]
    digest: str


def write(folder: Path, about: Mapping[str, object]) -> ExportManifest:
    """Write and return the manifest of all files in a folder.

    Args:
        about: Further entries; the manifest's own `digest` covers them too.
    """
    content: dict[str, object] = {"format_version": FORMAT_VERSION, **about, "files": file_digests(folder)}
    content["digest"] = digest_of(content)
    write_json(folder / MANIFEST, content)
    return cast(ExportManifest, content)


def of_task(task: Task, max_length: int) -> ExportManifest:
    """Return the entries that say what a model was trained to read."""
    read: ExportManifest = {
        "task": task.name,
        "max_length": max_length,
        "pair": len(task.text) > 1,
        "text_columns": list(task.text),
    }
    if task.multiple_choice:
        read |= {"options": list(task.options), "option_lists": task.has_option_lists, "gap": task.gap}
    return read


def deployment_of(content: ExportManifest | ExportFigures, results: Results, metric: str) -> Deployment:
    """Return the table of the files beside the teacher.

    Exports of earlier versions hold figures on dev alone, without intervals of the files or their agreement with the
    teacher, and some without the teacher's speed in the same session: their table leaves these out.

    Args:
        metric: Key of the main metric in `METRICS`.
    """
    if "deployment" in content:
        return TypeAdapter(Deployment).validate_python(content["deployment"])
    names = [name for name in TITLES if name in content["files_on_dev"]]
    rows = [_teacher_on_dev(content, results, metric)]
    for name in names:
        rows.append(_file_on_dev(name, content["files_on_dev"][name], results, rows[0]))
    measured_on = content["measured_on"]
    return Deployment(
        metric, (results["split"],), results["n"], tuple(rows), to_deploy(names), None, measured_on["processor"]
    )


def _teacher_on_dev(content: ExportManifest | ExportFigures, results: Results, metric: str) -> ModelRow:
    side = results["teacher"]
    told = MAIN_METRIC not in side.get("undefined", ())
    low_high = side.get("accuracy_interval_95") if metric == "accuracy" else None
    return ModelRow(
        deployment.TEACHER, deployment.TEACHER_TITLE, side["parameters"], round(side["modelSize"] * 1e6),
        side["main_metric"] if told else None, (low_high[0], low_high[1]) if low_high else None, None, None, None,
        content.get("teacher"),
    )  # fmt: skip


def _file_on_dev(name: str, file: FileFigures, results: Results, teacher: ModelRow) -> ModelRow:
    told = MAIN_METRIC not in results["student"].get("undefined", ())
    score = file["main_metric"] if told else None
    kept = score / teacher.score if score is not None and teacher.score is not None and teacher.score > 0 else None
    agreement = results["compression"]["agreement"] if name == WEIGHTS_FILE else None
    speed: Speed = {
        "latency_ms_p50": file["latency_ms_p50"], "latency_ms_p99": file["latency_ms_p99"],
        "samples_per_second": file["reasoningTime"], "reasoningTime": file["reasoningTime"],
        "spread": file.get("spread", 0.0), "threads": file.get("threads", 1),
    }  # fmt: skip
    return ModelRow(
        name, TITLES[name], results["student"]["parameters"], file["bytes"], score, None, agreement, kept, None, speed
    )


def find(folder: str) -> ExportManifest:
    """Return the manifest of a model folder whose weights, configuration and tokenizer are as written; an empty one if it is
    no export.

    Raises:
        UserError: One of these files is missing or was altered, or the manifest was.
    """
    path = Path(folder)
    if not (path / MANIFEST).is_file():
        return {}
    content = read(path)
    used = {name: digest for name, digest in content["files"].items() if "/" not in name and name != "README.md"}
    if problem := changed_file(path, used):
        raise UserError(f"{problem}{_REMEDY}")
    return content


def verify(folder: Path) -> ExportManifest:
    """Return the manifest of an export after checking that it holds exactly the files that were written.

    Raises:
        UserError: A file is missing, altered or unexpected; the message names it.
    """
    content = read(folder)
    try:
        problem = changed_file(folder, content["files"])
    except (OSError, ValueError) as error:  # a name that no file can have
        problem = f"{folder / MANIFEST}: names a file that cannot be read ({error})"
    if problem:
        raise UserError(f"{problem}{_REMEDY}")
    extra = sorted(set(_all_files(folder)) - {*content["files"], MANIFEST})
    if extra:
        raise UserError(f"{folder / extra[0]}: does not belong to the export; remove it")
    return content


def read(folder: Path) -> ExportManifest:
    """Return the manifest of an export without looking at its files.

    Raises:
        UserError: It is missing or was altered.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}; give a folder that `pkd export` wrote, RUN/export")
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no {MANIFEST}; give a folder that `pkd export` wrote, RUN/export") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / MANIFEST}: cannot be read ({error}){_REMEDY}") from None
    if not isinstance(content, dict) or not isinstance(content.get("files"), dict):
        raise UserError(f"{folder / MANIFEST}: is not the manifest of an export{_REMEDY}")
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder / MANIFEST}: format version {content.get('format_version')!r} is not supported (supported: "
            f"{FORMAT_VERSION}); use the pkd_dist that wrote it"
        )
    digest = content.pop("digest", None)
    if digest != digest_of(content):
        raise UserError(f"{folder / MANIFEST}: was altered{_REMEDY}")
    return cast(ExportManifest, content)


def _all_files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
