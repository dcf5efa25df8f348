"""The stage `cache`: runs the teacher once over the training text, and keeps its logits and hidden states on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from pkd_dist.distillation import cache
from pkd_dist.distillation.cache import Fingerprint
from pkd_dist.distillation.cache_builder import CacheSpec, build
from pkd_dist.distillation.teacher import LiveTeacher
from pkd_dist.files import make_folder, remove_leftovers
from pkd_dist.lock import Lock
from pkd_dist.model import encoder
from pkd_dist.stages.base import Artifacts, Inputs, Stage
from pkd_dist.stages.context import Context
from pkd_dist.stages.data import DataOutput, open_tokens, training_set
from pkd_dist.stages.teacher import TeacherOutput, teacher_folder
from pkd_dist.telemetry.log import log


@dataclass(frozen=True)
class CacheOutput:
    """Attributes:
    rows: examples in the cache; 0 where the run needs none.
    built: rows computed by the last start.
    bytes: on disk.
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
        log.info("cache: not built (%s)", live if not run.config.cache.enabled else "alpha and beta are 0")
        return CacheOutput(0, 0)
    name = training_set(context)
    spec = CacheSpec(
        folder,
        kept_fingerprint(context),
        open_tokens(context, name),
        run.tokenizer.pad_token_id,
        run.config.cache.shard_rows,
    )
    with _sole_builder(context):
        built = build(spec, lambda layers: live_teacher(context, layers), world, context.telemetry)
    size = world.on_main(lambda: sum(path.stat().st_size for path in folder.glob("*.*s*")))
    return CacheOutput(context.output(DataOutput).sets[name].examples, built, size)


@contextlib.contextmanager
def _sole_builder(context: Context) -> Iterator[None]:
    """Of several runs that share a cache, let one build it while the others wait."""
    folder, world = context.resolved.paths.cache, context.world
    locks: list[Lock] = []

    def lock() -> None:
        make_folder(folder)
        locks.append(Lock(folder).acquire(wait=True, tick=lambda: world.interrupt("cache")))
        remove_leftovers(folder)

    if context.resolved.config.cache.dir:
        world.on_main(lock)
    try:
        yield
    finally:
        for held in locks:
            held.release()


def missing(context: Context, output: CacheOutput) -> str | None:
    """Missing shards are rebuilt; damaged ones, and the cache of another teacher, are rejected."""
    folder = context.resolved.paths.cache
    if not context.resolved.cached:
        return None
    manifest = cache.read_manifest(folder)
    if manifest is None:
        return f"{folder / cache.MANIFEST} is missing"
    cache.require_fingerprint(folder, manifest, kept_fingerprint(context))
    gone = [entry.file for entry in manifest.shards if not (folder / entry.file).exists()]
    for entry in manifest.shards:
        if entry.file not in gone:
            cache.require_shard(folder, entry)
    return f"{', '.join(gone)} is missing" if gone else None


def artifacts(context: Context) -> Artifacts:
    return Artifacts((context.resolved.paths.run / "cache",), resumable=True)


STAGE = Stage("cache", VERSION, CacheOutput, inputs, run, missing, artifacts)


# ------------------------------------------------------------------------------------------- for the stages after it


def needed_fingerprint(context: Context) -> Fingerprint:
    """Return the identity of the teacher outputs that this run needs."""
    run = context.resolved
    return Fingerprint(
        teacher=context.output(TeacherOutput).weights,
        tokenizer=encoder.tokenizer_digest(run.source),
        tokens=context.output(DataOutput).sets[training_set(context)].input_digest,
        max_length=run.config.task.max_length,
        layers=tuple(teacher_layer for _, teacher_layer in run.pairs),
        dtype=run.config.cache.dtype,
        precision=run.teacher_precision,
        states=run.config.distill.states,
    )


def kept_fingerprint(context: Context) -> Fingerprint:
    """Return the same for a cache that is built now, which may hold more layers."""
    return replace(needed_fingerprint(context), layers=context.resolved.kept_layers)


def live_teacher(context: Context, layers: Sequence[int]) -> LiveTeacher:
    """Load the teacher with the hidden states of `layers`, counted from 1."""
    run = context.resolved
    return LiveTeacher(
        encoder.load_model(teacher_folder(context)),
        layers,
        run.teacher_precision,
        run.config.cache.dtype,
        run.config.distill.states == "tokens",
        context.world.device,
    )
