"""Damage each file of a finished and of a half-trained run in four ways, rerun the same command, and judge the end.

python -m benchmarks.faults.matrix [--every N] [--jobs N] [--work DIR] [--output FILE]
"""

import argparse
import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from benchmarks.common import ROOT, stamp
from benchmarks.faults.job import Start, Watch, arrived
from benchmarks.faults.tiny import command, environment, make_body, make_data, write_config
from benchmarks.faults.trial import MAX_STARTS, TIMEOUT_SECONDS, complete, follow, settings
from pkd_dist.files import sha256, write_json

WAYS = ("flip", "change", "empty", "delete")
KINDS = {"finished": None, "half-trained": "checkpoints/step-00000020/commit.json"}
"""Kind of a run -> the file at whose appearance it was killed."""
UNREAD = ("logs/*", "config.yaml", "run.lock", "counters/*")
"""Files that every start writes again, or that nothing is made of."""
UNREAD_WHEN_DONE = ("checkpoints/step-*", "*/teacher_metrics.jsonl", "teacher_metrics.jsonl")


@dataclass(frozen=True)
class Case:
    """A file of a kind of run, and how it is damaged."""

    kind: str
    file: str
    way: str


@dataclass(frozen=True)
class Row:
    """What a case came to; `problems` is empty if all is well."""

    kind: str
    file: str
    way: str
    statuses: list[int]
    last_message: str
    problems: list[str]


def damage(path: Path, way: str) -> None:
    """Damage a file: a bit of it (no UTF-8 any more), a value, all of its content, or its existence."""
    if way == "delete":
        return path.unlink()
    content = bytearray(b"" if way == "empty" else path.read_bytes())
    if way == "flip" and content:
        content[len(content) // 2] ^= 0x80
    if way == "change" and content:
        digits = [m.start() for m in re.finditer(rb"\d", content)] if b"\0" not in content else []
        place = digits[len(digits) // 2] if digits else 2 * len(content) // 3
        content[place] = ord(b"0") + (content[place] + 1) % 10 if digits else (content[place] + 1) % 256
    path.write_bytes(content)


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


class Matrix:
    """The runs to damage, in `work`, and the judgment of each case."""

    def __init__(self, work: Path, watch: Watch):
        self.work, self.watch = work.resolve(), watch
        body, data = self.work / "bert", make_data(self.work / "data", 101)
        if not body.exists():
            make_body(body)
        self.config = write_config(settings(body, data, self.work / "finished", TIMEOUT_SECONDS), self.work)
        for kind, moment in KINDS.items():
            if not (self.work / kind).exists():
                self._make(kind, moment)
        self.weights = sha256(self.work / "finished/export/model.safetensors")

    def _make(self, kind: str, moment: str | None) -> None:
        folder = self.work / f"{kind}.new"
        shutil.rmtree(folder, ignore_errors=True)
        with self._start(folder, self.work / f"log-{kind}") as start:
            if moment:
                self.watch.until(lambda: arrived(folder, moment) or start.ended(), 600)
            else:
                start.await_end(self.watch, 600)
        if not moment and not complete(folder):
            raise RuntimeError(f"the undisturbed run failed: {start.last_message}")
        folder.rename(self.work / kind)

    def _start(self, run: Path, log: Path) -> Start:
        return Start([command("--config", self.config, f"run.dir={run}")], environment(HF_HUB_OFFLINE="1"), log)

    def cases(self) -> Iterator[Case]:
        for kind in KINDS:
            skipped = UNREAD + (UNREAD_WHEN_DONE if kind == "finished" else ())
            for path in sorted((self.work / kind).rglob("*")):
                file = path.relative_to(self.work / kind).as_posix()
                if path.is_file() and not any(fnmatch(file, pattern) for pattern in skipped):
                    yield from (Case(kind, file, way) for way in WAYS)

    def judge(self, case: Case) -> Row:
        """Damage a copy of the run, rerun the command as an operator does, and say what is wrong with the end."""
        folder = self.work / "cases" / f"{case.kind}-{case.file.replace('/', '-')}-{case.way}"
        shutil.rmtree(folder, ignore_errors=True)
        run = folder / "run"
        shutil.copytree(self.work / case.kind, run)
        damage(run / case.file, case.way)
        damaged, statuses, said, message = content(run / case.file), [], "", ""
        while len(statuses) < MAX_STARTS and 0 not in statuses:
            with self._start(run, folder / f"start-{len(statuses)}") as start:
                start.await_end(self.watch, 300)
            statuses.append(start.status)
            said, message = said + start.output, start.last_message if start.status else message
            if start.status == 2:
                follow(message, folder / "aside")
        problems = [f"status {status}" for status in statuses if status not in (0, 2)]
        problems += ["a traceback"] * ("Traceback" in said or "a bug in pkd_dist" in said)
        problems += ["never done"] * (not complete(run))
        if complete(run) and sha256(run / "export/model.safetensors") != self.weights:
            problems.append("other weights")
        told = said + (run / "report.html").read_text() if complete(run) else said
        if content(run / case.file) == damaged and Path(case.file).name not in told:
            problems.append("silent")
        if not problems:
            shutil.rmtree(folder)
        return Row(**vars(case), statuses=statuses, last_message=message.replace(f"{folder}/", ""), problems=problems)


def main(argv: list[str]) -> int:
    """Return 0 if no case has a problem, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.matrix", description=__doc__)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="judge each Nth case (1)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cases at a time (1)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/faults-matrix", metavar="DIR")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the rows as JSON")
    options = parser.parse_args(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    matrix = Matrix(options.work, Watch())
    rows = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(matrix.judge, list(matrix.cases())[:: options.every]):
            rows.append(row)
            print(f"{row.kind} {row.file} {row.way}: {row.statuses} {', '.join(row.problems) or 'good'}", flush=True)
    if options.output:
        write_json(options.output, {**stamp(), "rows": [dataclasses.asdict(row) for row in rows]})
    bad = [row for row in rows if row.problems]
    print(json.dumps({"cases": len(rows), "bad": len(bad)}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
