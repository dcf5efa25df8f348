"""The command line: `launcher/train.py` (a whole run) and `pkd` (single steps).

Whatever ends a run early ends here: one line on stderr from rank 0, the traceback in the rank's log file, and the exit
status of `errors.py`.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from pkd_dist.config import deepspeed as ds_config
from pkd_dist.config import load as config_load
from pkd_dist.config import reference as config_reference_module
from pkd_dist.config import schema
from pkd_dist.data.tasks import GLUE
from pkd_dist.errors import UserError
from pkd_dist.telemetry.log import to_terminal

if TYPE_CHECKING:
    pass

from pkd_dist.cli.launch import STAGE_NAMES, guarded, leave, run

app = typer.Typer(
    help="Single steps of Patient Knowledge Distillation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Check, show and document run configurations.", no_args_is_help=True)
app.add_typer(config_app, name="config")
metrics_app = typer.Typer(
    help="Document a run's metrics; see and sweep where Prometheus finds runs.", no_args_is_help=True
)
app.add_typer(metrics_app, name="metrics")

ConfigFile = Annotated[str, typer.Option("--config", help="The run's YAML.", metavar="FILE")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings that win over the file's.", metavar="section.key=value")
]


def _pipeline_command(name: str, last: str, what: str) -> None:
    def command(config: ConfigFile, overrides: Overrides = None) -> None:
        stages = STAGE_NAMES[: STAGE_NAMES.index(last) + 1]
        raise typer.Exit(run(config, overrides or [], ",".join(stages)))

    command.__doc__ = f"{what}\n\nExample: pkd {name} --config configs/demo.yaml"
    app.command(name)(command)


_pipeline_command("finetune", "teacher", "Fine-tune a run's teacher (and prepare its data).")
_pipeline_command("cache", "cache", "Build a run's teacher cache, with whatever it needs before.")
_pipeline_command("distill", "distill", "Distil a run's student, with whatever it needs before.")


@app.command()
def report(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings that win over the file's; with --compare: run folders.", metavar="section.key=value|RUN"
        ),
    ] = None,
    config: Annotated[str | None, typer.Option("--config", help="The run's YAML.", metavar="FILE")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="One page of several finished runs, side by side.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="With --compare: the page to write; default: comparison.html.")
    ] = None,
) -> None:
    """Write a run's report, with whatever it needs before; or one page of several runs side by side.

    Example: pkd report --config configs/demo.yaml

    Example: pkd report --compare runs/kd runs/pkd --output kd-or-pkd.html
    """
    if config is not None and not compare and output is None:
        raise typer.Exit(run(config, arguments or [], ",".join(STAGE_NAMES)))

    def work() -> None:
        if not compare or config is not None:
            raise UserError("pkd report: give either --config FILE, or --compare RUN RUN ... [--output FILE]")
        from pkd_dist.report import pages

        page = output or Path("comparison.html")
        pages.write_comparison([Path(folder) for folder in arguments or []], page)
        print(page)

    _exit(work)


@app.command()
def export(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="`verify DIR`; or settings that win over the file's.", metavar="[verify DIR | section.key=value]"
        ),
    ] = None,
    config: Annotated[str | None, typer.Option("--config", help="The run's YAML.", metavar="FILE")] = None,
    formats: Annotated[
        str | None, typer.Option(help="Files to write in place of export.formats, such as onnx,onnx-int8,triton.")
    ] = None,
    from_checkpoint: Annotated[
        Path | None, typer.Option(help="RUN/checkpoints/step-N, of any number of ranks and any ZeRO stage.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="With --from-checkpoint: folder to write; must not exist.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="With --from-checkpoint: float32 (master weights), float16 or bfloat16.")
    ] = "float32",
) -> None:
    """Export a run's student, with whatever it needs before; or the student as it was at a checkpoint; or verify an export.

    Example: pkd export --config configs/demo.yaml --formats onnx-int8,triton

    Example: pkd export verify runs/demo/export

    Example: pkd export --from-checkpoint runs/demo/checkpoints/step-00000532 --output student
    """
    if config is not None and from_checkpoint is None and output is None and (overrides or [""])[0] != "verify":
        wanted = [f"export.formats={json.dumps(formats.split(','))}"] if formats is not None else []
        stages = ",".join(STAGE_NAMES[: STAGE_NAMES.index("export") + 1])
        raise typer.Exit(run(config, [*(overrides or []), *wanted], stages))

    def work() -> None:
        alone = config is None and formats is None
        if alone and from_checkpoint is None and output is None and (overrides or [""])[0] == "verify":
            return _verify_export((overrides or [])[1:])
        if from_checkpoint is None or output is None or not alone or overrides:
            raise UserError(
                "pkd export: give either --config FILE, or --from-checkpoint RUN/checkpoints/step-N --output DIR, or verify DIR"
            )
        if dtype not in ("float32", "float16", "bfloat16"):
            raise UserError(f"--dtype: {dtype!r} is not allowed; use float32, float16 or bfloat16")
        from pkd_dist.export import hf

        made = hf.from_checkpoint(from_checkpoint, output, dtype)
        seen = (
            "not evaluated" if made["epoch"] is None else f"dev {made['main_metric']:.4f} after epoch {made['epoch']}"
        )
        print(f"{output}: the student at step {made['step']} ({seen}), {made['parameters']:,} parameters in {dtype}")

    _exit(work)


def _verify_export(folders: list[str]) -> None:
    from pkd_dist.export import manifest

    if len(folders) != 1:
        raise UserError("pkd export verify: give one folder, such as runs/demo/export")
    made = manifest.verify(Path(folders[0]))
    print(f"{folders[0]}: {len(made['files'])} files as they were written")


def _task_overrides(task: str, data: str, text: list[str] | None, label: str | None, kind: str | None) -> list[str]:
    """Options of a task as overrides; JSON, so that a value is taken as it was typed."""
    given = {"name": task, "data": data, "text": text, "label": label, "kind": kind}
    return [f"task.{key}={json.dumps(value)}" for key, value in given.items() if value]


def _exit(work: Callable[[], Any]) -> None:
    to_terminal(True)
    status = guarded(work)
    if status:
        raise typer.Exit(status)


@app.command()
def prepare(
    task: Annotated[str, typer.Option(help=f"A GLUE task ({', '.join(GLUE)}), or `custom`.")] = "sst2",
    data: Annotated[
        str,
        typer.Option(
            help="Folder of train, dev and perhaps test as .tsv, .csv, .jsonl or .parquet, or as GLUE ships it; or "
            "hub:NAME or hub:NAME:CONFIGURATION."
        ),
    ] = "data/movie-reviews",
    text: Annotated[list[str] | None, typer.Option(help="`custom`: a text column; give it twice for pairs.")] = None,
    label: Annotated[str | None, typer.Option(help="`custom`: the label column.")] = None,
    kind: Annotated[str | None, typer.Option(help="`custom`: classification or regression.")] = None,
    model: Annotated[
        str | None, typer.Option(help="A teacher: also count the tokens that its tokenizer makes of the text.")
    ] = None,
    max_length: Annotated[int, typer.Option(help="With --model: longest input, tokens; longer is cut.")] = 128,
) -> None:
    """Check a data folder and say what is in it: counts, classes, lengths, what was left out, what stands twice.

    Example: pkd prepare --task sst2 --data data/movie-reviews
    """

    def work() -> None:
        import numpy as np
        from rich.console import Console

        from pkd_dist.data import summary, tasks
        from pkd_dist.data.examples import Split
        from pkd_dist.data.sources import available
        from pkd_dist.data.text import read

        overrides = ["run.dir=unused", *_task_overrides(task, data, text, label, kind)]
        resolved = tasks.resolve(config_load.load(None, [*overrides, f"task.max_length={max_length}"]).task)
        token_lengths = None
        if model is not None:
            from pkd_dist.model import encoder

            tokenizer = encoder.load_tokenizer(encoder.locate(model, "--model"))

            def token_lengths(split: Split) -> np.ndarray:
                encoded = tokenizer(*map(list, split.texts), truncation=False, verbose=False)["input_ids"]
                return np.array([len(ids) for ids in encoded])

        splits: dict[str, Split] = {}
        for name in dict.fromkeys(("train", "dev", *available(data, resolved))):
            splits[name] = read(data, name, resolved, splits["train"].classes or None if splits else None)
        print("\n".join(summary.all_notes(splits)) + "\n")
        console = Console(highlight=False)
        console.width = max(console.width, 0 if console.is_terminal else 140)
        console.print(summary.splits_table(splits, max_length, token_lengths))
        if not resolved.regression:
            console.print()
            console.print(summary.classes_table(splits, resolved))

    _exit(work)


@app.command("init-student")
def init_student(
    teacher: Annotated[str, typer.Option(help="Hugging Face folder of a fine-tuned classifier.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not exist.")],
    layers: Annotated[str, typer.Option(help="Encoder layers to copy, 0-based, such as 2,6,10.")],
) -> None:
    """Make a student of chosen teacher layers (0-based), as a Hugging Face folder.

    Example: pkd init-student --teacher runs/demo/teacher --layers 1,3,5 --output student
    """

    def work() -> None:
        if output.exists():
            raise UserError(f"--output: {output} exists; choose a new folder")
        if not output.absolute().parent.is_dir():
            raise UserError(f"--output: no such folder: {output.absolute().parent}")
        config = config_load.load(None, ["run.dir=unused", f"student.layers=[{layers}]"])
        from pkd_dist.model import compatibility as fit
        from pkd_dist.model import encoder, student

        folder = encoder.locate(teacher, "--teacher")
        tokenizer = encoder.load_tokenizer(folder, "--teacher")
        fit.require_compatible(encoder.load_config(folder, "--teacher"), tokenizer, 1, teacher, "--teacher")
        model, what = student.create(config.student, folder, folder, {}, config.run.seed)
        encoder.save_model(model, tokenizer, output)
        print(f"{output}: {encoder.parameter_count(model):,} parameters, {what}")

    _exit(work)


def _as_option(key: re.Match[str]) -> str:
    return "--" + (key[1] or {"name": "task"}.get(key[2], key[2])).replace("_", "-")


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="Hugging Face folder of a fine-tuned classifier, such as RUN/export.")],
    task: Annotated[str, typer.Option(help="A GLUE task, or `custom`.")] = "sst2",
    data: Annotated[str, typer.Option(help="Data folder.")] = "data/movie-reviews",
    split: Annotated[str, typer.Option(help="One with labels: dev, of MNLI also dev_mismatched, or test.")] = "dev",
    text: Annotated[list[str] | None, typer.Option(help="`custom`: a text column; give it twice for pairs.")] = None,
    label: Annotated[str | None, typer.Option(help="`custom`: the label column.")] = None,
    kind: Annotated[str | None, typer.Option(help="`custom`: classification or regression.")] = None,
    max_length: Annotated[int, typer.Option(help="Longest input, tokens.")] = 128,
    batch_size: Annotated[int, typer.Option(help="Examples of one forward pass.")] = 64,
    output: Annotated[Path | None, typer.Option(help="Also write the figures to this JSON file.")] = None,
) -> None:
    """Score any fine-tuned folder on a split, in float32, with its size and speed.

    Example: pkd evaluate --model runs/demo/export --task sst2 --data data/movie-reviews --split test
    """

    def work() -> None:
        from pkd_dist.pipeline import evaluate_folder

        if output is not None and not output.parent.is_dir():
            raise UserError(f"--output: no such folder: {output.parent}")
        if output is not None and output.exists():
            raise UserError(f"--output: {output} is there already; choose another name")
        overrides = [f"task.max_length={max_length}", f"evaluate.batch_size={batch_size}"]
        overrides += [f"teacher.model={json.dumps(model)}", *_task_overrides(task, data, text, label, kind)]
        config = config_load.load(None, ["run.dir=unused", *overrides])
        try:
            figures = evaluate_folder(config, split)
        except UserError as error:  # in the words that were typed
            raise UserError(re.sub(r"\b(?:teacher\.(model)|task\.(\w+))\b(?=:)", _as_option, str(error))) from None
        print(json.dumps(figures, indent=2))
        if output is not None:
            output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")

    _exit(work)


@app.command()
def predict(
    texts: Annotated[list[str] | None, typer.Argument(help="Sentences; none: read them from --file.")] = None,
    model: Annotated[
        str, typer.Option(help="Hugging Face folder of a fine-tuned classifier, such as RUN/export.")
    ] = "",
    file: Annotated[str, typer.Option(help="A sentence a line, blank lines left out; `-`: standard input.")] = "-",
    pair: Annotated[bool, typer.Option("--pair", help="A tab separates the two texts of a pair.")] = False,
    max_length: Annotated[
        int | None,
        typer.Option(min=4, help="Longest input, tokens; longer is cut. Default: 128, or what the model reads."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sentences of one forward pass.")] = 32,
) -> None:
    """Answer sentences with any fine-tuned folder: a JSON object a line, with label names and probabilities.

    Example: pkd predict --model runs/demo/export "A thoroughly engaging film."

    Example: cut -f1 reviews.tsv | pkd predict --model runs/demo/export > answers.jsonl
    """

    def work() -> None:
        from pkd_dist.evaluation import predict as answers

        if not model:
            raise UserError("--model is missing; give a fine-tuned folder, such as RUN/export")
        if texts and file != "-":
            raise UserError("--file: give sentences or a file, not both")
        given = [(f"text {i}", text) for i, text in enumerate(texts, start=1)] if texts else answers.lines(file)
        size = 1 if not texts and file == "-" and sys.stdin.isatty() else batch_size
        try:
            for line in answers.predict(model, given, pair, max_length, size):
                print(line, flush=size == 1)
            sys.stdout.flush()
        except BrokenPipeError:  # who reads has seen enough: `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    _exit(work)


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An export with an ONNX file, such as RUN/export.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8080,
    format: Annotated[str | None, typer.Option(help="onnx, onnx-fp16 or onnx-int8; default: int8 where it is.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of ONNX Runtime; default: one for each core.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Texts of one forward pass.")] = 16,
    max_delay_ms: Annotated[float, typer.Option(min=0, help="A batch waits so long for more.")] = 2.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Texts that wait; more is 429.")] = 256,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Requests at once; more is 503.")] = 256,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Of a request; more is 413.")] = 1 << 20,
    max_text_characters: Annotated[int, typer.Option(min=1, help="Of a text; more is 413.")] = 20_000,
) -> None:
    """Serve an export over HTTP, to try it: POST /predict, GET /healthz, GET /metrics. For production take Triton.

    Example: pkd serve runs/demo/export --port 8080

    Example: curl localhost:8080/predict -H 'content-type: application/json' -d '{"text": "A thoroughly engaging film."}'
    """

    def work() -> None:
        try:
            from pkd_dist.serve.app import Limits
            from pkd_dist.serve.server import serve as run_server
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
                raise
            raise UserError(f"pkd serve needs {error.name}: pip install -e '.[serve]'") from None
        limits = Limits(
            texts=min(Limits.texts, max_queue), body_bytes=max_body_bytes, text_characters=max_text_characters, batch=max_batch,
            delay_seconds=max_delay_ms / 1e3, queue=max_queue, concurrency=max_concurrency,
        )  # fmt: skip
        run_server(folder, host, port, limits, format, threads)

    _exit(work)


@app.command()
def compare(
    config: ConfigFile,
    output: Annotated[Path, typer.Option(help="Folder of all runs and of the table.")],
    overrides: Overrides = None,
    methods: Annotated[
        str, typer.Option(help="Among finetune, kd, pkd-skip, pkd-last, random, first-k, tokens, seed.")
    ] = "finetune,kd,pkd-skip,pkd-last",
    method: Annotated[
        list[str] | None, typer.Option(help='One of your own: "NAME: section.key=value ...". May be given again.')
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the students.")] = "1,2,3",
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; they share the cores.")] = 1,
    launcher: Annotated[str, typer.Option(help="Command before launcher/train.py; default: this Python.")] = "",
) -> None:
    """Train several methods over several seeds on one teacher and one cache; print and plot the table.

    Example: pkd compare --config configs/demo.yaml --output runs/compare --methods finetune,kd,pkd-skip --seeds 1,2,3

    Example: pkd compare --config my.yaml --output runs/pairs --method "pairs: distill.patience=[1,5]" --jobs 2
    """

    def work() -> None:
        from rich.console import Console
        from rich.table import Table

        from pkd_dist.comparison import runner as comparison

        try:
            chosen = [int(seed) for seed in seeds.split(",")]
        except ValueError:
            raise UserError(f"--seeds: {seeds!r} is not a list of numbers such as 1,2,3") from None
        named = comparison.parse_methods(methods, method or [])
        made = comparison.Comparison(config, overrides or [], named, chosen, output, launcher, jobs).run()
        header, body = comparison.rows(made)
        table = Table(*header)
        for row in body:
            table.add_row(*row)
        Console().print(table)
        print(f"{made['metric']} and agreement in percent, ± half of the 95% interval of the mean over seeds")
        print(f"table: {output / 'compare.md'}\nplot:  {output / 'compare.png'}\ndata:  {output / 'compare.json'}")

    _exit(work)


@config_app.command("check")
def config_check(file: Annotated[str, typer.Argument(metavar="FILE")], overrides: Overrides = None) -> None:
    """Check a run configuration and the DeepSpeed JSON it names.

    Example: pkd config check configs/demo.yaml
    """

    def work() -> None:
        ds_config.load_deepspeed(config_load.load(file, overrides or []), file)
        print(f"{file}: valid")

    _exit(work)


@config_app.command("show")
def config_show(file: Annotated[str, typer.Argument(metavar="FILE")], overrides: Overrides = None) -> None:
    """Print a run configuration as resolved, defaults included.

    Example: pkd config show configs/demo.yaml train.epochs=2
    """
    _exit(
        lambda: print(
            yaml.safe_dump(config_load.load(file, overrides or []).model_dump(mode="json"), sort_keys=False), end=""
        )
    )


@config_app.command("reference")
def config_reference() -> None:
    """Print the documented schema as Markdown (docs/configuration.md).

    Example: pkd config reference > docs/configuration.md
    """
    print(config_reference_module.reference(), end="")


@metrics_app.command("reference")
def metrics_reference() -> None:
    """Print the metrics of a run as Markdown (docs/metrics.md).

    Example: pkd metrics reference > docs/metrics.md
    """
    from pkd_dist.telemetry.metrics import reference

    defaults = schema.Metrics()
    print(reference(defaults.host, defaults.port), end="")


@metrics_app.command("targets")
def metrics_targets(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="As metrics.discovery_dir of the runs.")],
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Remove the files of runs that have been silent for 10 minutes.")
    ] = False,
) -> None:
    """List where Prometheus finds runs, and how long ago each gave a sign of life.

    Example: pkd metrics targets /shared/pkd-targets --sweep
    """

    def work() -> None:
        from pkd_dist.telemetry import discovery

        try:
            found = list(discovery.targets(folder))
        except OSError as error:
            raise UserError(f"{folder}: not a folder that can be written ({error.strerror})") from None
        removed = {gone.file for gone in discovery.sweep(folder)} if sweep else set()
        for one in found:
            state = (
                "removed" if one.file in removed else "stale" if one.stale else "alive" if one.address else "unreadable"
            )
            print(f"{one.address or one.file.name}\t{state}\tsilent for {one.silent_seconds:.0f} s\t{one.run}")

    _exit(work)


@metrics_app.command("withdraw")
def metrics_withdraw(config: ConfigFile) -> None:
    """Remove what a run that was killed left for Prometheus to find; its next start does so too.

    Example: pkd metrics withdraw --config runs/demo/config.yaml
    """

    def work() -> None:
        from pkd_dist.lock import Lock
        from pkd_dist.telemetry import discovery

        settings = config_load.load(config)
        if settings.metrics.discovery_dir:
            run = Path(settings.run.dir)
            lock = Lock(run).acquire() if run.is_dir() else None  # not what another job of this run has published
            discovery.withdraw(Path(settings.metrics.discovery_dir), run)
            if lock:
                lock.release()

    _exit(work)


def main() -> None:
    """Entry point of `pkd`."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        app()
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else int(bool(end.code)))


if __name__ == "__main__":
    main()
