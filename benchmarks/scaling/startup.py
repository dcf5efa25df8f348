"""Measure the time from the command to the first step of a resumed run, and its parts.

    python -m benchmarks.scaling.startup [--tries 3] [--teacher DIR]

A run is stopped by SIGTERM after some steps. Copies of it are then resumed: by `python`, by `deepspeed` on two ranks,
once with every part of the start timed (`startup_worker.py`), once under `-X importtime`. Adds `startup` to
benchmarks/results/scaling.json.
"""

from __future__ import annotations

import collections
import json
import re
import shutil
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common, watch
from benchmarks.faults.tiny import command
from pkd_dist.errors import UserError
from pkd_dist.files import remove
from pkd_dist.telemetry.log import log
from pkd_dist.telemetry.records import read

STEPS = 12
"""Steps before the run is stopped."""
STAGES = "data,teacher,cache,init,distill"
_IMPORT_LINE = re.compile(r"^import time: +(\d+) \| +(\d+) \|( *)([\w.]+)$")


@dataclass(frozen=True)
class Startup:
    """A stopped run, and copies of it that are resumed."""

    output: Path
    overrides: list[str]

    @property
    def run(self) -> Path:
        return self.output / "startup-run"

    @property
    def copy(self) -> Path:
        return self.output / "startup-copy"

    def _log(self, name: str) -> Path:
        return self.output / "logs" / f"startup-{name}.log"

    def _arguments(self, run: Path) -> list[str]:
        return ["--config", str(common.CONFIG), *self.overrides, f"run.dir={run}", "--stages", STAGES]

    def _resumed(self) -> list[str]:
        """Copy the stopped run; return the arguments that resume the copy."""
        remove(self.copy)
        shutil.copytree(self.run, self.copy)
        return self._arguments(self.copy)

    def _until(self, argv: list[str], run: Path, steps: int, name: str, ranks: int) -> float:
        """Run a command, stop it after `steps` more steps, and return the seconds to the first of them."""
        known = {record["step"] for record in read(run / "metrics.jsonl")}
        new: list[dict[str, Any]] = []

        def enough() -> bool:
            new[:] = [r for r in read(run / "metrics.jsonl") if r["step"] not in known and "split" not in r]
            return len(new) >= steps

        watched = watch.run_checked("scaling", argv, self._log(name), ranks, False, 0.1, enough)
        if not watched.stopped:
            raise UserError(f"scaling: startup-{name} ended before it was stopped; see {self._log(name)}")
        return new[0]["time"] - watched.started

    def prepare(self) -> None:
        """Make the stopped run. Raises UserError if it ends before."""
        remove(self.run)
        self._until(command(*self._arguments(self.run)), self.run, STEPS, "prepare", 0)

    def first_step(self, ranks: int) -> float:
        """Return the seconds to the first step: under python if `ranks` is 0, else under deepspeed."""
        return self._until(command(*self._resumed(), ranks=ranks), self.copy, 1, f"ranks-{ranks}", ranks)

    def followed(self) -> dict[str, Any]:
        """Return the seconds of each part on one rank."""
        made, arguments = self.output / "startup.json", self._resumed()
        remove(made)
        argv = [sys.executable, "-m", "benchmarks.scaling.startup_worker", str(made), str(time.time()), *arguments]
        watch.run_checked("scaling", argv, self._log("followed"))
        return json.loads(made.read_text())

    def imports(self) -> dict[str, float]:
        """Return the seconds of the imports of each package under `-X importtime`, which adds to them."""
        argv = command(*self._resumed())
        argv[1:1] = ["-X", "importtime"]
        self._until(argv, self.copy, 1, "imports", 0)
        return by_package(self._log("imports").read_text(errors="replace"))


def by_package(text: str) -> dict[str, float]:
    """Return the seconds by top-level package, longest first, from the output of `python -X importtime`."""
    total: collections.Counter[str] = collections.Counter()
    for line in text.splitlines():
        if found := _IMPORT_LINE.match(line):
            total[found[4].partition(".")[0]] += int(found[1])
    return {name: micros / 1e6 for name, micros in total.most_common()}


def main() -> None:
    parser = common.parser("scaling.startup", __doc__, "runs/scaling", "scaling.json")
    parser.add_argument("--tries", type=int, default=3, help="of each way to start; the median counts")
    options = parser.parse_intermixed_args()

    def work() -> None:
        output = options.output.resolve()
        teacher = common.prepared_teacher("scaling", output, common.located(options.teacher), options.overrides)
        startup = Startup(output, [f"teacher.model={teacher}", *options.overrides])
        log.info("scaling: stopping a run after %d steps", STEPS)
        startup.prepare()
        waited, began = watch.waited_seconds(), time.perf_counter()
        found: dict[str, Any] = common.stamp() | {"to_first_step_seconds": {}}
        for ranks, name in ((0, "python"), (2, "deepspeed, 2 ranks")):
            each = [startup.first_step(ranks) for _ in range(options.tries)]
            found["to_first_step_seconds"][name] = {"median": statistics.median(each), "each": each}
            log.info("scaling: %s: first step after %.1f s", name, statistics.median(each))
        tries = sorted((startup.followed() for _ in range(options.tries)), key=lambda one: one["seconds"])
        found["followed"] = tries[len(tries) // 2]
        found["imports"] = dict(list(startup.imports().items())[:20])
        found["waiting_share"] = (watch.waited_seconds() - waited) / (time.perf_counter() - began)
        for folder in (startup.run, startup.copy):
            remove(folder)
        common.save(options.results or common.RESULTS / "scaling.json", {"startup": found})

    common.run_program(work)


if __name__ == "__main__":
    main()
