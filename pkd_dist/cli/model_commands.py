"""Commands on model folders: init-student, evaluate, predict, serve."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from pkd_dist.cli.launch import requires_extra
from pkd_dist.cli.options import (
    LabelColumn,
    TaskKind,
    TaskName,
    TextColumns,
    named_as_options,
    run_command,
    task_overrides,
)
from pkd_dist.errors import UserError
from pkd_dist.files import folder_written_atomically, write_json


def init_student(
    teacher: Annotated[str, typer.Option(help="Hugging Face folder of a fine-tuned classifier.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    layers: Annotated[str, typer.Option(help="Encoder layers to copy, 0-based, such as 2,6,10.")],
) -> None:
    """Make a student from chosen teacher layers (0-based), as a Hugging Face folder.

    Example: pkd init-student --teacher runs/demo/teacher --layers 1,3,5 --output student
    """

    def work() -> None:
        if output.exists():
            raise UserError(f"--output: {output} exists; choose a new folder")
        if not output.absolute().parent.is_dir():
            raise UserError(f"--output: no such folder: {output.absolute().parent}")
        from pkd_dist.config.load import load
        from pkd_dist.model import compatibility, encoder, student

        config = load(None, ["run.dir=unused", f"student.layers=[{layers}]"])
        folder = encoder.locate(teacher, "--teacher")
        tokenizer = encoder.load_tokenizer(folder, "--teacher")
        compatibility.require_compatible(encoder.load_config(folder, "--teacher"), tokenizer, 1, teacher, "--teacher")
        model, made_of = student.create(config.student, folder, folder, {}, config.run.seed)
        with folder_written_atomically(output) as temporary:
            encoder.save_model(model, tokenizer, temporary)
        print(f"{output}: {encoder.parameter_count(model):,} parameters, {made_of}")

    run_command(work)


def evaluate(
    model: Annotated[str, typer.Option(help="Hugging Face folder of a fine-tuned classifier, such as RUN/export.")],
    task: TaskName = "sst2",
    data: Annotated[str, typer.Option(help="Data folder, as of `pkd prepare`.")] = "data/movie-reviews",
    split: Annotated[str, typer.Option(help="A split with labels: dev, test, or dev_mismatched of MNLI.")] = "dev",
    text: TextColumns = None,
    label: LabelColumn = None,
    kind: TaskKind = None,
    max_length: Annotated[int, typer.Option(help="Longest input in tokens; longer ones are truncated.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Examples in one forward pass.")] = 64,
    output: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
) -> None:
    """Score any fine-tuned folder on a split, in float32, with its size and speed.

    Example: pkd evaluate --model runs/demo/export --task sst2 --data data/movie-reviews --split test
    """

    def work() -> None:
        if output is not None and not output.parent.is_dir():
            raise UserError(f"--output: no such folder: {output.parent}")
        if output is not None and output.exists():
            raise UserError(f"--output: {output} exists; choose another name")
        from pkd_dist.config.load import load
        from pkd_dist.evaluation.folder import evaluate_folder

        options = {"name": task, "data": data, "text": text, "label": label, "kind": kind}
        overrides = [f"task.max_length={max_length}", f"evaluate.batch_size={batch_size}", *task_overrides(options)]
        with named_as_options():
            config = load(None, ["run.dir=unused", *overrides])
            figures = evaluate_folder(model, config.task, config.evaluate, split)
        print(json.dumps(figures, indent=2))
        if output is not None:
            write_json(output, figures)

    run_command(work)


def predict(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; none: read them from --file.")] = None,
    model: Annotated[
        str, typer.Option(help="Hugging Face folder of a fine-tuned classifier, such as RUN/export.")
    ] = "",
    file: Annotated[str, typer.Option(help="One text a line, blank lines are skipped; `-`: standard input.")] = "-",
    pair: Annotated[bool, typer.Option("--pair", help="Each line is a pair, separated by a tab.")] = False,
    max_length: Annotated[
        int | None,
        typer.Option(min=4, help="Longest input in tokens; longer ones are truncated. Default: at most 128."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in one forward pass.")] = 32,
) -> None:
    """Classify texts with any fine-tuned folder: one JSON object a line, with label names and probabilities.

    Example: pkd predict --model runs/demo/export "A thoroughly engaging film."

    Example: cut -f1 reviews.tsv | pkd predict --model runs/demo/export > predictions.jsonl
    """

    def work() -> None:
        from pkd_dist.evaluation import predict as prediction

        if not model:
            raise UserError("--model is missing; give a fine-tuned folder, such as RUN/export")
        if texts and file != "-":
            raise UserError("--file: give texts or a file, not both")
        given = [(f"text {i}", text) for i, text in enumerate(texts, start=1)] if texts else prediction.lines(file)
        typed = not texts and file == "-" and sys.stdin.isatty()
        try:
            for line in prediction.predict(model, given, pair, max_length, 1 if typed else batch_size):
                print(line, flush=typed or batch_size == 1)
            sys.stdout.flush()
        except BrokenPipeError:  # the reader has seen enough: `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    run_command(work)


def serve(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An export with an ONNX file, such as RUN/export.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8080,
    format: Annotated[
        str | None, typer.Option(help="onnx, onnx-fp16 or onnx-int8; default: int8 where it exists.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of ONNX Runtime; default: one for each core.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Texts in one forward pass.")] = 16,
    max_delay_ms: Annotated[float, typer.Option(min=0, help="How long a batch waits for more texts.")] = 2.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Texts waiting; above it: 429.")] = 256,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Requests at once; above it: 503.")] = 256,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Size of a request; above it: 413.")] = 1 << 20,
    max_text_characters: Annotated[int, typer.Option(min=1, help="Length of a text; above it: 413.")] = 20_000,
) -> None:
    """Serve an export over HTTP, to try it: POST /predict, GET /healthz, GET /metrics. For production use Triton.

    Example: pkd serve runs/demo/export --port 8080

    Example: curl localhost:8080/predict -H 'content-type: application/json' -d '{"text": "A thoroughly engaging film."}'
    """

    def work() -> None:
        with requires_extra("serve"):
            from pkd_dist.serve.requests import Limits
            from pkd_dist.serve.server import serve as run_server

            limits = Limits(
                texts=min(Limits.texts, max_queue), body_bytes=max_body_bytes, text_characters=max_text_characters,
                batch=max_batch, delay_seconds=max_delay_ms / 1e3, queue=max_queue, concurrency=max_concurrency,
            )  # fmt: skip
            run_server(folder, host, port, limits, format, threads)

    run_command(work)
