"""The stage `cache`: runs the teacher once over the training text, and keeps its logits and hidden states on disk."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pkd_dist.distillation import cache
from pkd_dist.distillation.cache import DamagedManifestError, Fingerprint
from pkd_dist.distillation.cache_builder import CacheSpec, build
from pkd_dist.distillation.teacher import GivenAnswers, LiveTeacher
from pkd_dist.errors import UserError
from pkd_dist.files import digest_of, existing_parent, is_denied, make_folder, readable_bytes, remove_leftovers
from pkd_dist.lock import Lock
from pkd_dist.model import digests, encoder
from pkd_dist.model.regression_head import standardize
from pkd_dist.stages.base import Artifacts, Inputs, Stage
from pkd_dist.stages.context import Context
from pkd_dist.stages.data import DataOutput, open_answers, open_tokens, scale_input, training_set
from pkd_dist.stages.teacher import TeacherOutput, teacher_folders
from pkd_dist.telemetry.log import log


@dataclass(frozen=True)
class CacheOutput:
    """What the stage built.

    Attributes:
        rows: examples in the cache; 0 if the run needs none.
        built: examples that the last start of the stage added.
        bytes: size on disk.
    """

    rows: int
    built: int
    bytes: int = 0


VERSION = 1


def inputs(context: Context) -> Inputs:
    if not context.resolved.cached:
        return {"cache.needed": False}
    needed = kept_fingerprint(context)
    return {
        "cache.dir": context.resolved.config.cache.dir,
        "teacher.weights": needed.teacher,
        "teacher.tokenizer": needed.tokenizer,
        "data.tokens": needed.tokens,
        "task.max_length": needed.max_length,
        "cache.layers": list(needed.layers),
        "cache.dtype": needed.dtype,
        "cache.precision": needed.precision,
        "distill.states": needed.states,
    }


def run(context: Context) -> CacheOutput:
    run, world, folder = context.resolved, context.world, context.resolved.paths.cache
    if not run.cached:
        live = "cache.enabled is false: the teacher runs in every step"
        log.info("cache: not built (%s)", live if not run.config.cache.enabled else "no loss term needs the teacher")
        return CacheOutput(0, 0)
    name = training_set(context)
    if recomputes(context):
        log.info(
            "cache: the states of all tokens would take %s; they are not cached, the teacher computes them in every step "
            "(cache.mode)", readable_bytes(_bytes(context, len(run.kept_layers), all_tokens=True)),
        )  # fmt: skip
    spec = CacheSpec(
        folder,
        kept_fingerprint(context),
        open_tokens(context, name),
        run.tokenizer.pad_token_id,
        run.config.cache.shard_rows,
    )
    with _sole_builder(context):
        built = build(
            spec,
            lambda layers: (
                _given_answers(context, name)
                if run.has_answers
                else live_teacher(context, layers, spec.fingerprint.states == "tokens")
            ),
            world,
            context.telemetry,
        )
    size = world.on_main(lambda: sum(path.stat().st_size for path in folder.glob("*.*s*")))
    return CacheOutput(context.output(DataOutput).sets[name].examples, built, size)


@contextlib.contextmanager
def _sole_builder(context: Context) -> Iterator[None]:
    """Of several runs that share a cache, let one build it while the others wait."""
    folder, world = context.resolved.paths.cache, context.world
    locks: list[Lock] = []

    def lock() -> None:
        try:
            make_folder(folder)
            locks.append(Lock(folder).acquire(wait=True, tick=lambda: world.interrupt("cache")))
        except OSError as error:
            if not is_denied(error):
                raise
            return _require_complete(folder, str(error.strerror))
        remove_leftovers(folder)

    if context.resolved.config.cache.dir:
        world.on_main(lock)
    try:
        yield
    finally:
        for held in locks:
            held.release()


def _require_complete(folder: Path, why: str) -> None:
    """Refuse a cache that this user may read but not complete."""
    if cache.read_manifest(folder) is None:
        raise UserError(
            f"{folder} is not writable ({why}), and holds no complete cache; choose another folder, or ask its owner to "
            "let you write there", "cache.dir",
        )  # fmt: skip
    log.info("cache: %s is not writable (%s); it is used as it is", folder, why)


def missing(context: Context, output: CacheOutput) -> str | None:
    """Missing shards are rebuilt; damaged ones, and the cache of another teacher, are rejected."""
    folder = context.resolved.paths.cache
    if not context.resolved.cached:
        return None
    try:
        manifest = cache.read_manifest(folder)
    except DamagedManifestError as damaged:
        return damaged.problem
    if manifest is None:
        return f"{folder / cache.MANIFEST} is missing"
    cache.require_fingerprint(folder, manifest, kept_fingerprint(context))
    gone = [entry.file for entry in manifest.shards if not (folder / entry.file).exists()]
    for entry in manifest.shards:
        if entry.file not in gone:
            cache.require_shard(folder, entry)
    return f"{', '.join(gone)} is missing" if gone else None


def artifacts(context: Context) -> Artifacts:
    own = (context.resolved.paths.run / "cache",)  # its manifest has the checksums
    return Artifacts(own, unverified=own, resumable=True)


STAGE = Stage("cache", VERSION, CacheOutput, inputs, run, missing, artifacts, verifies=True)


# ------------------------------------------------------------------------------------------- for the stages after it


def recomputes(context: Context) -> bool:
    """Return whether the states of all tokens come from a forward pass in every step; the cache has the logits alone."""
    run = context.resolved
    if not (run.cached and run.config.distill.all_tokens and run.kept_layers):
        return False
    if run.config.cache.mode == "auto":
        allowed = run.config.cache.max_disk_share * shutil.disk_usage(existing_parent(run.paths.cache)).total
        return _bytes(context, len(run.kept_layers), all_tokens=True) > allowed
    return run.config.cache.mode == "recompute"


def cache_bytes(context: Context) -> int:
    """Return about how large the cache of a run will be."""
    layers = () if recomputes(context) else context.resolved.kept_layers
    return _bytes(context, len(layers), context.resolved.config.distill.all_tokens)


def _bytes(context: Context, layers: int, all_tokens: bool) -> int:
    run, data = context.resolved, context.output(DataOutput)
    summary = data.sets[training_set(context)]
    options = len(data.class_names) if run.task.multiple_choice else 1
    states = (summary.tokens if all_tokens else summary.examples * options) * layers * run.teacher_width
    values = states + summary.examples * max(1, len(data.class_names))
    return values * (4 if run.config.cache.dtype == "float32" else 2)


def needed_fingerprint(context: Context) -> Fingerprint:
    """Return the fingerprint of the teacher outputs that this run reads from its cache: only the layers it pairs.

    A cache that holds more layers serves it too.
    """
    run, weights, scale = context.resolved, context.output(TeacherOutput).all_weights, scale_input(context)
    tokens = run.config.distill.all_tokens and not recomputes(context)
    return Fingerprint(
        teacher=digest_of([weights, scale]) if scale else weights,  # standardized outputs are another teacher's
        tokenizer=digests.tokenizer_digest(run.source),
        tokens=context.output(DataOutput).sets[training_set(context)].input_digest,
        max_length=run.config.task.max_length,
        layers=() if recomputes(context) else run.layer_map.teacher_states,
        dtype=run.config.cache.dtype,
        precision=run.teacher_precision,
        states="tokens" if tokens else "cls",
    )


def kept_fingerprint(context: Context) -> Fingerprint:
    """Return the fingerprint of the cache that this run keeps: as `needed_fingerprint`, but with all of `cache.layers`."""
    needed = needed_fingerprint(context)
    return needed if recomputes(context) else replace(needed, layers=context.resolved.kept_layers)


def _given_answers(context: Context, name: str) -> GivenAnswers:
    run = context.resolved
    return GivenAnswers(learned_answers(context, name), run.config.cache.dtype, run.teacher_width)


def learned_answers(context: Context, name: str) -> np.ndarray:
    """Return the teacher's given answers to a token set as the student learns them, (N, C) float32."""
    scale, logits_NC = context.output(DataOutput).scale, open_answers(context)[name]
    return scale.standardize(logits_NC) if scale else logits_NC


def live_teacher(context: Context, layers: Sequence[int], all_tokens: bool, states_alone: bool = False) -> LiveTeacher:
    """Load the teachers, with the hidden states of `layers` of the first, counted from 1 (0: the embeddings).

    Args:
        states_alone: load the first alone; its logits are not those of all.
    """
    run, scale = context.resolved, context.output(DataOutput).scale
    folders = teacher_folders(context)[: 1 if states_alone else None]
    model, *others = (standardize(encoder.load_model(folder), scale) for folder in folders)
    return LiveTeacher(
        model,
        layers,
        run.here.teacher,
        run.config.cache.dtype,
        all_tokens,
        context.world.device,
        others,
    )
