"""Commands on model folders: init-student, evaluate, predict, serve."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pkd_dist.cli.launch import requires_extra
from pkd_dist.cli.options import (
    DEMO_DATA,
    FileSplitSettings,
    Gap,
    LabelColumn,
    LabelIs,
    LabelSeparator,
    OptionColumns,
    TaskKind,
    TaskName,
    TextColumns,
    columns_of,
    data_or_demo,
    named_as_options,
    numbers,
    run_command,
    split_overrides,
    task_overrides,
)
from pkd_dist.errors import UserError
from pkd_dist.files import folder_written_atomically, write_json

MaxLength = Annotated[
    int | None,
    typer.Option(
        min=4,
        help="Longest input in tokens; longer ones are truncated. Default: as an export was trained, else the model's.",
    ),
]


def init_student(
    teacher: Annotated[str, typer.Option(help="Hugging Face folder of a fine-tuned classifier.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    layers: Annotated[str, typer.Option(help="Teacher layers to copy, counted from 0, such as 2,6,10.")],
) -> None:
    """Make a student from chosen teacher layers (counted from 0), as a Hugging Face folder.

    Example: pkd init-student --teacher runs/demo/teacher --layers 1,3,5 --output student
    """

    def work() -> None:
        if output.exists():
            raise UserError(f"--output: {output} exists; choose a new folder")
        if not output.absolute().parent.is_dir():
            raise UserError(f"--output: no such folder: {output.absolute().parent}")
        from pkd_dist.config.load import load
        from pkd_dist.model import compatibility, encoder, student

        chosen = numbers(layers, "--layers", "2,6,10")
        folder = encoder.locate(teacher, "--teacher")
        tokenizer = encoder.load_tokenizer(folder, "--teacher")
        compatibility.require_compatible(encoder.load_config(folder, "--teacher"), tokenizer, 1, teacher, "--teacher")
        with named_as_options():
            config = load(None, ["run.dir=unused", f"student.layers={chosen}"])
            model, made_of = student.create(config.student, folder, folder, {}, config.run.seed)
        with folder_written_atomically(output) as temporary:
            encoder.save_model(model, tokenizer, temporary)
        print(f"{output}: {encoder.parameter_count(model):,} parameters, {made_of}")

    run_command(work)


def evaluate(
    model: Annotated[str, typer.Option(help="Hugging Face folder of a fine-tuned classifier, such as RUN/export.")],
    task: TaskName = "sst2",
    data: Annotated[
        str | None,
        typer.Option(
            help=f"Data folder, file or hub:NAME, as in `pkd prepare`. Default, for sst2 only: the demo data, {DEMO_DATA}."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Split with labels to score: train, dev, test, or dev_mismatched of MNLI.")
    ] = "dev",
    text: TextColumns = None,
    label: LabelColumn = None,
    kind: TaskKind = None,
    label_separator: LabelSeparator = None,
    options: OptionColumns = None,
    label_is: LabelIs = None,
    gap: Gap = None,
    split_setting: FileSplitSettings = None,
    class_name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL=NAME", help="Name of a label of the data in the model, where they differ; repeat it."
        ),
    ] = None,
    positive: Annotated[
        str | None, typer.Option(help="Positive class of two; default: the task's own, or the rarer one in training.")
    ] = None,
    max_length: MaxLength = None,
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
        from pkd_dist.data import tasks
        from pkd_dist.evaluation.folder import evaluate_folder
        from pkd_dist.evaluation.inputs import Form
        from pkd_dist.evaluation.results import BUSY_SPREAD
        from pkd_dist.export import manifest
        from pkd_dist.model import encoder

        folder = data_or_demo(data, task)
        settings: dict[str, object] = {
            "name": task, "data": folder, "text": text, "label": columns_of(label), "kind": kind, "positive": positive,
            "label_separator": label_separator, "options": columns_of(options), "label_is": label_is, "gap": gap,
        }  # fmt: skip
        settings["class_names"] = _class_names(class_name) if class_name else None
        if task == "custom" and not label:
            raise UserError("is missing; a score needs labels", "--label")
        overrides = [f"evaluate.batch_size={batch_size}", *task_overrides(settings), *split_overrides(split_setting)]
        with named_as_options():
            config = load(None, ["run.dir=unused", *overrides])
            trained = manifest.find(encoder.locate(model, "--model"))
            Form(trained.get("pair")).require(len(tasks.resolve(config.task).text) > 1, "--task")
            length = max_length or trained.get("max_length")
            figures = evaluate_folder(model, config.task, config.evaluate, split, length)
        print(json.dumps(figures, indent=2))
        if figures["spread"] > BUSY_SPREAD:
            print("pkd: the machine was busy while speed was measured (see spread)", file=sys.stderr)
        if output is not None:
            write_json(output, figures)

    run_command(work)


def _class_names(given: Sequence[str]) -> dict[str, str]:
    """Return label value -> class name of options LABEL=NAME."""
    pairs = [each.partition("=") for each in given]
    if bad := next((each for each, pair in zip(given, pairs, strict=True) if not pair[1]), None):
        raise UserError(f"{bad!r} is not LABEL=NAME, such as 0=negative", "--class-name")
    return {label: name for label, _, name in pairs}


def predict(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; none: read them from --file.")] = None,
    model: Annotated[
        str, typer.Option(help="Hugging Face folder of a fine-tuned classifier, such as RUN/export.")
    ] = "",
    file: Annotated[
        str,
        typer.Option(
            help="A table (.csv, .tsv, .jsonl, .parquet), or one text a line, blank lines are skipped; `-`: standard input."
        ),
    ] = "-",
    text: Annotated[
        list[str] | None,
        typer.Option(help="A text column of the table; give it twice for pairs. Default: those of the training data."),
    ] = None,
    pair: Annotated[
        bool, typer.Option("--pair", help="Each line is a pair, separated by a tab. Default: as an export was trained.")
    ] = False,
    options: OptionColumns = None,
    gap: Gap = None,
    max_length: MaxLength = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts in one forward pass.")] = 32,
) -> None:
    """Classify texts with any fine-tuned folder: one JSON object a line, with label names and probabilities.

    Where a text can have several classes, an answer has `labels`, those with a score above 0.5, and the `scores` of all. A model of
    multiple choice needs a table; its answers have the index of the chosen option (`choice`), its text and all probabilities.

    The other columns of a table are kept; one that has the name of a key of the answer, such as label, becomes input_label. Values that
    JSON does not have, such as dates, become text, infinity and NaN become null.
    A text that is longer than the model reads is truncated, and its answer says so.

    Example: pkd predict --model runs/demo/export "A thoroughly engaging film."

    Example: pkd predict --model runs/demo/export --file reviews.csv --text review > predictions.jsonl

    Example: tail -n +2 reviews.tsv | cut -f1 | pkd predict --model runs/demo/export > predictions.jsonl
    """

    def work() -> None:
        from pkd_dist.evaluation import inputs
        from pkd_dist.evaluation.predict import Predictor
        from pkd_dist.export import manifest
        from pkd_dist.model import encoder

        if sys.__stdout__ is None:
            raise UserError("standard output is closed, and the answers are written there; redirect it to a file")
        if not model:
            raise UserError("--model is missing; give a fine-tuned folder, such as RUN/export")
        if texts and file != "-":
            raise UserError("--file: give texts or a file, not both")
        trained = manifest.find(encoder.locate(model, "--model"))
        known = inputs.form_of(trained, options, gap)
        notes: list[str] = []
        given = inputs.read(texts or (), file, text or (), pair, known, notes)
        choices = known.task(tuple(text or known.columns)).choices
        predictor = Predictor(model, max_length or trained.get("max_length"), choices)
        if predictor.regression_by_default and not trained:
            print(
                f"pkd: --model: {model} has one output and no problem_type in its config.json; it is taken for a regression",
                file=sys.stderr,
            )
        typed = not texts and file == "-" and sys.stdin.isatty()
        if isinstance(sys.stdout, io.TextIOWrapper):  # half a surrogate pair becomes an escape of JSON
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
        try:
            with named_as_options():
                for answer in predictor(given, 1 if typed else batch_size):
                    print(json.dumps(answer, ensure_ascii=False), flush=typed or batch_size == 1)
        except UserError as error:
            if predictor.answered and not typed:
                raise UserError(f"{error}; the {predictor.answered:,} input(s) before it are answered") from None
            raise
        if not predictor.answered:
            source = "standard input" if file == "-" else file
            raise UserError(
                f"{source} has no text; give texts as arguments, in --file, or one per line on standard input"
            )
        for note in notes:
            print(f"pkd: {note}", file=sys.stderr)
        if predictor.truncated:
            count = f"{predictor.truncated:,} of {predictor.answered:,} {'examples' if choices else 'texts'}"
            print(f"pkd: {count} were truncated to {predictor.max_length} tokens", file=sys.stderr)

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
            from pkd_dist.export.runtime import ONNX_FILES
            from pkd_dist.serve.requests import Limits
            from pkd_dist.serve.server import serve as run_server

            if format is not None and format not in ONNX_FILES:
                raise UserError(f"{format!r} is unknown; allowed: {', '.join(ONNX_FILES)}", "--format")
            limits = Limits(
                texts=min(Limits.texts, max_queue), body_bytes=max_body_bytes, text_characters=max_text_characters,
                batch=max_batch, delay_seconds=max_delay_ms / 1e3, queue=max_queue, concurrency=max_concurrency,
            )  # fmt: skip
            run_server(folder, host, port, limits, format, threads)

    run_command(work)
