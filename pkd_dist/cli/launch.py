"""`launcher/train.py`: argv -> configuration -> ranks -> pipeline -> exit status.

Whatever ends a run early ends here: one line on stderr from rank 0, the traceback in the rank's log file, and the exit
status of `errors.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

import yaml

from pkd_dist.cli.arguments import OneValue
from pkd_dist.config.deepspeed import load_deepspeed
from pkd_dist.config.load import load, replaced_by_preset
from pkd_dist.config.schema import Config
from pkd_dist.distributed.ranks import Ranks, discover, first_of_node, speaks_without_rank_0
from pkd_dist.distributed.signals import StopSignals
from pkd_dist.errors import LostRank, Preempted, UserError
from pkd_dist.files import is_denied, is_full
from pkd_dist.loading import loading
from pkd_dist.stages.base import NAMES
from pkd_dist.telemetry.log import log, to_terminal
from pkd_dist.telemetry.output import keep_going, open_missing

if TYPE_CHECKING:
    from pkd_dist.distributed.world import World

_SPEAKING_SECONDS = 10.0
"""Delay before a rank leaves in silence: on a busy node the rank that says why may have started seconds later."""


def train(argv: Sequence[str], program: str = "launcher/train.py") -> int:
    """Run the pipeline that a command line asks for, and return the exit status."""
    parser = _Parser(
        prog=program,
        description=f"Distil a student from a teacher, in the stages {', '.join(NAMES)}. Rerun the same command to resume.",
        epilog=f"example: {program.replace('python -m', 'deepspeed --module')} --config configs/demo.yaml train.epochs=2 run.dir=runs/short",
    )
    parser.register("action", None, OneValue)
    parser.add_argument("--config", required=True, metavar="FILE", help="the run's YAML")
    parser.add_argument("--stages", metavar="a,b", help="run only these stages; those before them must be done")
    parser.add_argument(
        "--fresh", action="store_true", help="start over; an existing run folder is renamed, never deleted"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration and the plan; write nothing"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the file's")
    try:
        options = parser.parse_intermixed_args(argv)
        names = chosen_stages(options.stages)
    except UserError as error:
        if first_of_node():
            print(f"pkd: {error}; see --help", file=sys.stderr, flush=True)
        else:
            _let_first_speak()
        return error.exit_status
    return launch(options.config, options.overrides, names, options.fresh, options.dry_run)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def chosen_stages(stages: str | None) -> list[str]:
    """Return the stages that `--stages a,b` names, in order; all where it is not given.

    Raises:
        UserError: an unknown stage, or none.
    """
    if stages is None:
        return list(NAMES)
    wanted = [name.strip() for name in stages.split(",") if name.strip()]
    for name in wanted:
        if name not in NAMES:
            raise UserError(f"--stages: {name!r} is not a stage; allowed: {', '.join(NAMES)}")
    if not wanted:
        raise UserError(f"--stages: name at least one of {', '.join(NAMES)}")
    return [name for name in NAMES if name in wanted]


def launch(
    config_file: str,
    overrides: Sequence[str],
    names: Sequence[str] = NAMES,
    fresh: bool = False,
    dry_run: bool = False,
) -> int:
    """Run the stages `names` on this rank among the others, and return the exit status. To be called in the main thread."""

    def work(world: World) -> None:
        from pkd_dist import pipeline

        config = load(config_file, overrides)
        if dry_run:
            plan = pipeline.plan(config, config_file, world, names, fresh)
            if world.main:
                _print_plan(config, plan)
            return
        if replaced := replaced_by_preset(config_file, overrides, config):
            log.info(
                "distill.preset=%s replaces settings of %s: %s", config.distill.preset, config_file, ", ".join(replaced)
            )
        context = pipeline.run(config, config_file, world, names, fresh)
        if names[-1] == "report" and world.main:
            from pkd_dist.stages.report import summary

            print(f"\n{summary(context)}", flush=True)

    return in_world(config_file, overrides, work, keeps_going=not dry_run)


def in_world(
    config_file: str,
    overrides: Sequence[str],
    work: Callable[[World], None],
    keeps_going: bool = True,
    alone: bool = False,
) -> int:
    """Connect this rank with the others, do some work there, and return the exit status. To be called in the main thread.

    Args:
        work: Called with the ranks of the run.
        keeps_going: Continue where nobody reads the output any more.
        alone: Be a single rank, whatever started the process.
    """
    if threading.current_thread() is not threading.main_thread():
        print(
            "pkd: a run needs the main thread, for its signals; start it there or in a process of its own",
            file=sys.stderr,
        )
        return UserError.exit_status
    open_missing()
    if keeps_going:
        keep_going()
    process = _Process(StopSignals().install())

    def connected() -> None:
        ranks = Ranks(0, 0, 1, 1, "pkd") if alone else discover()
        to_terminal(ranks.main)
        config = load(config_file, overrides)
        load_deepspeed(config, config_file)  # checked here, before torch is imported
        with loading():
            world_type = _import_world()
            from pkd_dist import pipeline  # noqa: F401 - the rest of what is imported
        process.world = world = world_type(ranks, config.run.timeout_seconds, process.signals)
        work(world)

    status = guarded(connected, process.agree_on_end)
    process.finish(status)
    return status


def _import_world() -> type[World]:
    """Import torch, and what the ranks meet with. Raises UserError where torch rejects its environment."""
    try:
        from pkd_dist.distributed.world import World
    except ImportError:
        raise
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f"PyTorch cannot be loaded: {first}; correct or unset its variable in the environment"
        ) from error
    return World


def _print_plan(config: Config, plan: Sequence[str]) -> None:
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
    print("\n".join(["", "plan:", *(f"  {line}" for line in plan)]))


@dataclass
class _Process:
    """This process as one rank: its stop signals and, once the ranks have met, the world."""

    signals: StopSignals
    world: World | None = field(default=None)

    def agree_on_end(self, error: Exception) -> tuple[str | None, int]:
        """Return what the user reads of an exception (None where another rank says it) and the exit status."""
        self.signals.ending()
        if "torch" in sys.modules:
            from pkd_dist.distributed.world import is_lost

            error = LostRank(str(error)) if is_lost(error) else error
        if self.world is not None:
            return self.world.agree_on_end(error)
        # The ranks have not met: the first rank of each node speaks where it fails.
        if speaks_without_rank_0() if isinstance(error, LostRank) else first_of_node():
            return _explain(error)
        self.signals.uninstall()
        _let_first_speak()
        return None, getattr(error, "exit_status", 1)

    def finish(self, status: int) -> None:
        if self.world is not None:
            self.world.linger() if status else self.world.close()
        self.signals.uninstall()


def _let_first_speak() -> None:
    """Wait for the launcher to end this rank: if it left at once, the launcher could end the first rank before that one has spoken."""
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(_SPEAKING_SECONDS)


def leave(status: int) -> NoReturn:
    """End the process at once: at an ordinary exit gloo's threads now and then abort it, and the status is lost."""
    logging.shutdown()
    try:
        sys.stdout.flush()
    except OSError as error:
        status = status or unprinted(error)
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(status)


def unprinted(error: OSError) -> int:
    """Say why standard output cannot be written, unless its reader has seen enough (`| head`); return the exit status."""
    if isinstance(error, BrokenPipeError):
        return 0
    with contextlib.suppress(OSError):
        print(f"pkd: standard output cannot be written ({error.strerror})", file=sys.stderr)
    return UserError.exit_status


def _explain(error: Exception) -> tuple[str | None, int]:
    """Return the message and the exit status of an exception, without other ranks."""
    if hasattr(error, "exit_status"):
        return str(error), error.exit_status
    traceback.print_exception(error)
    return f"a bug in pkd_dist: {type(error).__name__}: {error}", 1


@contextlib.contextmanager
def requires_extra(extra: str) -> Iterator[None]:
    """Name the extra of pkd_dist that brings a package which the code inside cannot import.

    Raises:
        UserError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "pkd_dist":
            raise
        raise UserError(f"the Python package {error.name} is not installed: pip install 'pkd_dist[{extra}]'") from error


def guarded(work: Callable[[], object], end: Callable[[Exception], tuple[str | None, int]] = _explain) -> int:
    """Run `work` and return its exit status; an exception becomes one line on stderr and a traceback in the log file.

    Args:
        end: (exception) -> the line (None where another rank prints it) and the status.
    """
    try:
        _require_docstrings()
        with requires_extra("train"):
            work()
    except KeyboardInterrupt:
        print("pkd: interrupted; rerun the same command to resume", file=sys.stderr, flush=True)
        return Preempted.exit_status
    except Exception as error:
        log.debug("ended by an exception", exc_info=error)
        message, status = end(_of_the_system(error))
        if message is not None:
            print(f"pkd: {message}", file=sys.stderr, flush=True)
        return status
    return 0


def _require_docstrings() -> None:
    if sys.flags.optimize > 1:
        raise UserError(
            "Python runs without docstrings (-OO or PYTHONOPTIMIZE=2), which transformers needs; unset it, or use 1"
        )


def _of_the_system(error: Exception) -> Exception:
    """Return what a user reads of a full disk or of files that belong to another user; other errors as they are."""
    name = getattr(error, "filename", None)
    if hasattr(error, "exit_status"):
        return error
    if is_full(error):
        where = f"{name}: no space left on the disk" if name else f"no space left on a disk or for the output ({error})"
        told = UserError(f"{where}; free some and rerun the same command")
    elif is_denied(error):
        where = f"{name}: may not be read or written" if name else "a file may not be read or written"
        told = UserError(
            f"{where} ({getattr(error, 'strerror', None) or error}); change its mode, or choose another folder"
        )
    else:
        return error
    told.__dict__.update(vars(error))  # whether all ranks raise it
    return told
