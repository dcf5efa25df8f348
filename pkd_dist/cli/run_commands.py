"""Commands that run a pipeline up to a stage: finetune, cache, distill, export, report."""

from __future__ import annotations

import json
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pkd_dist.cli.launch import launch
from pkd_dist.cli.options import ConfigFile, Overrides, run_command
from pkd_dist.config.schema import ExportFormat
from pkd_dist.errors import UserError
from pkd_dist.stages.base import NAMES

if TYPE_CHECKING:
    from pkd_dist.export.manifest import ExportManifest
    from pkd_dist.stages.base import Markers


def up_to(stage: str) -> tuple[str, ...]:
    """Return the stages up to and including one."""
    return NAMES[: NAMES.index(stage) + 1]


def stage_command(name: str, stage: str, what: str) -> Callable[..., None]:
    """Make the command `pkd NAME`, which runs a pipeline up to a stage."""

    def command(config: ConfigFile, overrides: Overrides = None) -> None:
        raise typer.Exit(launch(config, overrides or [], up_to(stage)))

    command.__doc__ = f"{what}\n\nExample: pkd {name} --config configs/demo.yaml"
    return command


def export(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="`verify DIR`; or settings that override the file's.", metavar="[verify DIR | section.key=value]"
        ),
    ] = None,
    config: Annotated[str | None, typer.Option("--config", help="The run's YAML.", metavar="FILE")] = None,
    formats: Annotated[
        str | None, typer.Option(help="Files to write instead of export.formats, such as onnx,onnx-int8,triton.")
    ] = None,
    from_checkpoint: Annotated[
        Path | None, typer.Option(help="RUN/checkpoints/step-N, of any number of ranks and any ZeRO stage.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="With --from-checkpoint: the folder to write; must not exist.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="With --from-checkpoint: precision of the weights to write, float32 (the master weights, default), float16 "
            "or bfloat16."
        ),
    ] = None,
) -> None:
    """Export a run's student, export a checkpoint, or verify an export.

    With --config, the stages before the export run first where they are not done.

    Example: pkd export --config configs/demo.yaml --formats onnx-int8,triton

    Example: pkd export verify runs/demo/export

    Example: pkd export --from-checkpoint runs/demo/checkpoints/step-00001719 --output student
    """
    given = overrides or []
    options = {
        "--config": config, "--formats": formats, "--from-checkpoint": from_checkpoint, "--output": output, "--dtype": dtype,
    }  # fmt: skip
    named = [option for option, value in options.items() if value is not None]
    wanted: list[str] = []

    def work() -> None:
        if given[:1] == ["verify"]:
            _allow(named, (), "verify DIR")
            _verify(given[1:])
        elif config is not None:
            _allow(named, ("--config", "--formats"), "--config")
            wanted.extend([] if formats is None else [f"export.formats={json.dumps(_formats(formats))}"])
        elif from_checkpoint is not None and output is not None:
            _allow([*named, *given], ("--from-checkpoint", "--output", "--dtype"), "--from-checkpoint")
            _from_checkpoint(from_checkpoint, output, dtype or "float32")
        elif from_checkpoint is not None:
            raise UserError("is missing; --from-checkpoint needs a new folder to write", "--output")
        elif output is not None or dtype is not None:
            raise UserError(f"is missing; {named[-1]} is used only with it", "--from-checkpoint")
        elif given or formats is not None:
            raise UserError(f"is missing; {given[0] if given else '--formats'} is used only with it", "--config")
        else:
            raise UserError("give --config FILE, --from-checkpoint RUN/checkpoints/step-N --output DIR, or verify DIR")

    run_command(work)
    if config is not None:
        raise typer.Exit(launch(config, [*given, *wanted], up_to("export")))


def _allow(given: Sequence[str], allowed: Sequence[str], form: str) -> None:
    if other := [name for name in given if name not in allowed]:
        raise UserError(f"cannot be used with {form}", other[0])


def _formats(given: str) -> list[str]:
    names = [name.strip() for name in given.split(",")]
    allowed = typing.get_args(ExportFormat)
    if unknown := [name for name in names if name not in allowed]:
        raise UserError(f"{unknown[0]!r} is unknown; allowed: {', '.join(allowed)}", "--formats")
    return names


def _verify(folders: Sequence[str]) -> None:
    from pkd_dist.export import manifest

    if len(folders) != 1:
        raise UserError(f"verify takes one folder, such as runs/demo/export, not {len(folders)}")
    verified = manifest.verify(Path(folders[0]))
    print(f"{folders[0]}: {len(verified['files'])} files as they were written")


def _trained(markers: Markers) -> ExportManifest | None:
    """Return what a run's model reads, for its manifest; None where the stage `data` left no marker."""
    from pkd_dist.config import schema
    from pkd_dist.data import tasks
    from pkd_dist.export import manifest

    marker = markers.read("data")
    if marker is None:
        return None
    settings = {key.removeprefix("task."): value for key, value in marker.inputs.items()}
    known = {key: value for key, value in settings.items() if key in schema.Task.model_fields}
    task = schema.Task.model_validate(known)
    own_length = marker.inputs.get("student.max_length")
    return manifest.of_task(tasks.resolve(task), own_length if isinstance(own_length, int) else task.max_length)


def _from_checkpoint(checkpoint: Path, output: Path, dtype: str) -> None:
    if dtype not in ("float32", "float16", "bfloat16"):
        raise UserError(f"--dtype: {dtype!r} is not allowed; use float32, float16 or bfloat16")
    from pkd_dist.export import hf
    from pkd_dist.stages.base import Markers
    from pkd_dist.stages.data import TRIMMED
    from pkd_dist.stages.translation import translate

    run = checkpoint.absolute().parent.parent
    markers = Markers(run, translate)
    marker = markers.read("distill")
    started_from = str(marker.inputs["init.weights"]) if marker else None
    data = markers.read("data")
    trimmed = run / "data" / TRIMMED if data and (data.outputs or {}).get("vocabulary") else None
    made = hf.from_checkpoint(checkpoint, output, dtype, started_from, _trained(markers), trimmed)
    seen = "not evaluated" if made.epoch is None else f"dev {made.main_metric:.4f} after epoch {made.epoch}"
    print(f"{output}: the student at step {made.step} ({seen}), {made.parameters:,} parameters in {dtype}")
