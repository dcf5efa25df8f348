"""Measure the time from the command to the first step of a resumed run, and its parts.

A run is stopped by SIGTERM after some steps. Copies of it are then resumed: by `python`, by `deepspeed` on two ranks,
once with every part of the start timed (`startup_worker.py`), once under `-X importtime`. Adds `startup` to
benchmarks/results/scaling.json.
"""

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

STEPS = 12  # before the run is stopped
_IMPORT_LINE = re.compile(r"^import time: +(\d+) \| +(\d+) \|( *)([\w.]+)$")


@dataclass(frozen=True)
class Startup:
    """A stopped run, and a copy of it that is resumed."""

    output: Path
    overrides: list[str]

    def _arguments(self, run: Path) -> list[str]:
        stages = "data,teacher,cache,init,distill"
        return ["--config", str(common.CONFIG), *self.overrides, f"run.dir={run}", "--stages", stages]

    def _until(self, argv: list[str], run: Path, steps: int, name: str, ranks: int = 0) -> float:
        """Run a command, stop it after `steps` more steps, and return the seconds to the first of them."""
        known = {record["step"] for record in read(run / "metrics.jsonl")}
        new: list[dict[str, Any]] = []
        log_file = self.output / "logs" / f"startup-{name}.log"

        def enough() -> bool:
            new[:] = [r for r in read(run / "metrics.jsonl") if r["step"] not in known and "split" not in r]
            return len(new) >= steps

        watched = watch.run_checked("scaling", argv, log_file, ranks, False, 0.1, enough)
        if not watched.stopped:
            raise UserError(f"scaling: startup-{name} ended before it was stopped; see {log_file}")
        return new[0]["time"] - watched.started

    def prepare(self) -> None:
        """Make the stopped run. Raises UserError if it ends before."""
        run = self.output / "startup-run"
        remove(run)
        self._until(command(*self._arguments(run)), run, STEPS, "prepare")

    def _resumed(self) -> tuple[Path, list[str]]:
        """Copy the stopped run; return the copy, and the arguments that resume it."""
        copy = self.output / "startup-copy"
        remove(copy)
        shutil.copytree(self.output / "startup-run", copy)
        return copy, self._arguments(copy)

    def first_step(self, ranks: int) -> float:
        """Return the seconds to the first step: under python if `ranks` is 0, else under deepspeed."""
        run, arguments = self._resumed()
        return self._until(command(*arguments, ranks=ranks), run, 1, f"ranks-{ranks}", ranks)

    def followed(self) -> dict[str, Any]:
        """Return the seconds of each part on one rank."""
        made, (_, arguments) = self.output / "startup.json", self._resumed()
        remove(made)
        argv = [sys.executable, "-m", "benchmarks.scaling.startup_worker", str(made), str(time.time()), *arguments]
        watch.run_checked("scaling", argv, self.output / "logs" / "startup-followed.log")
        return json.loads(made.read_text())

    def imports(self) -> dict[str, float]:
        """Return the seconds of the imports of each package under `-X importtime`, which adds to them."""
        run, arguments = self._resumed()
        python, *rest = command(*arguments)
        self._until([python, "-X", "importtime", *rest], run, 1, "imports")
        return by_package((self.output / "logs" / "startup-imports.log").read_text(errors="replace"))


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
        found: dict[str, Any] = common.stamp() | {"to_first_step_seconds": {}}
        for ranks, name in ((0, "python"), (2, "deepspeed, 2 ranks")):
            each = [startup.first_step(ranks) for _ in range(options.tries)]
            found["to_first_step_seconds"][name] = {"median": statistics.median(each), "each": each}
            log.info("scaling: %s: first step after %.1f s", name, statistics.median(each))
        tries = sorted((startup.followed() for _ in range(options.tries)), key=lambda one: one["seconds"])
        found["followed"] = tries[len(tries) // 2]
        found["imports"] = dict(list(startup.imports().items())[:20])
        for name in ("startup-run", "startup-copy"):
            remove(output / name)
        results = options.results or common.RESULTS / "scaling.json"
        common.save(results, common.read_json(results) | {"startup": found})

    common.run_program(work)


if __name__ == "__main__":
    main()
