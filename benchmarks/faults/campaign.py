"""Many trials with one seed: the reference, one line for each trial as it ends, the summary."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults.job import Watch
from benchmarks.faults.plan import Plan, plan
from benchmarks.faults.site import release
from benchmarks.faults.tiny import ROOT, make_body, make_data
from benchmarks.faults.trial import DEV_EXAMPLES, Outcome, Reference, Row, Trial, settings, undisturbed
from pkd_dist import __version__
from pkd_dist.files import digest_of, write_json


class Refused(Exception):  # noqa: N818 - one line for the user
    """The campaign cannot be run as asked."""


class Campaign:
    """The trials of one seed in one work folder.

    Args:
        work: holds the reference, `trials.jsonl`, and the folders of the trials that run or went wrong.
        references: how many undisturbed runs are made; they must agree.

    Raises:
        Refused: the folder holds a campaign of another seed, code, or choice of faults.
    """

    def __init__(self, work: Path, seed: int, ranks: int, faults: Sequence[str], watch: Watch, references: int = 2):
        self.work, self.seed, self.ranks, self.faults, self.watch = work.resolve(), seed, ranks, tuple(faults), watch
        self.body, self.data = self.work / "tiny/bert", self.work / "tiny/data"
        self.log = self.work / "trials.jsonl"
        job = digest_of(settings(Path("bert"), Path("data"), Path("run"), 0))
        self.identity = {
            "seed": seed,
            "ranks": ranks,
            "faults": list(faults),
            "job": job,
            "git_revision": git_revision(),
        }
        self.reference = self._open(references)

    def _open(self, references: int) -> Reference:
        """The reference of an earlier start of this campaign, or a new one."""
        self.work.mkdir(parents=True, exist_ok=True)
        kept = self.work / "reference.json"
        if kept.exists():
            known = json.loads(kept.read_text())
            for key, value in self.identity.items():
                if known.get(key) != value:
                    raise Refused(
                        f"{self.work}: holds a campaign with {key} {known.get(key)}, not {value}; give another --work"
                    )
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
        """What is known so far, by trial; a line torn by a kill is left out."""
        if not self.log.exists():
            return []
        lines = self.log.read_text().splitlines(keepends=True)
        rows = [Row(**json.loads(line)) for line in lines if line.endswith("\n")]
        return sorted({row.trial: row for row in rows}.values(), key=lambda row: row.trial)

    def run_trial(self, number: int, keep: bool = False) -> tuple[Row, Path]:
        """Runs one trial; its folder stays where it went wrong, or `keep` is given."""
        return self.run_plan(plan(self.seed, number, self.ranks, self.faults), keep)

    def run_plan(self, drawn: Plan, keep: bool = False) -> tuple[Row, Path]:
        folder = _empty(self.work / f"trial-{drawn.trial:05d}")
        row = Trial(drawn, folder, self.body, self.data, self.ranks, self.reference, self.watch).run()
        if row.good and not keep:
            shutil.rmtree(folder)
        return row, folder

    def run(self, trials: int, jobs: int) -> Iterator[Row]:
        """Runs those of the first `trials` trials that have no row yet; yields rows as they come.

        Raises:
            Interrupted: the campaign was told to stop; the rows so far are on disk.
        """
        done = {row.trial for row in self.rows()}
        waiting = [number for number in range(trials) if number not in done]
        with ThreadPoolExecutor(jobs) as pool:
            try:
                for future in as_completed([pool.submit(self.run_trial, number) for number in waiting]):
                    row, _ = future.result()
                    self._append(row)
                    yield row
            finally:
                pool.shutdown(cancel_futures=True)

    def _append(self, row: Row) -> None:
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps(dataclasses.asdict(row)) + "\n")

    def summary(self, trials: int) -> dict[str, Any]:
        """What the result file holds."""
        rows = [row for row in self.rows() if row.trial < trials]
        names = ("torch", "deepspeed", "transformers", "safetensors", "numpy")
        return {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            **self.identity,
            **_counts(rows),
            "seconds": round(sum(row.seconds for row in rows), 1),
            "machine": machine(),
            "versions": {"pkd_dist": __version__, "python": platform.python_version()} | {n: version(n) for n in names},
            "reference": dataclasses.asdict(self.reference),
            "by_fault": {fault: _counts([row for row in rows if row.fault == fault]) for fault in self.faults},
            "rows": [dataclasses.asdict(row) for row in rows],
        }


_COUNTED = ("recovered", "identical", "hung", "left_behind", "broken_promises", "good", "struck")


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many trials, and of how many each thing is true."""
    return {"trials": len(rows)} | {name: sum(bool(getattr(row, name)) for row in rows) for name in _COUNTED}


def _empty(folder: Path) -> Path:
    """A folder with nothing in it, whatever a campaign that was killed left there."""
    release(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def git_revision() -> str:
    """The commit of the code that is tried, with `-dirty` where it was changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "pkd_dist", "launcher", "ds_configs")
    return git("rev-parse", "HEAD") + ("-dirty" if changed else "")


def machine() -> dict[str, Any]:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": platform.release(),
    }
