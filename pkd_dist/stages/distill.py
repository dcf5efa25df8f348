"""The stage `distill`: trains the student on labels and the teacher's outputs, and keeps its best epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from pkd_dist.data.examples import is_labelled
from pkd_dist.data.tokens import TokenSet
from pkd_dist.distillation import cache
from pkd_dist.distillation.cache import CacheReader
from pkd_dist.distillation.confidence import confident_rows
from pkd_dist.distillation.objective import (
    AddTeacherOutputs,
    DistillationLoss,
    RecomputedStates,
    cached_outputs,
    live_outputs,
)
from pkd_dist.distillation.teacher import DTYPES, require_finite
from pkd_dist.errors import UserError
from pkd_dist.evaluation.metrics import labelled_by
from pkd_dist.evaluation.scoring import predict_logits
from pkd_dist.files import sha256
from pkd_dist.model import student
from pkd_dist.model.attention import TeacherAttention, teacher_attention
from pkd_dist.model.encoder import load_model
from pkd_dist.stages.base import Artifacts, Inputs, Markers, SpoiledError, Stage, absent
from pkd_dist.stages.cache import learned_answers, live_teacher, needed_fingerprint, recomputes
from pkd_dist.stages.context import Context
from pkd_dist.stages.data import (
    DataOutput,
    open_class_weights,
    open_student_tokens,
    open_tokens,
    positive_input,
    scale_input,
    scored_task,
    student_vocabulary,
    training_set,
    with_learned_targets,
)
from pkd_dist.stages.init import InitOutput
from pkd_dist.stages.progress import EpochScores, republish_training
from pkd_dist.stages.teacher import teacher_folder
from pkd_dist.stages.translation import translate
from pkd_dist.telemetry import trackers
from pkd_dist.telemetry.log import log
from pkd_dist.training.job import Job
from pkd_dist.training.trainer import train


@dataclass(frozen=True)
class DistillOutput:
    """The finished training of the student.

    Attributes:
        best_file: weights of the best epoch, in RUN/checkpoints.
        weights: their sha256.
        best_metric: the task's main metric on dev.
        history: scores on dev after each evaluated epoch.
        steps, samples, tokens: of the whole training, over all ranks.
    """

    best_file: str
    best_epoch: int
    best_metric: float
    history: tuple[EpochScores, ...]
    weights: str
    steps: int
    samples: int
    tokens: int


@dataclass(frozen=True)
class TeacherDev:
    """What the teacher answers on dev: (N, C) float32, as a cache would hold it. Trainings with the same teacher share it."""

    logits_NC: np.ndarray


VERSION = 1
_TRAIN_KEYS = {
    "epochs", "patience_epochs", "batch_size", "learning_rate", "schedule", "decay_ratio", "weight_decay", "warmup_ratio",
}  # fmt: skip
"""Of the section `train`: the others do not change the outcome, or are among `training_inputs`."""


def inputs(context: Context) -> Inputs:
    run, config, data = context.resolved, context.resolved.config, context.output(DataOutput)
    augment = config.task.augment
    return {
        **{f"distill.{key}": value for key, value in config.distill.model_dump().items()},
        **{f"train.{key}": value for key, value in config.train.model_dump(include=_TRAIN_KEYS).items()},
        **run.training_inputs(),
        **positive_input(context),
        **scale_input(context),
        "student.dropout": config.student.dropout,
        "evaluate.every_epochs": config.evaluate.every_epochs,
        "evaluate.best_by": config.evaluate.best_by,
        "cache.enabled": config.cache.enabled,
        "init.weights": context.output(InitOutput).weights,
        "cache.fingerprint": needed_fingerprint(context).digest,
        "data.training": data.for_student[training_set(context)].digest,
        "data.dev": data.for_student["dev"].digest,
        **({"task.augment.min_confidence": augment.min_confidence} if augment else {}),
    }


def extendable(inputs: Inputs) -> frozenset[str]:
    """See `Stage`. The last epoch is always evaluated, so a longer training must evaluate it too."""
    if inputs["train.schedule"] == "linear":
        return frozenset()
    epochs, every = cast(int, inputs["train.epochs"]), cast(int, inputs["evaluate.every_epochs"])
    return frozenset() if epochs % every else frozenset({"train.epochs"})


def run(context: Context) -> DistillOutput:
    progress = train(lambda: training_job(context), context.world, context.telemetry)
    _require_cache_unaltered(context)
    assert progress.best_file is not None and progress.best_sha256 is not None
    return DistillOutput(
        best_file=progress.best_file,
        best_epoch=progress.best_epoch,
        best_metric=progress.best_metric,
        history=tuple(progress.history),
        weights=progress.best_sha256,
        steps=progress.step,
        samples=progress.samples,
        tokens=progress.tokens,
    )


def training_job(context: Context) -> Job:
    """Return the student's training, with its model and the teacher's outputs opened; collective."""
    run, config, paths = context.resolved, context.resolved.config, context.resolved.paths
    module = student.open_student(
        paths.student_init,
        config.student.dropout,
        config.distill.projection if run.layer_map.pairs and config.distill.beta else "never",
        run.teacher_width,
        config.run.seed,
        student_vocabulary(context),
        config.distill.compares_tokens,
    )
    reader = _open_cache(context) if run.cached else None
    teacher_dev_NC, dev = _teacher_dev(context), open_student_tokens(context, "dev")
    if not run.task.has_labels:
        assert teacher_dev_NC is not None, "distill.alpha is 1"
        dev = labelled_by(teacher_dev_NC, dev)
    return Job(
        name="distill",
        module=module,
        losses=DistillationLoss(
            config.distill, run.layer_map, open_class_weights(context), _teacher_attention(context)
        ),
        teacher_outputs=_teacher_outputs(context, reader),
        teacher_dev_NC=teacher_dev_NC,
        train=_training_tokens(context, reader),
        dev=dev,
        task=scored_task(context),
        pad_id=run.student_tokenizer.pad_token_id,
        seed=config.run.seed,
        settings=config.train,
        evaluate=config.evaluate,
        checkpoint=config.checkpoint,
        deepspeed=run.deepspeed,
        folder=paths.checkpoints,
        records=paths.records,
        fingerprint=context.fingerprint,
    )


def _own_shards(context: Context) -> Sequence[int]:
    """Return the cache's shards that this rank verifies."""
    if not context.resolved.cached:
        return ()
    manifest = context.world.on_main(lambda: cache.read_manifest(context.resolved.paths.cache))
    return range(context.world.rank, len(manifest.shards) if manifest else 0, context.world.size)


def _open_cache(context: Context) -> CacheReader:
    folder, fingerprint, shards = context.resolved.paths.cache, needed_fingerprint(context), _own_shards(context)
    return context.world.together(lambda: CacheReader(folder, fingerprint, shards))


def _teacher_outputs(context: Context, reader: CacheReader | None) -> AddTeacherOutputs | None:
    run = context.resolved
    if not run.needs_teacher:
        return None
    if reader and not recomputes(context):
        return cached_outputs(reader)
    teacher = live_teacher(
        context, run.layer_map.teacher_states, run.config.distill.all_tokens, states_alone=reader is not None
    )
    return RecomputedStates(reader, teacher) if reader else live_outputs(teacher)


def _training_tokens(context: Context, reader: CacheReader | None) -> TokenSet:
    """Open the training set, without the unlabeled texts that the teacher is not sure of; collective."""
    augment = context.resolved.config.task.augment
    tokens = with_learned_targets(context, open_student_tokens(context, training_set(context)))
    if reader is None or augment is None or not augment.min_confidence:
        return tokens
    minimum = augment.min_confidence
    rows = context.world.on_main(lambda: confident_rows(tokens, reader, minimum))
    unlabelled = len(tokens) - int(is_labelled(np.asarray(tokens.labels_N)).sum())
    log.info(
        "distill: %d of %d unlabeled texts are left out: no class has a probability of %g or more for the teacher "
        "(task.augment.min_confidence)", len(tokens) - len(rows), unlabelled, minimum,
    )  # fmt: skip
    return tokens.subset(rows)


def _teacher_dev(context: Context) -> np.ndarray | None:
    """Return the teacher's (N, C) logits on dev, as a cache would hold them; None if the loss has no teacher; collective."""
    run = context.resolved
    if not run.needs_teacher:
        return None
    if found := context.known(TeacherDev):
        return found.logits_NC
    if run.has_answers:
        return torch.from_numpy(learned_answers(context, "dev")).to(DTYPES[run.config.cache.dtype]).float().numpy()
    context.world.at("distill, the teacher on dev", loop=False)
    teacher = live_teacher(context, (), all_tokens=False)
    logits_NC = predict_logits(
        lambda inputs: teacher.unchecked(inputs)[0], open_tokens(context, "dev"), context.world,
        run.config.evaluate.batch_size, run.tokenizer.pad_token_id,
    )  # fmt: skip
    logits = torch.from_numpy(logits_NC)
    context.world.on_main(lambda: require_finite(logits, logits) and None)
    context.hand_on(TeacherDev(logits_NC))
    return logits_NC


def _teacher_attention(context: Context) -> TeacherAttention | None:
    run, world = context.resolved, context.world
    layers = [teacher_layer for _, teacher_layer in run.layer_map.attention]
    if not layers:
        return None
    return teacher_attention(load_model(teacher_folder(context)), layers, DTYPES[run.here.teacher], world.device)


def _require_cache_unaltered(context: Context) -> None:
    """The cache was read through a memory map throughout: if it was altered meanwhile, the training does not count."""
    if not context.resolved.cached:
        return
    context.world.at("distill, checksums of the cache", loop=False)
    try:
        _open_cache(context)
    except UserError as problem:
        folder = context.resolved.paths.cache
        raise SpoiledError(problem, f"the cache was altered during the training ({folder})") from None


def missing(context: Context, output: DistillOutput) -> str | None:
    best = best_weights(context, output)
    if _is_pruned(context, best):
        return None
    return absent(best) or (f"{best} was altered" if sha256(best) != output.weights else None)


def _is_pruned(context: Context, best: Path) -> bool:
    """Whether the export, once verified, removed the weights."""
    paths = context.resolved.paths
    if not context.resolved.config.export.prune or best.exists():
        return False
    export = Markers(paths.run, translate).read("export")
    return export.done if export else paths.export.exists()


def artifacts(context: Context) -> Artifacts:
    paths = context.resolved.paths
    unverified = (paths.checkpoints, *trackers.folders(paths.run))  # checkpoints have checksums of their own
    return Artifacts((*unverified, paths.records), unverified=unverified, records=(paths.records,), fingerprinted=True)


def republish(context: Context, output: DistillOutput) -> None:
    paths = context.resolved.paths
    republish_training(context, "distill", paths.records, paths.checkpoints, output.history)


STAGE = Stage(
    "distill", VERSION, DistillOutput, inputs, run, missing, artifacts,
    verifies=True, republish=republish, extendable=extendable,
)  # fmt: skip


# ------------------------------------------------------------------------------------------- for the stages after it


def best_weights(context: Context, output: DistillOutput) -> Path:
    return context.resolved.paths.checkpoints / output.best_file


def length_input(context: Context) -> Inputs:
    """Return the input of stages that tell of the training: one that was extended may keep its best epoch."""
    training = context.output(DistillOutput)
    return {"distill.steps": training.steps} if context.resolved.config.train.schedule != "linear" else {}


def require_weights(context: Context, reason: str) -> None:
    """Raise UserError where the student's weights were pruned, so nothing can be made of them again."""
    best = best_weights(context, context.output(DistillOutput))
    if not best.exists():
        raise UserError(
            f"{best}: was removed (export.prune), so nothing can be made from it again, though {reason}; "
            f"{context.resolved.paths.export} is left as it is; restore what was changed, or choose another run.dir"
        )
