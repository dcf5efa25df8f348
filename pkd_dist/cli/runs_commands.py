"""`pkd runs`: clean up run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pkd_dist.cli.options import require_run, run_command


def clean(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, such as runs/demo.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove RUN/previous, the outcomes that later settings replaced. Nothing that the run uses is removed.

    Example: pkd runs clean runs/demo
    """

    def work() -> None:
        from pkd_dist.files import readable_bytes, remove, size_of
        from pkd_dist.lock import Lock
        from pkd_dist.stages.base import previous_folder

        require_run(run)
        previous = previous_folder(run)
        size = readable_bytes(size_of(previous))
        if not previous.exists():
            print(f"{run}: nothing to remove")
        elif dry_run:
            print(f"{previous}: {size} would be removed")
        else:
            lock = Lock(run).acquire()  # a job may be moving an outcome there
            try:
                remove(previous)
            finally:
                lock.release()
            print(f"{previous}: removed, {size}")

    run_command(work)
