"""Options that several commands of `pkd` share, and how a command ends."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from pkd_dist.cli.launch import guarded, requires_extra
from pkd_dist.config.load import load
from pkd_dist.errors import UserError
from pkd_dist.search import forks
from pkd_dist.telemetry.log import to_terminal
from pkd_dist.telemetry.output import drop

ConfigFile = Annotated[str, typer.Option("--config", help="The run's YAML.", metavar="FILE")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings that override the file's.", metavar="section.key=value")
]
TaskName = Annotated[str, typer.Option(help="A GLUE task (`pkd prepare --help` lists them), race, or `custom`.")]
TextColumns = Annotated[
    list[str] | None, typer.Option(help="`custom`: a text column; give it twice for pairs of texts.")
]
LabelColumn = Annotated[
    list[str] | None,
    typer.Option(help="`custom`: the label column; of a multilabel task also one for each class: repeat it."),
]
LabelSeparator = Annotated[
    str | None, typer.Option(help="`multilabel`: what separates the classes in a label; default: |.")
]
TaskKind = Annotated[
    str | None, typer.Option(help="`custom`: classification, regression, multilabel or multiple_choice.")
]
OptionColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--options", help="`multiple_choice`: the column of lists of options, or one for each option: repeat it."
    ),
]
LabelIs = Annotated[
    str | None, typer.Option(help="`multiple_choice`: what a label is: index (from 0, the default), letter or text.")
]
Gap = Annotated[
    str | None, typer.Option(help="`multiple_choice`: text in the question whose place an option takes, such as _.")
]

FileSplitSettings = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE", help="How to split one file: a key of task.split, such as group=customer_id; repeat it."
    ),
]

OPTIONS = {
    "task.name": "--task", "task.data": "--data", "task.text": "--text", "task.label": "--label", "task.label_separator": "--label-separator", "task.kind": "--kind",
    "task.options": "--options", "task.label_is": "--label-is", "task.gap": "--gap",
    "task.class_names": "--class-name", "task.positive": "--positive", "task.max_length": "--max-length",
    **{f"task.split.{key}": f"--split-setting {key}" for key in ("dev", "test", "seed", "stratify", "group")},
    "task.split": "--split-setting", "task.duplicates": "--duplicates",
    "teacher.model": "--model", "student.layers": "--layers", "evaluate.batch_size": "--batch-size",
}  # fmt: skip
"""Configuration key -> the option of a command on folders that sets it."""

DEMO_DATA = "data/movie-reviews"
"""What commands read without --data."""


def task_overrides(options: Mapping[str, object]) -> list[str]:
    """Return task options as configuration overrides; the value is JSON, so it is taken as it was typed."""
    return [f"task.{key}={json.dumps(value)}" for key, value in options.items() if value is not None]


def columns_of(columns: Sequence[str] | None) -> str | list[str] | None:
    """Return the value of `task.label` or `task.options`: one column, or a list."""
    return columns[0] if columns and len(columns) == 1 else list(columns) if columns else None


def split_overrides(settings: Sequence[str] | None) -> list[str]:
    """Return options KEY=VALUE as overrides of `task.split`."""
    return [f"task.split.{each}" for each in settings or ()]


def data_or_demo(data: str | None, task: str) -> str:
    """Return the data folder; without one, that of the demo, and say so on stderr.

    Raises:
        UserError: the demo data is not of this task.
    """
    if data is not None:
        return data
    if task != "sst2":
        raise UserError(f"is missing; without it the demo data is read, whose task is sst2, not {task}", "--data")
    print(f"pkd: no --data: reading the demo data, {DEMO_DATA}", file=sys.stderr, flush=True)
    return DEMO_DATA


def require_run(run: Path) -> None:
    """Raise UserError unless a folder is that of a run."""
    if not run.exists():
        raise UserError(f"no such folder: {run}; give a run folder, such as runs/demo")
    if not (run / "stages").is_dir():
        raise UserError(f"{run}: is not a run folder; give one, such as runs/demo")


def numbers(text: str, option: str, example: str) -> list[int]:
    """Return the integers of an option such as `1,2,3`.

    Raises:
        UserError: it is not a list of integers of at least 0.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"{text!r} is not a list of integers of at least 0, such as {example}", option)
    return [int(part) for part in parts]


@contextlib.contextmanager
def named_as_options() -> Iterator[None]:
    """In an error about settings, name the command's options for them."""
    key = re.compile("|".join(rf"(?<![\w./-]){re.escape(name)}(?![\w/-])" for name in OPTIONS))
    try:
        yield
    except UserError as error:
        message = key.sub(lambda found: OPTIONS[found[0]], error.message)
        raise UserError(message, error.setting and OPTIONS.get(error.setting, error.setting)) from None


def load_study(config: str, overrides: Sequence[str], output: Path, *modules: str) -> None:
    """Check the configuration of a study, which tells at once what is wrong there; then load the libraries of its programs.

    Args:
        output: Of the study; it takes the place of `run.dir`.
        modules: See `forks.load_libraries`.

    Raises:
        UserError: The configuration is invalid, or the extra `sweep` is not installed.
    """
    load(config, [*overrides, f"run.dir={json.dumps(str(output))}"])
    with requires_extra("sweep"):
        forks.load_libraries(*modules)


def run_command(work: Callable[[], object]) -> None:
    """Run a command to its end, or until nobody reads its output (`| head`), and exit with its status."""

    def read() -> None:
        try:
            work()
            sys.stdout.flush()
        except BrokenPipeError:
            drop(sys.stdout.fileno())

    to_terminal(True)
    status = guarded(read)
    if status:
        raise typer.Exit(status)
