"""The command line: `launcher/train.py` (a whole run) and `pkd` (single steps).

Whatever ends a run early ends here: one line on stderr from rank 0, the traceback in the rank's log file, and the exit
status of `errors.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from pkd_dist.config import deepspeed as ds_config
from pkd_dist.config import load as config_load
from pkd_dist.distributed.ranks import Ranks, discover, first_of_node
from pkd_dist.distributed.signals import StopSignals
from pkd_dist.errors import LostRank, Preempted, UserError
from pkd_dist.files import is_full
from pkd_dist.telemetry.log import log, to_terminal

if TYPE_CHECKING:
    from pkd_dist.distributed.world import World


STAGE_NAMES = ("data", "teacher", "cache", "init", "distill", "evaluate", "export", "report")


def train(argv: Sequence[str]) -> int:
    """`launcher/train.py`: runs the pipeline and returns the exit status."""
    parser = _Parser(
        prog="launcher/train.py",
        description="Distils a student from a teacher: "
        + ", ".join(STAGE_NAMES)
        + ". The same command goes on after a stop.",
        epilog="example: deepspeed launcher/train.py --config configs/demo.yaml train.epochs=2 run.dir=runs/short",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML")
    parser.add_argument("--stages", metavar="a,b", help="run only these stages; the others must be done")
    parser.add_argument(
        "--fresh", action="store_true", help="start over; an existing run folder is renamed, never deleted"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and the plan; write nothing"
    )
    parser.add_argument(
        "--local_rank", type=int, default=None, help=argparse.SUPPRESS
    )  # the deepspeed launcher appends it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file's")
    try:
        options = parser.parse_intermixed_args(argv)
    except UserError as error:
        if first_of_node():
            print(f"pkd: {error}; --help lists the options", file=sys.stderr, flush=True)
        return error.exit_status
    return run(options.config, options.overrides, options.stages, options.fresh, options.dry_run)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def run(
    config_file: str, overrides: Sequence[str], stages: str | None = None, fresh: bool = False, dry_run: bool = False
) -> int:
    """Runs a pipeline on this rank among the others and returns the exit status."""
    with contextlib.suppress(ModuleNotFoundError):  # pkd_dist.kernels is optional
        from pkd_dist.kernels.allocator import keep_freed_blocks

        keep_freed_blocks()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its warnings of lost connections come from every rank
    signals = StopSignals().install()
    ranks: Ranks | None = None
    world: World | None = None

    def work() -> None:
        nonlocal ranks, world
        ranks = discover()
        to_terminal(ranks.main)
        config = config_load.load(config_file, overrides)
        chosen = _chosen_stages(stages)
        ds_config.load_deepspeed(config, config_file)
        gc.disable()  # of the millions of objects that imports make none is garbage: a fifth of their time
        from pkd_dist.distributed.world import World
        from pkd_dist.pipeline import Pipeline

        gc.enable()
        world = World(ranks, config.run.timeout_seconds, signals)
        pipeline = Pipeline(config, config_file, world)
        if dry_run:
            if world.main:
                print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
                print("\n".join(["", "plan:", *(f"  {line}" for line in pipeline.plan())]))
            return
        pipeline.run(chosen, fresh)
        if chosen[-1] == "report" and world.main:
            print("\n" + pipeline.summary(), flush=True)

    def end(error: Exception) -> tuple[str | None, int]:
        signals.ending()
        if "torch" in sys.modules:
            from pkd_dist.distributed.world import is_lost

            error = LostRank(str(error)) if is_lost(error) else error
        if world is not None:
            return world.agree_on_end(error)
        if first_of_node():  # not met yet: the first rank of each node where it fails
            return _told(error)
        return None, getattr(error, "exit_status", 1)

    status = guarded(work, end)
    if world is not None:
        world.linger() if status else world.close()
    signals.uninstall()
    return status


def leave(status: int) -> NoReturn:
    """Ends the process at once. At an ordinary exit gloo's threads now and then abort it, and the status is lost."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _told(error: Exception) -> tuple[str | None, int]:
    """What is said of an exception, and its exit status, where there are no other ranks to ask."""
    if hasattr(error, "exit_status"):
        return str(error), error.exit_status
    traceback.print_exception(error)
    return f"a defect of pkd_dist: {type(error).__name__}: {error}", 1


def guarded(work: Callable[[], Any], end: Callable[[Exception], tuple[str | None, int]] = _told) -> int:
    """Runs `work`; whatever ends it early becomes one line on stderr, a traceback in the log file, and a status.

    Args:
        end: exception -> the line (None where another rank speaks) and the status.
    """
    try:
        work()
    except KeyboardInterrupt:
        print("pkd: interrupted; the same command goes on from what is done", file=sys.stderr, flush=True)
        return Preempted.exit_status
    except Exception as error:
        log.debug("ended by an exception", exc_info=error)
        message, status = end(_full_disk(error) if is_full(error) and not hasattr(error, "exit_status") else error)
        if message is not None:
            print(f"pkd: {message}", file=sys.stderr, flush=True)
        return status
    return 0


def _full_disk(error: Exception) -> UserError:
    name = getattr(error, "filename", None)
    where = f"{name}: no space left on the disk" if name else f"no space left on a disk ({error})"
    told = UserError(f"{where}; free some and run the same command again")
    told.__dict__.update(vars(error))  # whether all ranks raise it
    return told


def _chosen_stages(stages: str | None) -> list[str]:
    if stages is None:
        return list(STAGE_NAMES)
    wanted = [name.strip() for name in stages.split(",") if name.strip()]
    for name in wanted:
        if name not in STAGE_NAMES:
            raise UserError(f"--stages: {name!r} is not a stage; allowed: {', '.join(STAGE_NAMES)}")
    if not wanted:
        raise UserError(f"--stages: name at least one of {', '.join(STAGE_NAMES)}")
    return [name for name in STAGE_NAMES if name in wanted]
