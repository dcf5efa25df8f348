"""The disk space that the stages of a run need: said, and required, before anything large is computed.

It is estimated when the data is known, from the sizes of the models, the rows of the cache and the settings. What exists already is
subtracted; stages that are done need nothing.
"""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pkd_dist.config.schema import Train
from pkd_dist.data.batches import steps_per_epoch
from pkd_dist.errors import UserError
from pkd_dist.export.build import needed_bytes
from pkd_dist.files import existing_parent, readable_bytes, size_of
from pkd_dist.model import encoder, student
from pkd_dist.stages.base import Markers
from pkd_dist.stages.cache import cache_bytes
from pkd_dist.stages.context import Context
from pkd_dist.stages.data import DataOutput, student_vocabulary, teacher_vocabulary, training_set
from pkd_dist.telemetry.log import log

_FLOAT32, _TRAINED_COPIES, _BEST_FILES = 4, 3, 2
"""Bytes of a weight; the weight and Adam's moments in a checkpoint; best weights at a time."""


@dataclass(frozen=True)
class Need:
    """The bytes of one stage: those that stay, and those in use until it is done; `folders` are where they are."""

    stage: str
    lasting: int
    temporary: int
    folders: tuple[Path, ...]


def require(context: Context, markers: Markers, names: Sequence[str]) -> None:
    """Say how much disk the stages `names` need.

    Raises:
        UserError: less is free.
    """
    needs = [need for need in _needs(context) if need.stage in names and not _is_done(markers, need.stage)]
    disks: dict[int, list[Need]] = {}
    for need in needs:
        disks.setdefault(existing_parent(need.folders[0]).stat().st_dev, []).append(need)
    for here in disks.values():
        folder = here[0].folders[0].parent if here[0].stage != "cache" else here[0].folders[0]
        lasting = peak = 0
        for need in here:
            present = sum(map(size_of, need.folders))
            peak = max(peak, lasting + need.lasting + need.temporary - present)
            lasting += max(0, need.lasting - present)
        free = shutil.disk_usage(existing_parent(folder)).free
        most = max(here, key=lambda need: need.lasting + need.temporary)
        remedy = (
            ", or set cache.mode=recompute"
            if most.stage == "cache" and context.resolved.config.distill.all_tokens
            else ""
        )
        if free < peak:
            raise UserError(
                f"{folder}: no space left for the run: it needs about {peak:,} bytes, {free:,} are free; free some space and "
                f"rerun the same command, or choose a folder on another disk{remedy} (most is for the stage {most.stage})"
            )
        if peak > 0:
            log.info("%s: needs about %s of disk, %s are free", folder, readable_bytes(peak), readable_bytes(free))


def _is_done(markers: Markers, name: str) -> bool:
    with contextlib.suppress(UserError):  # a damaged marker: the stage will say so
        marker = markers.read(name)
        return marker is not None and marker.done
    return False


def _needs(context: Context) -> Iterator[Need]:
    """Yield the needs of the stages that write much, in order."""
    run, paths, data = context.resolved, context.resolved.paths, context.output(DataOutput)
    config = run.config
    classes = max(1, len(data.class_names))
    shapes = [copy.deepcopy(teacher.source_config) for teacher in run.teachers]
    for shape in shapes:
        shape.num_labels = classes
    if settings := config.teacher.finetune:
        used = len(teacher_vocabulary(context))
        train = config.train.model_copy(
            update={"epochs": settings.epochs, "batch_size": settings.batch_size, "schedule": "linear"}
        )
        sizes = [encoder.planned_sizes(shape, used) for shape in shapes]
        lasting = _FLOAT32 * sum(weights for weights, _ in sizes)
        temporary = sum(_training(context, train, "train", *size) for size in sizes)
        folders = [folder for teacher in run.teachers for folder in (teacher.folder, teacher.checkpoints)]
        yield Need("teacher", lasting, temporary, tuple(folders))
    if run.cached:
        yield Need("cache", cache_bytes(context), 0, (paths.cache,))
    used = len(student_vocabulary(context))
    weights, trained = encoder.planned_sizes(student.planned_config(config.student, shapes[0]), used)
    yield Need("init", _FLOAT32 * weights, 0, (paths.student_init,))
    distill = _training(context, config.train, training_set(context), weights, trained)
    yield Need("distill", distill, 0, (paths.checkpoints,))
    yield Need("export", needed_bytes(_FLOAT32 * weights, config.export.formats), 0, (paths.export,))


def _training(context: Context, settings: Train, split: str, weights: int, trained: int) -> int:
    """Return the bytes of the checkpoints and best weights that a training keeps at a time."""
    checkpoint, examples = context.resolved.config.checkpoint, context.output(DataOutput).sets[split].examples
    steps = settings.epochs * steps_per_epoch(examples, settings.batch_size)
    kept = checkpoint.keep + (settings.schedule == "warmup_stable_decay")  # that before the decay
    checkpoints = min(kept + 1, settings.epochs + steps // checkpoint.every_steps)  # one more while it is written
    return _FLOAT32 * (checkpoints * _TRAINED_COPIES * trained + min(_BEST_FILES, settings.epochs) * weights)
