"""What a rank needs where the data grows: the embedded data once, 10 and 100 times, through the real launcher.

    python -m benchmarks.scaling.memory [--factors 1,10,100] [--ranks 2] [--steps 200] [--teacher DIR]

Each copy of a sentence has one word changed, so that texts, ids and cache rows all differ. Per size: the stages data,
cache and distill (the latter ended by SIGTERM after so many steps), each a command of its own, with the memory of its
ranks and the seconds of an example. Memory: `peak` is the resident set as the kernel counts it, pages of memory-mapped
files included, which it drops where it needs the room; `anonymous` is what a rank cannot do without. Adds the part
`memory` to benchmarks/results/scaling.json; every size that is done is a file in --output.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import watch
from benchmarks.faults.tiny import command
from benchmarks.peers.bench import CONFIG, TEACHER
from pkd_dist.cli.launch import guarded, leave
from pkd_dist.config.paths import project_path
from pkd_dist.errors import UserError
from pkd_dist.files import remove, write_json
from pkd_dist.telemetry.log import log, to_terminal
from pkd_dist.telemetry.records import read

SETTLED = 20
"""Steps that are not timed: the first ones allocate."""


def multiply(source: Path, folder: Path, factor: int) -> None:
    """Writes train.tsv with `factor` times the rows, in the later copies of which one word is another of the text's
    words; and dev.tsv as it is. Raises UserError where they are not there."""
    for name in ("train.tsv", "dev.tsv"):
        if not (source / name).is_file():
            raise UserError(f"--data: {source} has no {name}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dev.tsv").write_bytes((source / "dev.tsv").read_bytes())
    head, *rows = (source / "train.tsv").read_text(encoding="utf-8").splitlines()
    text_at = head.split("\t").index("sentence")
    words = sorted({word for row in rows for word in row.split("\t")[text_at].split()})
    rng = random.Random(0)
    with open(folder / "train.tsv", "w", encoding="utf-8") as file:
        file.write(head + "\n")
        for copy in range(factor):
            for row in rows:
                fields = row.split("\t")
                if copy:
                    changed = fields[text_at].split()
                    changed[rng.randrange(len(changed))] = rng.choice(words)
                    fields[text_at] = " ".join(changed)
                file.write("\t".join(fields) + "\n")


def is_rank(argv: str) -> bool:
    """Whether a process runs launcher/train.py itself, and does not start others that do."""
    before, found, _ = argv.partition("launcher/train.py")
    return bool(found) and "deepspeed" not in before and "torch.distributed" not in before


def memory_of_ranks(watched: watch.Watched) -> dict[str, int]:
    """The largest of any rank, bytes."""
    ranks = [asdict(found) for found in watched.memory.values() if is_rank(found.command)]
    names = ("peak", "anonymous", "file", "shared", "proportional")
    return {f"{name}_bytes": max(found[name] for found in ranks) for name in names}


class Size:
    """One size of the data.

    Args:
        overrides: settings of the run, its teacher among them.
    """

    def __init__(self, output: Path, source: Path, factor: int, ranks: int, steps: int, overrides: list[str]):
        self.output, self.source, self.factor = output, source, factor
        self.ranks, self.steps, self.overrides = ranks, steps, overrides
        self.data, self.run = output / f"data-{factor}", output / f"run-{factor}"

    def measure(self) -> dict[str, Any]:
        """Raises UserError where a stage fails."""
        remove(self.run)
        multiply(self.source, self.data, self.factor)
        out: dict[str, Any] = {"factor": self.factor}
        watched = self._stages("data,teacher", ranks=0)
        made = self._outputs("data")["outputs"]["train"]
        examples, tokens = made["examples"], self._tokens()
        out |= {"examples": examples, "tokens": tokens, "token_bytes": _size(self.run / "data" / "train")}
        out["data"] = memory_of_ranks(watched) | {
            "seconds_per_example": self._outputs("data")["seconds"] / examples, "waiting_share": watched.waiting_share,
        }  # fmt: skip
        watched = self._stages("data,teacher,cache", ranks=self.ranks)
        out["cache_bytes"] = _size(self.run / "cache")
        out["cache"] = memory_of_ranks(watched) | {
            "seconds_per_example": self._outputs("cache")["seconds"] / examples, "waiting_share": watched.waiting_share,
        }  # fmt: skip
        watched = self._stages("data,teacher,cache,init,distill", ranks=self.ranks, stop_after=self.steps)
        paces = [1 / r["samples_per_second"] for r in read(self.run / "metrics.jsonl") if "split" not in r]
        out["distill"] = memory_of_ranks(watched) | {
            "steps": len(paces), "seconds_per_example": float(np.median(paces[min(SETTLED, len(paces) // 2) :])),
            "waiting_share": watched.waiting_share,
        }  # fmt: skip
        remove(self.run)
        remove(self.data)
        return out

    def _outputs(self, stage: str) -> dict[str, Any]:
        return json.loads((self.run / "stages" / f"{stage}.json").read_text())

    def _tokens(self) -> int:
        return json.loads((self.run / "data" / "train" / "meta.json").read_text())["tokens"]

    def _stages(self, stages: str, ranks: int, stop_after: int | None = None) -> watch.Watched:
        metrics, stopped = self.run / "metrics.jsonl", False

        def stop(process: subprocess.Popen[bytes]) -> None:
            nonlocal stopped
            if stopped or stop_after is None or not metrics.exists():
                return
            if metrics.read_bytes().count(b"\n") >= stop_after:
                stopped = stop_a_rank(process.pid)

        argv = command(
            "--config", CONFIG, *self.overrides, f"task.data={self.data}", f"run.dir={self.run}", "metrics.enabled=false",
            "--stages", stages, ranks=ranks,
        )  # fmt: skip
        log_file = self.output / "logs" / f"{self.factor}-{stages.rpartition(',')[2]}.log"
        watched = watch.run(
            argv,
            log_file,
            max(1, watch.cores() // max(1, ranks)),
            seconds_between=0.25,
            proportional=True,
            tick=stop,
            extra=watch.WITHOUT_GPU,
        )
        if watched.status and not stopped:
            raise UserError(f"scaling: {log_file.stem} ended with status {watched.status}; see {log_file}")
        return watched


def stop_a_rank(process_id: int) -> bool:
    """Sends SIGTERM to one rank of a command, which the others follow; False where none is there."""
    family = [psutil.Process(process_id), *psutil.Process(process_id).children(recursive=True)]
    ranks = [each for each in family if is_rank(" ".join(each.cmdline()))]
    if ranks:
        os.kill(ranks[0].pid, signal.SIGTERM)
    return bool(ranks)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def add(results: Path, part: str, found: dict[str, Any]) -> None:
    """Puts one part of the measurements in place of what the file had of it."""
    known = json.loads(results.read_text()) if results.exists() else {}
    write_json(results, known | {part: found})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling.memory", description=__doc__)
    parser.add_argument("--factors", default="1,10,100", help="sizes, in embedded data sets")
    parser.add_argument(
        "--ranks", type=int, default=2, help="of the cache and distill stages, under deepspeed; 0: python"
    )
    parser.add_argument("--steps", type=int, default=200, help="of each training, fewer than an epoch")
    parser.add_argument("--teacher", type=Path, help="a fine-tuned folder; by default one is made first")
    parser.add_argument("--data", default="data/movie-reviews", help="folder with train.tsv and dev.tsv")
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--results", type=Path, help="file to add to; default: benchmarks/results/scaling.json")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the runs")
    options = parser.parse_intermixed_args()
    to_terminal(True)

    def work() -> None:
        from benchmarks import performance
        from pkd_dist.model.encoder import load_config, num_layers

        output = options.output.resolve()
        results = options.results or performance.RESULTS / "scaling.json"
        teacher = prepared_teacher(output, options.teacher, options.overrides)
        sizes = []
        for factor in map(int, options.factors.split(",")):
            kept = output / f"memory-{factor}-ranks-{options.ranks}.json"
            if not kept.exists():
                log.info("scaling: %d times the data", factor)
                overrides = [f"teacher.model={teacher}", *options.overrides]
                size = Size(output, project_path(options.data), factor, options.ranks, options.steps, overrides)
                write_json(kept, size.measure())
            sizes.append(json.loads(kept.read_text()))
        machine = {
            "processor": watch.processor(), "cores": watch.cores(), "ranks": max(1, options.ranks),
            "teacher_layers": num_layers(load_config(str(teacher), "--teacher")), "overrides": options.overrides,
        }  # fmt: skip
        add(results, "memory", machine | {"sizes": sizes})
        if results.parent == performance.RESULTS:
            performance.write()

    leave(guarded(work))


def prepared_teacher(output: Path, given: Path | None, overrides: list[str]) -> Path:
    """A fine-tuned teacher: the given one, or one that is made on the embedded data."""
    from pkd_dist.model.encoder import locate

    output.mkdir(parents=True, exist_ok=True)
    folder = output / "teacher"
    if given is not None:
        return Path(locate(str(given), "--teacher")).resolve()
    if not (folder / "teacher").exists():
        log.info("scaling: the teacher is fine-tuned first")
        argv = command("--config", CONFIG, *overrides, *TEACHER, f"run.dir={folder}", "--stages", "data,teacher")
        watched = watch.run(argv, output / "logs" / "teacher.log", watch.cores(), extra=watch.WITHOUT_GPU)
        if watched.status:
            raise UserError(
                f"scaling: the teacher ended with status {watched.status}; see {output / 'logs/teacher.log'}"
            )
    return folder / "teacher"


if __name__ == "__main__":
    main()
