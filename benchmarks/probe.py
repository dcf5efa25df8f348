"""Takes the training of a real run out of its pipeline, to look at it more closely than a run does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pkd_dist.config import load as config_load
from pkd_dist.distributed.ranks import discover
from pkd_dist.distributed.world import World
from pkd_dist.pipeline import STAGES, Pipeline
from pkd_dist.telemetry import Telemetry
from pkd_dist.telemetry.log import to_terminal
from pkd_dist.training.job import Job

Use = Callable[[Job, World, Telemetry], Any]


class _HandedOverError(Exception):
    """The training's job has been used."""


def with_student_job(config_file: str | Path, overrides: Sequence[str], use: Use) -> Any:
    """Runs a run's stages up to the student's training on this rank among the others, and hands over the job of that
    training in place of doing it; collective. What was done before (data, cache, starting weights) stays in the run's
    folder.

    Args:
        use: called in place of `train`, on every rank.

    Returns:
        What `use` returned.
    """
    ranks = discover()
    to_terminal(ranks.main)
    config = config_load.load(config_file, overrides)
    world = World(ranks, config.run.timeout_seconds)
    results: list[Any] = []

    def train(job: Job, world: World, telemetry: Telemetry) -> Any:
        results.append(use(job, world, telemetry))
        raise _HandedOverError

    try:
        with patch("pkd_dist.pipeline.train", train):
            Pipeline(config, config_file, world).run(STAGES[: STAGES.index("distill") + 1])
    except _HandedOverError:
        pass
    world.barrier()
    world.close()
    if not results:
        raise RuntimeError(f"{config.run.dir}: the student is trained already; give another folder")
    return results[0]
