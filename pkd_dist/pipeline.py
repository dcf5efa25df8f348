"""Plans and runs the stages of a run, each resumable.

    data -> teacher -> cache -> init -> distill -> evaluate -> export -> report

Each stage's module names its inputs and outputs; `stages.base` decides whether a stage is done.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from pkd_dist import __version__, disk_space
from pkd_dist.config.schema import Config
from pkd_dist.distributed.world import World
from pkd_dist.errors import DivergedError, Preempted, UserError
from pkd_dist.stages import data, run_folder
from pkd_dist.stages.base import NAMES, Markers, SpoiledError, Stage, State, inputs_of
from pkd_dist.stages.context import Context, Resolved, resolve, with_fingerprint
from pkd_dist.stages.translation import translate
from pkd_dist.telemetry import Telemetry, trackers
from pkd_dist.telemetry.endpoint import Access, load_access
from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.metrics import RunMetrics
from pkd_dist.telemetry.publish import Publisher, publishing
from pkd_dist.training.engine import load_in_background, needs_deepspeed

STAGES: tuple[Stage[Any], ...] = tuple(import_module(f"pkd_dist.stages.{name}").STAGE for name in NAMES)
VERSIONS = {stage.name: stage.version for stage in STAGES}


def plan(
    config: Config, config_file: str | Path | None, world: World, names: Sequence[str] = NAMES, fresh: bool = False
) -> list[str]:
    """Return a line for each stage of `names`: done, or why it would run. Writes nothing; raises UserError as `run`."""
    resolved = resolve(config, config_file, world.device, fresh=fresh)
    if config.metrics.enabled and world.node_main:
        load_access(config.metrics)
    world.on_main(lambda: run_folder.require_writable(resolved))
    context = Context(resolved, world, Telemetry(RunMetrics(), show=False), VERSIONS)
    markers = Markers(resolved.paths.run, translate)
    _require_data(context, markers, names, fresh)
    lines: list[str] = []
    first = ""
    for stage in STAGES[: NAMES.index(names[-1]) + 1]:
        if first:  # later stages depend on what it makes
            done, reason = not fresh and markers.done(stage.name), "it has not run"
            line = f"may run, after {first}"
        else:
            state, reason = (State.NEW, "--fresh starts over") if fresh else markers.state(stage, context)
            done = state is State.DONE
            does = "continues" if state is State.EXTENDED else "runs"
            line = "done" if done else f"{does}, because {reason}"
            if done:
                context.hand_on(markers.output(stage))
        first = first or ("" if done else stage.name)
        if stage.name in names:
            if not done:
                resolved.require_trainable(stage.name, world.device)
            lines.append(f"{stage.name}: {line}")
        elif not done:
            raise UserError(f"the stage {stage.name} is needed first, but {reason}; add it to --stages")
    return lines


def run(
    config: Config,
    config_file: str | Path | None,
    world: World,
    names: Sequence[str] = NAMES,
    fresh: bool = False,
    base: Context | None = None,
) -> Context:
    """Run the stages that are not done; collective.

    Args:
        config_file: for messages.
        names: the stages to run; those before them must be done.
        fresh: start over; an existing run folder is renamed first.
        base: another run, whose outputs stand for those of the stages before `names`.

    Returns:
        The context, with the outputs of all stages up to the last of `names`.

    Raises:
        UserError, DivergedError, Preempted, LostRank: see `errors.py`.
    """
    resolved = resolve(config, config_file, world.device, base.resolved.paths.data if base else None, fresh)
    access = load_access(config.metrics) if config.metrics.enabled and world.node_main else Access()
    planned = Context(resolved, world, Telemetry(RunMetrics(), show=False), VERSIONS)
    markers = Markers(resolved.paths.run, translate)
    for name in (each for each in names if fresh or not markers.done(each)):
        resolved.require_trainable(name, world.device)
    _require_data(planned, markers, names, fresh)
    with run_folder.opened(resolved, world, [stage.artifacts(planned) for stage in STAGES], fresh):
        if (
            world.device.type == "cuda"
            and needs_deepspeed(resolved.deepspeed, world.size)
            and {"teacher", "distill"} & set(names)
        ):
            load_in_background()
        torch.set_float32_matmul_precision("highest")  # float32 means float32, on a GPU too
        log.info(
            "%d rank(s) started by %s on %s; training in %s%s", world.size, world.launcher, world.device.type,
            resolved.here.training, "" if resolved.has_answers else f", the teacher in {resolved.here.teacher}",
        )  # fmt: skip
        if resolved.here != (resolved.precision, resolved.teacher_precision):
            log.warning(
                "the run began, or its cache was made, on another kind of host: training in %s, the teacher in %s; what is done is "
                "kept, and the rest is computed as this host does it, so that the bytes are not those of one host alone",
                resolved.precision, resolved.teacher_precision,
            )  # fmt: skip
        with _telemetry(resolved, world, access) as (telemetry, publisher):
            context = Context(resolved, world, telemetry, VERSIONS)
            world.on_main(markers.upgrade)
            if base:
                context.adopt(base)
                world.on_main(lambda: disk_space.require(context, markers, names))
            for stage in STAGES[NAMES.index(names[0]) if base else 0 : NAMES.index(names[-1]) + 1]:
                _run_stage(stage, context, markers, stage.name in names)
                if stage.name == "data":
                    world.on_main(lambda: disk_space.require(context, markers, names))
                if publisher:
                    publisher.push()
    return context


def _require_data(context: Context, markers: Markers, names: Sequence[str], fresh: bool) -> None:
    """Check data that the stage `data` will split, before anything is written; collective."""
    stage = STAGES[0]
    if stage.name in names:
        context.world.on_main(
            lambda: data.require_usable(context, lambda: not fresh and markers.state(stage, context)[0] is State.DONE)
        )


def _run_stage(stage: Stage[Any], context: Context, markers: Markers, selected: bool) -> None:
    world = context.world
    world.at(stage.name, loop=False)
    context.telemetry.metrics.stage_name = stage.name
    world.stop_here(f"before the stage {stage.name}")
    state, reason = world.on_main(lambda: markers.state(stage, context))
    if state is State.DONE:
        output = world.on_main(lambda: markers.output(stage))
        world.on_main(lambda: markers.settle(stage, context))
        context.hand_on(output)
        world.together(lambda: stage.republish(context, output))
        if selected:
            log.info("%s: done", stage.name)
        return
    if not selected:
        raise UserError(f"the stage {stage.name} is needed first, but {reason}; add it to --stages")
    world.on_main(lambda: stage.require_rerunnable(context, reason))
    plain = {State.NEW: "runs", State.STARTED: "resumes", State.EXTENDED: f"continues, because {reason}"}
    what = plain.get(state, f"runs again, because {reason}")
    log.info("%s: %s", stage.name, what)
    inputs = world.on_main(lambda: inputs_of(stage, context))
    marker = world.on_main(lambda: markers.begin(stage, context, state, inputs))
    began = time.monotonic()
    output = _outcome(stage, with_fingerprint(context, marker.fingerprint), markers)
    context.hand_on(output)
    seconds = time.monotonic() - began
    world.on_main(lambda: markers.end(stage, context, output, seconds))
    log.info("%s: done in %.1f s", stage.name, seconds)


def _outcome(stage: Stage[Any], context: Context, markers: Markers) -> Any:
    """Return what a stage hands on; where it is stopped or spoiled, the marker says so."""
    running = context.telemetry.metrics.stage.labels(stage=stage.name)
    running.set(1)
    began = time.monotonic()
    try:
        return context.world.broadcast(stage.run(context))
    except Preempted:
        if context.world.main:
            with contextlib.suppress(UserError):  # a full disk: the count is not worth another error
                markers.stop(stage.name, time.monotonic() - began)
        raise
    except SpoiledError as spoiled:
        reason = spoiled.reason
        context.world.on_main(lambda: markers.spoil(stage.name, reason))
        raise
    finally:
        running.set(0)


@contextlib.contextmanager
def _telemetry(run: Resolved, world: World, access: Access) -> Iterator[tuple[Telemetry, Publisher | None]]:
    """Make the run's metrics, and publish them for the block; collective."""
    folder, config = run.paths.run, run.config
    node, nodes = _node(world)
    counters = folder / "counters" / f"node-{node}.json" if node is not None and config.metrics.enabled else None
    metrics = RunMetrics(counters)
    metrics.info.labels(
        __version__, str(folder.absolute()), run.task.name, socket.gethostname(), str(world.size), run.here.training,
        os.environ.get("SLURM_JOB_ID", ""),
    ).set(1)  # fmt: skip
    for name in NAMES:
        metrics.stage.labels(stage=name).set(0)
    if world.device.type == "cuda":
        metrics.watch_gpu(world.device)
    also = trackers.Trackers(folder, config.trackers, config.model_dump(mode="json"))
    with contextlib.ExitStack() as stack:
        publisher = world.together(
            lambda: stack.enter_context(publishing(metrics, config.metrics, access, folder, node, nodes))
        )
        try:
            yield Telemetry(metrics, world.main, also), publisher
        except (Preempted, DivergedError) as end:
            (metrics.preemptions if isinstance(end, Preempted) else metrics.nonfinite).inc()
            raise


def _node(world: World) -> tuple[int | None, int]:
    """Return the number of this node on its first rank, None on the others, and how many nodes there are; collective."""
    first_ranks = [rank for rank, first in enumerate(world.gather(world.node_main)) if first]
    return first_ranks.index(world.rank) if world.node_main else None, len(first_ranks)
