"""One rank of a training that is looked at: the project's own pipeline, trainer and engine with a real student.

First some steps without a profiler, for the true times of the phases; then some under `torch.profiler`, for what the
operations inside them take and for the trace.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pkd_dist.kernels.allocator import keep_freed_blocks

keep_freed_blocks()

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile, record_function  # noqa: E402

from benchmarks.probe import with_student_job  # noqa: E402
from benchmarks.profile import groups  # noqa: E402
from benchmarks.spans import Spans  # noqa: E402
from pkd_dist.cli.launch import leave  # noqa: E402
from pkd_dist.data.batches import TrainingBatches  # noqa: E402
from pkd_dist.distillation.cache import CacheReader  # noqa: E402
from pkd_dist.distillation.objective import DistillationLoss  # noqa: E402
from pkd_dist.distributed.world import World  # noqa: E402
from pkd_dist.files import write_json  # noqa: E402
from pkd_dist.telemetry import Telemetry  # noqa: E402
from pkd_dist.training.engine import resolve_precision  # noqa: E402
from pkd_dist.training.graph_step import GraphUpdate  # noqa: E402
from pkd_dist.training.job import Job  # noqa: E402
from pkd_dist.training.trainer import Trainer, open_trainer  # noqa: E402

PHASES: dict[str, tuple[tuple[type | None, str], ...]] = {
    "step": ((Trainer, "train_step"),),
    "data": ((TrainingBatches, "step"), (CacheReader, "rows_of")),
    "loss": ((DistillationLoss, "__call__"),),
    "forward": ((None, "__call__"),),
    "backward": ((None, "backward"), (None, "end_micro_batch")),
    "engine step": ((None, "step"),),
    "whole step": ((GraphUpdate, "__call__"),),
}
"""Phase -> the methods (None: of the engine) whose time it is, without that of the phases they call. What is left of a step is `rest`:
metrics, records, and the agreement of the ranks."""
WARMUP = {"cpu": 5, "cuda": 300}
"""Steps before the first that counts; a GPU's graphs are made in them, one for each length."""


def look_at(job: Job, world: World, telemetry: Telemetry, steps: int, trace: Path) -> dict[str, Any]:
    """Trains 2 x `steps` steps; returns this rank's table."""
    spans = Spans()
    trainer = open_trainer(job, world, telemetry)
    trainer.engine.train()
    with contextlib.ExitStack() as stack:
        for phase, methods in PHASES.items():
            for owner, name in methods:
                kind = owner or type(trainer.engine)
                stack.enter_context(patch.object(kind, name, spans.wrapped(getattr(kind, name), phase)))

        def do(count: int) -> None:
            for _ in range(count):
                trainer.train_step()

        do(WARMUP[world.device.type])
        _wait(world)
        spans.clear()
        begin, tokens = time.perf_counter(), trainer.progress.tokens
        do(steps)
        _wait(world)
        wall = time.perf_counter() - begin
        phases, tokens = spans.finished(), trainer.progress.tokens - tokens

        cuda = world.device.type == "cuda"
        spans.mark = record_function
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities, acc_events=True) as profiler:
            begin = time.perf_counter()
            do(steps)
            _wait(world)
            profiled = time.perf_counter() - begin
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    phases["rest"] = phases.pop("step")
    return {
        "device": torch.cuda.get_device_name(world.device) if cuda else "cpu",
        "ranks": world.size, "threads": torch.get_num_threads(), "steps": steps, "precision": resolve_precision(job.deepspeed, world.device)[1],
        "batch_size": job.settings.batch_size, "tokens_per_step": tokens / steps,
        "step_seconds": wall / steps, "profiled_step_seconds": profiled / steps,
        "phase_seconds": {phase: seconds / steps for phase, seconds in phases.items()},
        **_tables(profiler, profiled, steps, cuda),
    }  # fmt: skip


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _tables(profiler: Any, seconds: float, steps: int, cuda: bool) -> dict[str, Any]:
    """Seconds of a profiled step by group and by (phase, group), and the operations that take most."""
    by_group = dict.fromkeys(groups.GROUPS, 0.0)
    by_phase: dict[str, dict[str, float]] = {}
    by_name: dict[str, list[float]] = {}
    on_device = 0.0
    for event in profiler.events():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if event.name in PHASES or (is_kernel and getattr(event, "is_user_annotation", False)):
            continue
        if cuda != is_kernel:
            continue  # on a GPU what it does counts, and the host is seen in its idleness
        own = (event.device_time_total if is_kernel else event.self_cpu_time_total) / 1e6 / steps
        parents = _parents(event)
        phase = next((name for name in parents if name in PHASES), "backward")
        group = groups.of_kernel(event.name) if is_kernel else groups.of_operation(event.name, parents, phase)
        by_group[group] += own
        inside = by_phase.setdefault("rest" if phase == "step" else phase, {})
        inside[group] = inside.get(group, 0.0) + own
        known = by_name.setdefault(event.name, [0.0, 0.0])
        known[0] += own
        known[1] += 1 / steps
        on_device += own
    by_group[groups.IDLE if cuda else groups.HOST] = max(0.0, seconds / steps - on_device)
    most = sorted(by_name.items(), key=lambda item: -item[1][0])[:20]
    return {
        "group_seconds": by_group,
        "phase_group_seconds": {} if cuda else by_phase,
        "operations": [{"name": n[:120], "seconds": s, "calls": c, "group": _group_of(n, cuda)} for n, (s, c) in most],
        "operations_per_step": sum(c for _, c in by_name.values()),
    }


def _group_of(name: str, cuda: bool) -> str:
    return groups.of_kernel(name) if cuda else groups.of_operation(name, (), "")


def _parents(event: Any) -> list[str]:
    names, parent = [], event.cpu_parent
    while parent is not None:
        names.append(parent.name)
        parent = parent.cpu_parent
    return names


def main() -> None:
    given = json.loads(sys.argv[1])
    output = Path(given["output"])

    def use(job: Job, world: World, telemetry: Telemetry) -> None:
        trace = Path(given["trace"].format(rank=world.rank))
        found = look_at(job, world, telemetry, given["steps"], trace)
        if world.main:
            write_json(output, found | {"peak_flops_per_second": _peaks(world)})
        world.barrier()

    with_student_job(given["config"], given["overrides"], use)
    leave(0)


def _peaks(world: World) -> dict[str, float]:
    """FLOP/s of matrix products on this rank's threads, or its GPU."""
    from benchmarks.peers.flops import peak

    return {name: peak(getattr(torch, name), world.device) for name in ("float32", "bfloat16")}


if __name__ == "__main__":
    main()
