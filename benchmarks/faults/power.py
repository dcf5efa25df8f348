"""Cut the power at moments of a recorded run: rebuild the worst that the disk may hold, rerun the same command, compare."""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT, stamp
from benchmarks.faults.campaign import git_revision
from benchmarks.faults.recorder import VARIANTS, Cut, read, rebuild
from benchmarks.faults.tiny import environment, make_body, make_data, write_config
from benchmarks.faults.trial import Outcome, left_behind, outcome, settings
from pkd_dist import pipeline
from pkd_dist.config.load import load
from pkd_dist.distributed.ranks import Ranks
from pkd_dist.distributed.world import World
from pkd_dist.errors import UserError
from pkd_dist.files import write_json
from pkd_dist.training import checkpoint

_OUTLIVED = re.compile(
    r"^(?!.*\bmetrics: ).*(runs again|is damaged|was altered|is missing|cannot be read|has \d+ bytes, not|Traceback)"
)
"""What the run says of a marker whose content is lost. Counters for Prometheus are not synced: they start at 0 after a cut."""


_CHANGED = re.compile(r": runs, because (?!it has not run yet|it was interrupted)")
"""A line of the plan: a stage that its marker calls done, but whose outcome is not there."""


@dataclass
class Replay:
    """One power cut: before which event, what the disk kept, and how the same command ended on it."""

    cut: int
    event: str
    variant: str
    status: int = 0
    identical: bool = False
    outlived: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    last_message: str = ""

    @property
    def good(self) -> bool:
        return self.status == 0 and self.identical and not self.outlived and not self.left_behind


Start = Callable[..., "subprocess.CompletedProcess[str]"]
"""(Python file, its arguments) -> how it ended."""


def start(program: Path, *arguments: object) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, program, *map(str, arguments)]
    return subprocess.run(argv, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)


class Recording:
    """A run of one rank in `work`, recorded to its end; `export.prune` removes its checkpoints."""

    def __init__(self, work: Path, start: Start = start, **sections: dict[str, Any]):
        self.start, self.work, self.disk, self.store = start, work, work / "disk", work / "store"
        shutil.rmtree(work, ignore_errors=True)
        self.disk.mkdir(parents=True)
        self.store.mkdir()
        body, data = make_body(work / "bert"), make_data(work / "data")
        self.run = self.disk / "run"
        chosen = settings(body, data, self.run, 60) | {"export": {"formats": ["safetensors"], "prune": True}} | sections
        self.config = str(write_config(chosen, work))
        self.command = (ROOT / "launcher/train.py", "--config", self.config)
        self.world = World(Ranks(0, 0, 1, 1, "python"), 60)
        done = start(ROOT / "benchmarks/faults/recorder.py", self.disk, self.store, *self.command)
        assert done.returncode == 0, done.stdout + done.stderr
        self.outcome: Outcome = outcome(self.run)
        self.cuts: list[Cut] = read(self.store)

    def _rebuild(self, number: int, variant: str) -> None:
        shutil.rmtree(self.disk)
        self.disk.mkdir()
        rebuild(self.cuts[number], variant, self.store, self.disk)

    def outlived(self, number: int, variant: str) -> list[str]:
        """Return what is wrong with that which the markers of stages and checkpoints vouch for after a cut."""
        self._rebuild(number, variant)
        committed = [path for folder in self.run.glob("*checkpoints") for path in checkpoint.committed(folder)]
        found = [problem for path in committed if (problem := checkpoint.damage(path)[0])]
        try:
            lines = pipeline.plan(load(self.config), self.config, self.world)
        except UserError as error:
            return [*found, str(error)]
        return found + [line for line in lines if _CHANGED.search(line)]

    def replay(self, number: int, variant: str) -> Replay:
        """Run the same command on what a cut leaves; the folder is kept for a look."""
        row = Replay(number, self.cuts[number].event.replace(f"{self.work}/", ""), variant)
        for one in VARIANTS:
            row.outlived += self.outlived(number, one)
        self._rebuild(number, variant)
        done = self.start(*self.command)
        row.status, row.identical = done.returncode, outcome(self.run) == self.outcome
        row.outlived += [line for line in (done.stdout + done.stderr).splitlines() if _OUTLIVED.search(line)]
        row.left_behind = left_behind(self.run)
        row.last_message = (done.stderr.strip().splitlines() or [""])[-1]
        return row

    def replays(self, cuts: int) -> Iterator[Replay]:
        """Replay evenly spaced cuts, with each of `VARIANTS` in turn."""
        for turn in range(cuts):
            yield self.replay(turn * (len(self.cuts) - 1) // max(1, cuts - 1), VARIANTS[turn % len(VARIANTS)])


def main(argv: list[str]) -> int:
    """Return 0 if every cut ended with the undisturbed run's bytes and no marker outlived its content, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.power", description=__doc__)
    parser.add_argument("--cuts", type=int, default=50, metavar="N", help="power cuts, evenly spaced over the run (50)")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs/power", metavar="DIR", help="work folder (runs/power)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "power.json", metavar="FILE")
    options = parser.parse_args(argv)
    recording = Recording(options.work.resolve())
    print(f"{len(recording.cuts)} moments recorded in {recording.work}", flush=True)
    rows = []
    for row in recording.replays(options.cuts):
        rows.append(row)
        print(
            f"[{len(rows)}/{options.cuts}] {'good' if row.good else 'NOT GOOD'} {json.dumps(asdict(row))}", flush=True
        )
    good = sum(row.good for row in rows)
    content = {
        **stamp(),
        "git_revision": git_revision(),
        "moments": len(recording.cuts),
        "cuts": len(rows),
        "good": good,
    }
    write_json(options.output, content | {"rows": [asdict(row) for row in rows]})
    print(f"{good} of {len(rows)} cuts are good; {options.output}")
    return 0 if good == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
