"""Damage each file of a finished and of a half-trained run in four ways, rerun the same command, and judge the end.

python -m benchmarks.faults.matrix [--every N] [--jobs N] [--work DIR] [--output FILE]
"""

import argparse
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
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
UNREAD = ("logs/*", "config.yaml", "run.lock")
"""Files that every start writes again, or that nothing is made of."""
UNREAD_WHEN_DONE = ("checkpoints/step-*", "*/teacher_metrics.jsonl", "teacher_metrics.jsonl")


@dataclass(frozen=True)
class Case:
    """A file of a kind of run, and how it is damaged."""

    kind: str
    file: str
    way: str


NOT_FOUND = Case("half-trained", "metrics.jsonl", "change")
"""A value of a training that has not ended; checksums come with the end of the stage."""


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


def _remove_line(message: str) -> bool:
    """Remove the line that a message names."""
    named = re.match(r"pkd: (/.+), line (\d+): .*; remove the line$", message)
    if named:
        lines = Path(named[1]).read_bytes().splitlines(keepends=True)
        del lines[int(named[2]) - 1]
        Path(named[1]).write_bytes(b"".join(lines))
    return named is not None


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


Rerun = Callable[..., "subprocess.CompletedProcess[str]"]
"""(arguments of the launcher) -> how it ended."""


def rerun(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    argv, its = command(*arguments), environment(HF_HUB_OFFLINE="1")
    return subprocess.run(argv, cwd=ROOT, env=its, capture_output=True, text=True, timeout=600, check=False)


class Matrix:
    """The runs to damage, in `work`, and the judgment of each case."""

    def __init__(self, work: Path, rerun: Rerun = rerun):
        self.work, self.rerun = work.resolve(), rerun
        body, data = self.work / "bert", make_data(self.work / "data", 101)
        if not body.exists():
            make_body(body)
        self.config = write_config(settings(body, data, self.work / "finished", TIMEOUT_SECONDS), self.work)
        self.weights = sha256(self.run_of("finished") / "export/model.safetensors")

    def run_of(self, kind: str) -> Path:
        """Return the folder of a run to copy, which is made first if it is not there."""
        folder, moment, new = self.work / kind, KINDS[kind], self.work / f"{kind}.new"
        if folder.exists():
            return folder
        shutil.rmtree(new, ignore_errors=True)
        arguments = ("--config", self.config, f"run.dir={new}")
        if moment is None:
            done = self.rerun(*arguments)
            if not complete(new):
                raise RuntimeError(f"the undisturbed run failed: {done.stdout}{done.stderr}")
        else:
            with Start([command(*arguments)], environment(HF_HUB_OFFLINE="1"), self.work / kind) as start:
                Watch().until(lambda: arrived(new, moment) or start.ended(), 600)
        return new.rename(folder)

    def cases(self, kind: str) -> Iterator[Case]:
        skipped = UNREAD + (UNREAD_WHEN_DONE if kind == "finished" else ())
        run = self.run_of(kind)
        for path in sorted(run.rglob("*")):
            file = path.relative_to(run).as_posix()
            if path.is_file() and not any(fnmatch(file, pattern) for pattern in skipped):
                yield from (case for way in WAYS if (case := Case(kind, file, way)) != NOT_FOUND)

    def judge(self, *cases: Case) -> Row:
        """Damage a copy of a run, rerun the command as an operator does, and say what is wrong with the end.

        Args:
            cases: of one kind; all of them are damaged.
        """
        first = cases[0]
        folder = self.work / "cases" / f"{first.kind}-{first.file.replace('/', '-')}-{first.way}"
        shutil.rmtree(folder, ignore_errors=True)
        run = Path(shutil.copytree(self.run_of(first.kind), folder / "run"))
        for case in cases:
            damage(run / case.file, case.way)
        damaged = {case.file: content(run / case.file) for case in cases}
        statuses: list[int] = []
        said = message = ""
        while len(statuses) < MAX_STARTS and 0 not in statuses:
            done = self.rerun("--config", self.config, f"run.dir={run}")
            statuses.append(done.returncode)
            said += done.stdout + done.stderr
            if done.returncode:
                message = (done.stderr.strip().splitlines() or [""])[-1]
            if done.returncode == 2 and not _remove_line(message):
                follow(message, folder / "aside")
        problems = [f"status {status}" for status in statuses if status not in (0, 2)]
        problems += ["a traceback"] * ("Traceback" in said or "a bug in pkd_dist" in said)
        problems += ["never done"] * (not complete(run))
        if complete(run):
            said += (run / "report.html").read_text()
            problems += ["other weights"] * (sha256(run / "export/model.safetensors") != self.weights)
        for file, left in damaged.items():
            problems += [f"{file}: silent"] * (content(run / file) == left and Path(file).name not in said)
        if not problems:
            shutil.rmtree(folder)
        return Row(**vars(first), statuses=statuses, last_message=message.replace(f"{folder}/", ""), problems=problems)


def main(argv: list[str]) -> int:
    """Return 0 if no case has a problem, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults.matrix", description=__doc__)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="judge each Nth case (1)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cases at a time (1)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/faults-matrix", metavar="DIR")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the rows as JSON")
    options = parser.parse_args(argv)
    options.work.mkdir(parents=True, exist_ok=True)
    matrix = Matrix(options.work)
    cases = [case for kind in KINDS for case in matrix.cases(kind)]
    rows = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for row in pool.map(matrix.judge, cases[:: options.every]):
            rows.append(row)
            print(f"{row.kind} {row.file} {row.way}: {row.statuses} {', '.join(row.problems) or 'good'}", flush=True)
    if options.output:
        write_json(options.output, {**stamp(), "rows": [dataclasses.asdict(row) for row in rows]})
    bad = [row for row in rows if row.problems]
    print(json.dumps({"cases": len(rows), "bad": len(bad)}))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
