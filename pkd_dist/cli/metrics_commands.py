"""`pkd metrics`: document a run's metrics; list and clean up where Prometheus finds runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pkd_dist.cli.options import ConfigFile, run_command
from pkd_dist.errors import UserError


def reference() -> None:
    """Print the metrics of a run as Markdown (docs/metrics.md).

    Example: pkd metrics reference > docs/metrics.md
    """
    from pkd_dist.config.schema import Metrics
    from pkd_dist.metric_names import LOSS_TERMS
    from pkd_dist.stages.base import NAMES
    from pkd_dist.telemetry import metrics

    defaults = Metrics()
    print(metrics.reference(defaults.host, defaults.port, NAMES, tuple(LOSS_TERMS)), end="")


def targets(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="As metrics.discovery_dir of the runs.")],
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Remove the files of runs that have been silent for 24 hours.")
    ] = False,
) -> None:
    """List where Prometheus finds runs, and when each last gave a sign of life.

    Example: pkd metrics targets /shared/pkd-targets --sweep
    """

    def work() -> None:
        from pkd_dist.telemetry import discovery

        if not folder.is_dir():
            raise UserError(f"no such folder: {folder}; give metrics.discovery_dir of a run", "DIR")
        try:
            found = list(discovery.targets(folder))
        except OSError as error:
            raise UserError(f"{folder}: not a folder that can be written ({error.strerror})") from None
        removed = {target.file for target in discovery.sweep(folder)} if sweep else set()
        for target in found:
            age = "expired" if target.expired else "silent" if target.stale else "alive"
            state = "removed" if target.file in removed else age if target.address or target.stale else "unreadable"
            print(
                f"{target.address or target.file.name}\t{state}\tsilent for {target.silent_seconds:.0f} s\t{target.run}"
            )

    run_command(work)


def withdraw(config: ConfigFile) -> None:
    """Remove what a crashed run left for Prometheus to find, which ends its alert; its next start does so too.

    Example: pkd metrics withdraw --config runs/demo/config.yaml
    """

    def work() -> None:
        from pkd_dist.config.load import load
        from pkd_dist.lock import Lock
        from pkd_dist.telemetry import discovery

        settings = load(config)
        if not settings.metrics.discovery_dir:
            print(f"{config}: metrics.discovery_dir is null, so there is nothing to remove")
            return
        run, folder = Path(settings.run.dir), Path(settings.metrics.discovery_dir)
        lock = Lock(run).acquire() if run.is_dir() else None  # another job of this run may have published it
        removed = discovery.withdraw(folder, run)
        if lock:
            lock.release()
        print("\n".join(f"{file}: removed" for file in removed) or f"{folder}: has no file of {run.absolute()}")

    run_command(work)
