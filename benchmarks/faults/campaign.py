"""Run many trials of one seed: the reference, a row for each trial as it ends, the summary."""

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.common import stamp
from benchmarks.faults.job import Watch
from benchmarks.faults.plan import Plan, plan
from benchmarks.faults.site import release
from benchmarks.faults.tiny import ROOT, make_body, make_data
from benchmarks.faults.trial import DEV_EXAMPLES, Outcome, Reference, Row, Trial, settings, undisturbed
from pkd_dist.errors import UserError
from pkd_dist.files import digest_of, write_json

COUNTED = ("recovered", "identical", "hung", "left_behind", "broken_promises", "good", "struck")


class Campaign:
    """The trials of one seed. `work` holds the reference, `trials.jsonl`, and the folders of running and failed trials.

    `references` undisturbed runs must agree. Raises UserError if the folder is of another seed, code, or choice of faults.
    """

    def __init__(self, work: Path, seed: int, ranks: int, faults: Sequence[str], watch: Watch, references: int = 2):
        self.work, self.seed, self.ranks, self.faults, self.watch = work.resolve(), seed, ranks, tuple(faults), watch
        self.body, self.data = self.work / "tiny/bert", self.work / "tiny/data"
        self.log = self.work / "trials.jsonl"
        job = digest_of(settings(Path("bert"), Path("data"), Path("run"), 0))
        self.identity = {
            "seed": seed, "ranks": ranks, "faults": list(faults), "job": job, "git_revision": git_revision(),
        }  # fmt: skip
        self.reference = self._open(references)

    def _open(self, references: int) -> Reference:
        """Return the reference of an earlier start of this campaign, or make one."""
        self.work.mkdir(parents=True, exist_ok=True)
        kept = self.work / "reference.json"
        if kept.exists():
            known = json.loads(kept.read_text())
            for key, value in self.identity.items():
                if known.get(key) != value:
                    found = f"{self.work}: holds a campaign with {key} {known.get(key)}, not {value}"
                    raise UserError(f"{found}; choose another --work")
            return Reference(Outcome(**known["outcome"]), known["seconds"], known["best_epoch"])
        if not self.body.exists():
            make_body(self.body)
        make_data(self.data, DEV_EXAMPLES)
        folder = _empty(self.work / "reference")
        found = undisturbed(folder, self.body, self.data, self.ranks, self.watch, references)
        write_json(kept, {**self.identity, **dataclasses.asdict(found)})
        shutil.rmtree(folder)
        return found

    def rows(self) -> list[Row]:
        """Return the rows so far, by trial, without a line torn by a kill."""
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        rows = [Row(**json.loads(line)) for line in lines if line.endswith("\n")]
        return sorted({row.trial: row for row in rows}.values(), key=lambda row: row.trial)

    def draw(self, number: int) -> Plan:
        return plan(self.seed, number, self.ranks, self.faults)

    def run_plan(self, drawn: Plan, keep: bool = False) -> tuple[Row, Path]:
        """Run one trial; its folder is kept if it failed or with `keep`."""
        folder = _empty(self.work / f"trial-{drawn.trial:05d}")
        row = Trial(drawn, folder, self.body, self.data, self.ranks, self.reference, self.watch).run()
        if row.good and not keep:
            shutil.rmtree(folder)
        return row, folder

    def run(self, trials: int, jobs: int) -> Iterator[Row]:
        """Run those of the first `trials` trials that have no row yet; yield rows as they come."""
        done = {row.trial for row in self.rows()}
        waiting = [number for number in range(trials) if number not in done]
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for future in as_completed([pool.submit(self.run_plan, self.draw(number)) for number in waiting]):
                    row, _ = future.result()
                    with open(self.log, "a", encoding="utf-8") as file:
                        file.write(json.dumps(dataclasses.asdict(row)) + "\n")
                    yield row
            finally:
                pool.shutdown(cancel_futures=True)

    def summary(self, trials: int) -> dict[str, Any]:
        """Return the content of the result file."""
        rows = [row for row in self.rows() if row.trial < trials]
        names = ("pkd_dist", "torch", "deepspeed", "transformers", "safetensors", "numpy")
        return {
            **stamp(), **self.identity, **_counts(rows), "seconds": round(sum(row.seconds for row in rows), 1),
            "versions": {name: version(name) for name in names},
            "reference": dataclasses.asdict(self.reference),
            "by_fault": {fault: _counts([row for row in rows if row.fault == fault]) for fault in self.faults},
            "rows": [dataclasses.asdict(row) for row in rows],
        }  # fmt: skip


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    return {"trials": len(rows)} | {name: sum(bool(getattr(row, name)) for row in rows) for name in COUNTED}


def _empty(folder: Path) -> Path:
    """Make an empty folder; a killed campaign may have left a full one, with a mounted disk."""
    release(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def git_revision() -> str:
    """Return the commit of the tested code, with `-dirty` if it has changes."""
    argv = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
