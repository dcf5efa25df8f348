"""One rank of a profiled training: the project's own pipeline, trainer and engine with a real student.

First some steps without a profiler, for the true times of the phases; then some under `torch.profiler`, for the times of
the operations and for the trace.
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

from benchmarks.peers.flops import peaks  # noqa: E402
from benchmarks.probe import Steps, with_student_job  # noqa: E402
from benchmarks.profile import groups  # noqa: E402
from benchmarks.spans import Spans  # noqa: E402
from pkd_dist.cli.launch import leave  # noqa: E402
from pkd_dist.data.batches import TrainingBatches  # noqa: E402
from pkd_dist.distillation.cache import CacheReader  # noqa: E402
from pkd_dist.distillation.objective import DistillationLoss  # noqa: E402
from pkd_dist.distributed.world import World  # noqa: E402
from pkd_dist.files import write_json  # noqa: E402
from pkd_dist.telemetry import Telemetry  # noqa: E402
from pkd_dist.training.engine import Engine  # noqa: E402
from pkd_dist.training.graph_step import GraphStep  # noqa: E402
from pkd_dist.training.trainer import Job, Trainer  # noqa: E402

PHASES: dict[str, tuple[tuple[type, str], ...]] = {
    "step": ((Trainer, "_step"),),
    "data": ((TrainingBatches, "step"), (CacheReader, "rows_of")),
    "loss": ((DistillationLoss, "__call__"),),
    "forward": ((Engine, "__call__"),),
    "backward": ((Engine, "backward"), (Engine, "micro_step")),
    "engine step": ((Engine, "step"),),
    "whole step": ((GraphStep, "__call__"),),
}
"""Phase -> the functions whose time it is, without the phases they call. The remainder of a step is `rest`: metrics,
records, and the agreement of the ranks."""
WARMUP = {"cpu": 5, "cuda": 300}
"""Steps before the first that counts. On a GPU they capture the graphs, one for each length."""


def profiled(job: Job, world: World, telemetry: Telemetry, steps: int, trace: Path) -> dict[str, Any]:
    """Train 2 x `steps` steps, and return the table of this rank."""
    spans, cuda = Spans(), world.device.type == "cuda"
    with contextlib.ExitStack() as stack:
        for phase, functions in PHASES.items():
            for owner, name in functions:
                stack.enter_context(patch.object(owner, name, spans.wrapped(getattr(owner, name), phase)))
        training = Steps(job, world, telemetry)

        def timed() -> float:
            begin = time.perf_counter()
            training.train(steps)
            _wait(world)
            return time.perf_counter() - begin

        training.train(WARMUP[world.device.type])
        _wait(world)
        spans.clear()
        tokens, wall = training.tokens, timed()
        phases, tokens = spans.finished(), training.tokens - tokens

        spans.mark = record_function
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=activities, acc_events=True) as profiler:
            seconds = timed()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    phases["rest"] = phases.pop("step")
    return {
        "device": torch.cuda.get_device_name(world.device) if cuda else "cpu",
        "ranks": world.size, "threads": torch.get_num_threads(), "steps": steps,
        "precision": training.trainer.precision, "batch_size": job.batch_size, "tokens_per_step": tokens / steps,
        "step_seconds": wall / steps, "profiled_step_seconds": seconds / steps,
        "phase_seconds": {phase: seconds / steps for phase, seconds in phases.items()},
        **_tables(profiler, seconds, steps, cuda),
    }  # fmt: skip


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)


def _tables(profiler: Any, seconds: float, steps: int, cuda: bool) -> dict[str, Any]:
    """Return the seconds of a profiled step by group, by phase and group, and the operations that take most."""
    by_group = dict.fromkeys(groups.GROUPS, 0.0)
    by_phase: dict[str, dict[str, float]] = {}
    by_name: dict[str, list[float]] = {}
    for event in profiler.events():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if event.name in PHASES or (is_kernel and getattr(event, "is_user_annotation", False)):
            continue
        if cuda != is_kernel:
            continue  # on a GPU its kernels count; the host shows as idle time
        own = (event.device_time_total if is_kernel else event.self_cpu_time_total) / 1e6 / steps
        parents, parent = [], event.cpu_parent
        while parent is not None:
            parents.append(parent.name)
            parent = parent.cpu_parent
        phase = next((name for name in parents if name in PHASES), "backward")
        group = groups.of_kernel(event.name) if is_kernel else groups.of_operation(event.name, parents, phase)
        by_group[group] += own
        inside = by_phase.setdefault("rest" if phase == "step" else phase, {})
        inside[group] = inside.get(group, 0.0) + own
        known = by_name.setdefault(event.name, [0.0, 0.0])
        known[0] += own
        known[1] += 1 / steps
    rest = seconds / steps - sum(by_group.values())
    most = sorted(by_name.items(), key=lambda item: -item[1][0])[:20]
    return {
        "group_seconds": by_group | {groups.IDLE if cuda else groups.HOST: max(0.0, rest)},
        "phase_group_seconds": {} if cuda else by_phase,
        "operations": [{"name": name[:120], "seconds": s, "calls": calls} for name, (s, calls) in most],
        "operations_per_step": sum(calls for _, calls in by_name.values()),
    }


def main() -> None:
    given = json.loads(sys.argv[1])

    def use(job: Job, world: World, telemetry: Telemetry) -> None:
        found = profiled(job, world, telemetry, given["steps"], Path(given["trace"].format(rank=world.rank)))
        if world.main:
            write_json(Path(given["output"]), found | {"peak_flops_per_second": peaks(world.device)})
        world.barrier()

    with_student_job(given["config"], given["overrides"], use)
    leave(0)


if __name__ == "__main__":
    main()
