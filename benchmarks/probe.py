"""Access to the training of a real run, for programs that measure its steps."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from pkd_dist import pipeline
from pkd_dist.config.load import load
from pkd_dist.distributed.ranks import discover
from pkd_dist.distributed.world import World
from pkd_dist.stages.base import NAMES
from pkd_dist.stages.distill import training_job
from pkd_dist.telemetry import Telemetry
from pkd_dist.telemetry.log import to_terminal
from pkd_dist.telemetry.metrics import RunMetrics
from pkd_dist.training.job import Job

T = TypeVar("T")


def with_student_job(config_file: str, overrides: Sequence[str], use: Callable[[Job, World, Telemetry], T]) -> T:
    """Run the stages before the student's training, and return what `use` makes of the training's job; collective."""
    ranks = discover()
    to_terminal(ranks.main)
    config = load(config_file, overrides)
    world = World(ranks, config.run.timeout_seconds)
    context = pipeline.run(config, config_file, world, NAMES[: NAMES.index("distill")])
    result = use(training_job(context), world, Telemetry(RunMetrics(), show=False))
    world.barrier()
    world.close()
    return result
