"""One rank of a profiled training: the project's own pipeline and trainer with a real student.

First some steps without a profiler, for the true times of the phases; then some under `torch.profiler`, for the times of
the operations and for the trace.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from pkd_dist.loading import keep_freed_blocks

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

WARMUP = {"cpu": 5, "cuda": 300}
"""Steps before the first that counts. On a GPU they capture the graphs, one for each length."""


def phases(engine: type) -> dict[str, tuple[tuple[type, str], ...]]:
    """Return phase -> the functions whose time it is, without the phases they call; the remainder of a step is `rest`."""
    return {
        "step": ((Trainer, "train_step"),),
        "data": ((TrainingBatches, "step"), (CacheReader, "rows_of")),
        "loss": ((DistillationLoss, "__call__"),),
        "forward": ((engine, "__call__"),),
        "backward": ((engine, "backward"), (engine, "end_micro_batch")),
        "engine step": ((engine, "step"),),
        "whole step": ((GraphUpdate, "__call__"),),
    }


def profiled(job: Job, world: World, telemetry: Telemetry, steps: int, trace: Path) -> dict[str, Any]:
    """Train 2 x `steps` steps, and return the table of this rank."""
    spans, cuda = Spans(), world.device.type == "cuda"
    trainer = open_trainer(job, world, telemetry)
    trainer.engine.train()
    functions = phases(type(trainer.engine))
    for phase, methods in functions.items():
        for owner, name in methods:
            setattr(owner, name, spans.wrapped(getattr(owner, name), phase))

    def train(count: int) -> float:
        """Return the seconds of some steps."""
        begin = time.perf_counter()
        for _ in range(count):
            trainer.train_step()
        if cuda:
            torch.cuda.synchronize(world.device)
        return time.perf_counter() - begin

    train(WARMUP[world.device.type])
    spans.clear()
    tokens = trainer.progress.tokens
    wall = train(steps)
    seconds, tokens = spans.finished(), trainer.progress.tokens - tokens

    spans.mark = record_function
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        under_profiler = train(steps) / steps
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    seconds["rest"] = seconds.pop("step")
    by_group, operations = _by_group(profiler, cuda, functions.keys())
    by_group = {group: total / steps for group, total in by_group.items()}
    by_group[groups.IDLE if cuda else groups.HOST] = max(0.0, under_profiler - sum(by_group.values()))
    return {
        "device": torch.cuda.get_device_name(world.device) if cuda else "cpu",
        "ranks": world.size, "threads": torch.get_num_threads(), "steps": steps,
        "precision": resolve_precision(job.deepspeed, world.device)[1], "batch_size": job.settings.batch_size,
        "tokens_per_step": tokens / steps, "step_seconds": wall / steps, "profiled_step_seconds": under_profiler,
        "phase_seconds": {phase: total / steps for phase, total in seconds.items()},
        "group_seconds": by_group, "operations_per_step": operations / steps,
    }  # fmt: skip


def _by_group(profiler: Any, cuda: bool, phases: Any) -> tuple[dict[str, float], int]:
    """Return the seconds by group and the number of operations; on a GPU its kernels count, and the host is idle time."""
    by_group, count = dict.fromkeys(groups.GROUPS, 0.0), 0
    for event in profiler.events():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if event.name in phases or cuda != is_kernel or (is_kernel and getattr(event, "is_user_annotation", False)):
            continue
        parents, parent = [], event.cpu_parent
        while parent is not None:
            parents.append(parent.name)
            parent = parent.cpu_parent
        phase = next((name for name in parents if name in phases), "backward")
        group = groups.of_kernel(event.name) if is_kernel else groups.of_operation(event.name, parents, phase)
        by_group[group] += (event.device_time_total if is_kernel else event.self_cpu_time_total) / 1e6
        count += 1
    return by_group, count


def main() -> None:
    given = json.loads(sys.argv[1])

    def use(job: Job, world: World, telemetry: Telemetry) -> None:
        found = profiled(job, world, telemetry, given["steps"], Path(given["trace"].format(rank=world.rank)))
        if world.main:
            write_json(Path(given["output"]), found)

    with_student_job(given["config"], given["overrides"], use)
    leave(0)


if __name__ == "__main__":
    main()
