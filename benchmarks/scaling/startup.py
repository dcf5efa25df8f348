"""From the command to the first step of a resumed run, and what that time is made of.

    python -m benchmarks.scaling.startup [--tries 3] [--teacher DIR]

A run is stopped by SIGTERM after some steps; copies of it are then gone on with: by `python`, by `deepspeed` on two
ranks, once with every part of the start followed (`startup_worker.py`), once under `-X importtime`. Adds the part
`startup` to benchmarks/results/scaling.json.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import watch
from benchmarks.faults.tiny import command
from benchmarks.peers.bench import CONFIG
from benchmarks.scaling.memory import add, prepared_teacher, stop_a_rank
from pkd_dist.cli.launch import guarded, leave
from pkd_dist.errors import UserError
from pkd_dist.files import remove
from pkd_dist.telemetry.log import log, to_terminal
from pkd_dist.telemetry.records import read

STEPS = 12
"""Of the run that is gone on with."""
STAGES = "data,teacher,cache,init,distill"
_IMPORT_LINE = re.compile(r"^import time: +(\d+) \| +(\d+) \|( *)([\w.]+)$")


class Startup:
    """A stopped run, and copies of it that go on."""

    def __init__(self, output: Path, overrides: list[str]):
        self.output, self.overrides = output, overrides
        self.run, self.copy = output / "startup-run", output / "startup-copy"

    def _arguments(self, run: Path) -> list[str | Path]:
        return ["--config", CONFIG, *self.overrides, f"run.dir={run}", "--stages", STAGES]

    def prepare(self) -> None:
        """Raises UserError where the run fails before it can be stopped."""
        remove(self.run)
        self._until(command(*self._arguments(self.run)), self.run, STEPS, "prepare", 0)

    def _until(self, argv: list[str], run: Path, steps: int, name: str, ranks: int) -> float:
        """Starts a command and stops it after so many steps more; seconds from its start to the first of them."""
        known = {record["step"] for record in read(run / "metrics.jsonl")}
        new: list[dict[str, Any]] = []
        stopped = False

        def look(process: subprocess.Popen[bytes]) -> None:
            nonlocal stopped, new
            new = [r for r in read(run / "metrics.jsonl") if r["step"] not in known and "split" not in r]
            if len(new) >= steps and not stopped:
                stopped = stop_a_rank(process.pid)

        log_file = self.output / "logs" / f"startup-{name}.log"
        watched = watch.run(
            argv,
            log_file,
            max(1, watch.cores() // max(1, ranks)),
            seconds_between=0.1,
            tick=look,
            extra=watch.WITHOUT_GPU,
        )
        if not stopped:
            raise UserError(f"scaling: {log_file.stem} ended with status {watched.status}; see {log_file}")
        return new[0]["time"] - watched.started

    def _copied(self) -> Path:
        remove(self.copy)
        shutil.copytree(self.run, self.copy)
        return self.copy

    def _moved(self) -> list[str | Path]:
        return self._arguments(self._copied())

    def resumed(self, ranks: int) -> float:
        """Seconds to the first step: under python where `ranks` is 0, else under deepspeed."""
        argv = command(*self._moved(), ranks=ranks)
        return self._until(argv, self.copy, 1, f"ranks-{ranks}", ranks)

    def followed(self) -> dict[str, Any]:
        """Seconds of each part, on one rank; see `startup_worker.py`."""
        made = self.output / "startup.json"
        remove(made)
        arguments = [str(a) for a in self._moved()]
        argv = [sys.executable, "-m", "benchmarks.scaling.startup_worker", str(made), str(time.time()), *arguments]
        log_file = self.output / "logs" / "startup-followed.log"
        watched = watch.run(argv, log_file, watch.cores(), extra=watch.WITHOUT_GPU)
        if watched.status:
            raise UserError(f"scaling: {log_file.stem} ended with status {watched.status}; see {log_file}")
        return json.loads(made.read_text())

    def imports(self) -> dict[str, float]:
        """Seconds that the imports of each package take by themselves, under `-X importtime`, which adds to them."""
        argv = command(*self._moved())
        argv[1:1] = ["-X", "importtime"]
        self._until(argv, self.copy, 1, "imports", 0)
        return by_package((self.output / "logs" / "startup-imports.log").read_text(errors="replace"))


def by_package(text: str) -> dict[str, float]:
    """The output of `python -X importtime` -> seconds by top-level package, the longest first."""
    total: collections.Counter[str] = collections.Counter()
    for line in text.splitlines():
        if found := _IMPORT_LINE.match(line):
            total[found[4].partition(".")[0]] += int(found[1])
    return {name: micros / 1e6 for name, micros in total.most_common()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling.startup", description=__doc__)
    parser.add_argument("--tries", type=int, default=3, help="of each way to start; the median counts")
    parser.add_argument("--teacher", type=Path, help="a fine-tuned folder; by default one is made first")
    parser.add_argument("--output", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--results", type=Path, help="file to add to; default: benchmarks/results/scaling.json")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings of the run")
    options = parser.parse_intermixed_args()
    to_terminal(True)

    def work() -> None:
        from benchmarks import performance

        output = options.output.resolve()
        results = options.results or performance.RESULTS / "scaling.json"
        teacher = prepared_teacher(output, options.teacher, options.overrides)
        startup = Startup(output, [f"teacher.model={teacher}", *options.overrides])
        log.info("scaling: a run is stopped after %d steps", STEPS)
        startup.prepare()
        waited, began = watch.waited_seconds(), time.perf_counter()
        found: dict[str, Any] = {"processor": watch.processor(), "cores": watch.cores(), "to_first_step_seconds": {}}
        for ranks, name in ((0, "python"), (2, "deepspeed, 2 ranks")):
            each = [startup.resumed(ranks) for _ in range(options.tries)]
            found["to_first_step_seconds"][name] = {"median": statistics.median(each), "each": each}
            log.info("scaling: %s: the first step after %.1f s", name, statistics.median(each))
        tries = sorted((startup.followed() for _ in range(options.tries)), key=lambda one: one["seconds"])
        found["followed"] = tries[len(tries) // 2]
        found["imports"] = dict(list(startup.imports().items())[:20])
        found["waiting_share"] = (watch.waited_seconds() - waited) / (time.perf_counter() - began)
        for folder in (startup.run, startup.copy):
            remove(folder)
        add(results, "startup", found)
        if results.parent == performance.RESULTS:
            performance.write()

    leave(guarded(work))


if __name__ == "__main__":
    main()
