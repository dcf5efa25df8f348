"""Options that several commands of `pkd` share, and how a command ends."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated

import typer

from pkd_dist.cli.launch import guarded
from pkd_dist.errors import UserError
from pkd_dist.telemetry.log import to_terminal

ConfigFile = Annotated[str, typer.Option("--config", help="The run's YAML.", metavar="FILE")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings that override the file's.", metavar="section.key=value")
]
TaskName = Annotated[str, typer.Option(help="A GLUE task (`pkd prepare --help` lists them), or `custom`.")]
TextColumns = Annotated[
    list[str] | None, typer.Option(help="`custom`: a text column; give it twice for pairs of texts.")
]
LabelColumn = Annotated[str | None, typer.Option(help="`custom`: the label column.")]
TaskKind = Annotated[str | None, typer.Option(help="`custom`: classification or regression.")]

TASK_OPTIONS = {
    "name": "--task",
    "data": "--data",
    "text": "--text",
    "label": "--label",
    "kind": "--kind",
    "class_names": "--class-name",
    "positive": "--positive",
    "max_length": "--max-length",
}
"""Key of the section `task` -> the option that sets it."""


def task_overrides(options: Mapping[str, object]) -> list[str]:
    """Return task options as configuration overrides; the value is JSON, so it is taken as it was typed."""
    return [f"task.{key}={json.dumps(value)}" for key, value in options.items() if value]


@contextlib.contextmanager
def named_as_options() -> Iterator[None]:
    """In an error about a setting, name the command's option for it."""
    options = {f"task.{key}": option for key, option in TASK_OPTIONS.items()} | {"teacher.model": "--model"}
    try:
        yield
    except UserError as error:
        if error.setting not in options:
            raise
        raise UserError(error.message, options[error.setting]) from None


def run_command(work: Callable[[], object]) -> None:
    """Run a command to its end and exit with its status."""
    to_terminal(True)
    status = guarded(work)
    if status:
        raise typer.Exit(status)
