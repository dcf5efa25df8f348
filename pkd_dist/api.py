"""`pkd_dist.distill` and `pkd_dist.sweep`: the two commands as functions, for scripts and notebooks.

Each call is a process of its own, so it needs no main thread, leaves no state behind, and loads neither torch nor DeepSpeed here.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import yaml

from pkd_dist.config.load import load
from pkd_dist.errors import DivergedError, LostRank, Preempted, UserError
from pkd_dist.evaluation.results import Results
from pkd_dist.files import read_object
from pkd_dist.search.processes import python

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

Configuration = str | Path | Mapping[str, object]
"""A YAML file, or its content: section -> key -> value."""


@dataclass(frozen=True)
class Distilled:
    """A finished run.

    Attributes:
        run: The run folder.
        metrics: Content of results_eval.json.
    """

    run: Path
    metrics: Results

    @property
    def export(self) -> Path:
        """The student's Hugging Face folder, with its ONNX files."""
        return self.run / "export"

    @property
    def report(self) -> Path:
        return self.run / "report.html"

    def model(self) -> PreTrainedModel:
        """Return the student as a plain transformers model, in evaluation mode."""
        from pkd_dist.model.encoder import load_model

        found: PreTrainedModel = load_model(str(self.export))
        return found.eval()

    def predict(self, texts: Iterable[str | Sequence[str]], batch_size: int = 32) -> list[dict[str, object]]:
        """Return an answer for each text, or pair of texts, as `pkd predict` does.

        Raises:
            UserError: A text is given to a model of pairs, or a pair to one of texts.
        """
        from pkd_dist.evaluation.inputs import Example
        from pkd_dist.evaluation.predict import Predictor
        from pkd_dist.export import manifest

        trained = manifest.read(self.export)
        count = 2 if trained.get("pair") else 1
        examples: list[Example] = []
        for text in texts:
            given = (text,) if isinstance(text, str) else tuple(text)
            if len(given) != count:
                raise UserError(f"{self.export} reads {count} text(s) at a time, not {len(given)}: {text!r}")
            examples.append(Example(f"text {len(examples) + 1}", given))
        return list(Predictor(str(self.export), trained.get("max_length"))(examples, batch_size))


@dataclass(frozen=True)
class Swept:
    """A finished sweep.

    Attributes:
        folder: Its output.
        finals: Seed -> the winner, trained again.
    """

    folder: Path
    finals: dict[int, Distilled]

    @property
    def best(self) -> Path:
        """The winner's configuration, for `distill`."""
        return self.folder / "best.yaml"

    @property
    def page(self) -> Path:
        return self.folder / "sweep.html"

    def trials(self) -> pd.DataFrame:
        """Return a row for each trial."""
        import pandas as pd

        return pd.read_parquet(self.folder / "trials.parquet")


def distill(config: Configuration, **overrides: object) -> Distilled:
    """Run a whole distillation, or what is left of it, and return its results.

    Args:
        config: As for the launcher.
        overrides: Settings that override it: `train={"epochs": 2}`, or `**{"train.epochs": 2}`.

    Raises:
        UserError: Bad input.
        DivergedError, Preempted, LostRank: See `errors.py`.
    """
    with _as_file(config) as file:
        arguments = _arguments(overrides)
        run = Path(load(file, arguments).run.dir)
        _run("pkd_dist.train", ["--config", file, *arguments])
    return _distilled(run)


def sweep(
    config: Configuration, output: str | Path | None = None, workers: int | None = None, **overrides: object
) -> Swept:
    """Run a sweep, or what is left of it, and return what it found.

    Args:
        config: As for `pkd sweep`.
        output: Folder of the study; None: `run.dir`.
        workers: As `pkd sweep --workers`.
        overrides: As for `distill`.

    Raises:
        UserError: Bad input, or no point could be trained.
        DivergedError, Preempted: See `errors.py`.
    """
    with _as_file(config) as file:
        arguments = _arguments(overrides)
        read = load(file, arguments)
        folder = Path(output or read.run.dir)
        many = [] if workers is None else ["--workers", str(workers)]
        _run("pkd_dist.cli", ["sweep", "--config", file, "--output", str(folder), *many, *arguments])
    finals = {seed: _distilled(folder / "final" / f"seed-{seed}") for seed in read.sweep.final.seeds}
    return Swept(folder, finals)


def _distilled(run: Path) -> Distilled:
    return Distilled(run, cast(Results, read_object(run / "results_eval.json")))


class _as_file:  # noqa: N801 - a context manager
    """Give a configuration as a file."""

    def __init__(self, config: Configuration):
        self._config, self._folder = config, tempfile.TemporaryDirectory()

    def __enter__(self) -> str:
        if not isinstance(self._config, Mapping):
            return str(self._config)
        path = Path(self._folder.name, "config.yaml")
        path.write_text(yaml.safe_dump(_plain(self._config)), encoding="utf-8")
        return str(path)

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


def _plain(value: object) -> object:
    """Return a value as YAML and JSON hold it: paths as text, tuples as lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _arguments(overrides: Mapping[str, object]) -> list[str]:
    """Return `section.key=value` arguments; a section may be given as a mapping."""

    def leaves(prefix: str, value: object) -> Iterator[str]:
        section = isinstance(value, Mapping) and prefix.count(".") == 0
        if section:
            for key, each in cast(Mapping[str, object], value).items():
                yield from leaves(f"{prefix}.{key}", each)
        else:
            yield f"{prefix}={json.dumps(_plain(value))}"

    return [argument for key, value in overrides.items() for argument in leaves(key, value)]


def _run(module: str, arguments: Sequence[str]) -> None:
    """Run a module with its output on this process's terminal or notebook; its last error becomes an exception."""
    process = subprocess.Popen(
        [*python(module), *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    assert process.stdout is not None
    error = f"{module} ended without a message"
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if line.startswith("pkd: "):
                error = line.removeprefix("pkd: ").strip()
    finally:  # KeyboardInterrupt: a notebook's stop button
        if process.poll() is None:
            process.terminate()
        status = process.wait()
    if status == DivergedError.exit_status:
        raise DivergedError(error)
    if status == Preempted.exit_status:
        raise Preempted(error, 0)
    if status == UserError.exit_status:
        raise UserError(error)
    if status:
        raise LostRank(f"{error} (status {status})")
