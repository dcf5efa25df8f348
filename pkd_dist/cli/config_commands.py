"""`pkd config`: check, show and document run configurations."""

from __future__ import annotations

from typing import Annotated

import typer
import yaml

from pkd_dist.cli.options import Overrides, run_command

File = Annotated[str, typer.Argument(metavar="FILE", help="The run's YAML.")]


def check(file: File, overrides: Overrides = None) -> None:
    """Check a run configuration and the DeepSpeed JSON that it names.

    Example: pkd config check configs/demo.yaml
    """

    def work() -> None:
        from pkd_dist.config.deepspeed import load_deepspeed
        from pkd_dist.config.load import load
        from pkd_dist.data import tasks

        config = load(file, overrides or [])
        load_deepspeed(config, file)
        tasks.resolve(config.task)
        print(f"{file}: valid")

    run_command(work)


def show(file: File, overrides: Overrides = None) -> None:
    """Print a run configuration as resolved, defaults included.

    Example: pkd config show configs/demo.yaml train.epochs=2
    """

    def work() -> None:
        from pkd_dist.config.load import load

        print(yaml.safe_dump(load(file, overrides or []).model_dump(mode="json"), sort_keys=False), end="")

    run_command(work)


def reference() -> None:
    """Print the documented schema as Markdown (docs/configuration.md).

    Example: pkd config reference > docs/configuration.md
    """
    from pkd_dist.config.reference import reference as schema_reference

    print(schema_reference(), end="")
