"""`pkd`: a table from command names to functions; their signatures are the options."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import typer
from typer.core import TyperCommand

from pkd_dist.cli import (
    answers_command,
    cascade_command,
    compare_command,
    config_commands,
    data_commands,
    metrics_commands,
    model_commands,
    run_commands,
    runs_commands,
    sweep_command,
)
from pkd_dist.cli.launch import leave, unprinted
from pkd_dist.cli.run_commands import stage_command
from pkd_dist.cli.usage import Group
from pkd_dist.errors import UserError
from pkd_dist.telemetry.output import open_missing

COMMANDS: dict[str, Callable[..., None]] = {
    "prepare": data_commands.prepare,
    "finetune": stage_command("finetune", "teacher", "Fine-tune a run's teacher, and prepare its data first."),
    "cache": stage_command("cache", "cache", "Build a run's teacher cache, and what it needs first."),
    "init-student": model_commands.init_student,
    "distill": stage_command(
        "distill", "report", "Distil a run's student from data to report: the launcher with one rank."
    ),
    "evaluate": model_commands.evaluate,
    "answers": answers_command.answers,
    "export": run_commands.export,
    "report": stage_command("report", "report", "Write a run's report, and what it needs first."),
    "predict": model_commands.predict,
    "serve": model_commands.serve,
    "cascade": cascade_command.cascade,
    "compare": compare_command.compare,
    "sweep": sweep_command.sweep,
}
GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "config": (
        "Check, show and document run configurations.",
        {
            "check": config_commands.check,
            "show": config_commands.show,
            "reference": config_commands.reference,
        },
    ),
    "metrics": (
        "Document a run's metrics; list and clean up where Prometheus finds runs.",
        {
            "reference": metrics_commands.reference,
            "targets": metrics_commands.targets,
            "withdraw": metrics_commands.withdraw,
        },
    ),
    "runs": ("Clean up run folders.", {"clean": runs_commands.clean}),
}


class _Command(TyperCommand):
    """A command that rejects a repeated option that takes one value; typer would silently use the last."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override] # typer vendors click
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for option in given:
            takes_one = not (getattr(option, "multiple", True) or getattr(option, "is_flag", False))
            if takes_one and given.count(option) > 1:
                name = max(option.opts, key=len)
                print(f"pkd: {name} is given twice; it takes one value", file=sys.stderr)
                raise typer.Exit(UserError.exit_status)
        return super().parse_args(ctx, args)


def make_app() -> typer.Typer:
    app = typer.Typer(
        cls=Group,
        help="Single steps of Patient Knowledge Distillation.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for name, command in COMMANDS.items():
        app.command(name, cls=_Command)(command)
    for name, (what, commands) in GROUPS.items():
        group = typer.Typer(help=what, no_args_is_help=True)
        for subcommand, command in commands.items():
            group.command(subcommand, cls=_Command)(command)
        app.add_typer(group, name=name)
    return app


app = make_app()


def main() -> None:
    """Run `pkd`."""
    open_missing()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        app(prog_name="pkd")
    except OSError as error:  # of commands that only print, and of their help
        leave(unprinted(error))
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else int(bool(end.code)))
