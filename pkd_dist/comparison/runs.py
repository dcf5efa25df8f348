"""The runs of a comparison, as its workers train them: in one process on an open base, or each under a launcher.

Both ways run the stages `init`, `distill` and `evaluate` of a run in OUTPUT/METHOD/seed-N, and end with the same files there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from pkd_dist import pipeline
from pkd_dist.config.sweep import Sweep
from pkd_dist.distributed.world import World
from pkd_dist.errors import DivergedError, UserError
from pkd_dist.evaluation.results import Results
from pkd_dist.files import make_folder, read_object
from pkd_dist.network import free_port
from pkd_dist.search.processes import Processes
from pkd_dist.search.shared import BASE_STAGES, SweepConfig
from pkd_dist.search.shares import train_command
from pkd_dist.search.space import Space
from pkd_dist.search.study import COMPARISON, NAMED, Claim, Named, Study
from pkd_dist.search.trial import Bases
from pkd_dist.search.worker import work
from pkd_dist.stages.distill import TeacherDev
from pkd_dist.stages.evaluate import EvaluateOutput
from pkd_dist.telemetry.log import log, to_terminal

RESULTS = "results"
"""Attribute of a trial: the content of results_eval.json."""
STAGES = ("init", "distill", "evaluate")
SETTINGS = Sweep(sampler="grid", pruner="none", students_per_step=1)


def open_study(folder: Path) -> Study:
    """Return the study of a comparison: every method with every seed is a point of its own, and none is pruned."""
    return Study(folder, SETTINGS, Space({}), COMPARISON)


def train_here(sweep: SweepConfig, name: str, world: World) -> None:
    """Train runs in this process, a single rank, until none is left; see `search.worker.work`.

    Raises:
        UserError: A run cannot be trained; names it.
    """
    bases = Bases(sweep, world)

    def train(claim: Claim, folder: Path) -> Results:
        to_terminal(True)  # leaves the log files of the run before
        base = bases.of(point := Named(*claim.trial.user_attrs[NAMED]).overrides)
        config = sweep.load(sweep.of_point(point, folder, claim.seed))
        context = pipeline.run(config, sweep.file, world, STAGES, base=base)
        if found := context.known(TeacherDev):
            base.hand_on(found)
        return context.output(EvaluateOutput).results

    _work(sweep, name, train, lambda: world.stop_here("between two runs"))


def train_under(launcher: str, own_port: bool, sweep: SweepConfig, name: str) -> None:
    """Train runs under a launcher, as `train_here`; their output is in OUTPUT/METHOD/seed-N/log.txt.

    Args:
        own_port: The ranks of each run meet at a free port.
    """
    processes = Processes("compare")

    def train(claim: Claim, folder: Path) -> Results:
        command = train_command(launcher, free_port() if own_port else None)
        overrides = sweep.of_point(Named(*claim.trial.user_attrs[NAMED]).overrides, folder, claim.seed)
        arguments = ["--config", sweep.file, *sweep.given, *overrides, "--stages", ",".join((*BASE_STAGES, *STAGES))]
        make_folder(folder)
        processes.run(arguments, folder / "log.txt", command)
        return cast(Results, read_object(folder / "results_eval.json"))

    with processes.stopped_on_signal():
        _work(sweep, name, train, lambda: None)


def _work(sweep: SweepConfig, name: str, train: Callable[[Claim, Path], Results], pause: Callable[[], None]) -> None:
    study = open_study(sweep.folder)

    def train_claimed(claims: list[Claim]) -> None:
        [claim] = claims
        method, seed = Named(*claim.trial.user_attrs[NAMED]).name, claim.seed
        try:
            results = train(claim, (sweep.folder / method / f"seed-{seed}").absolute())
        except DivergedError as error:
            log.info("%s, seed %d: %s", method, seed, error)
            study.fail(claim, str(error))
        except UserError as error:
            raise UserError(f"{method}, seed {seed}: {error}") from None
        else:
            study.complete(claim, results["student"]["main_metric"], {RESULTS: results})

    work(study, name, train_claimed, pause)
