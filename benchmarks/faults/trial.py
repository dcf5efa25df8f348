"""One trial: start the job, strike it, rerun it until it ends well, and compare its results."""

import json
import os
import re
import shutil
import signal
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults import damage
from benchmarks.faults.job import Start, Watch, arrived
from benchmarks.faults.plan import EPOCHS, Plan
from benchmarks.faults.site import Site, SmallDisk, TwoNodes
from benchmarks.faults.tiny import write_config
from pkd_dist.files import digest_of, sha256

MAX_STARTS = 5
STUCK_TIMEOUT_SECONDS = 10  # run.timeout_seconds of trials in which a rank hangs
TIMEOUT_SECONDS = 60  # of all others
MARGIN_SECONDS = 20  # from the timeout, or the loss of a rank, to the end of all ranks; longer on a slow machine
DEV_EXAMPLES = 1603
_TIMES = ("time", "seconds", "samples_per_second")
_BYTES = re.compile(r"\d[\d,.]*\s*([kKMG]i?B|B|bytes)\b")


@dataclass(frozen=True)
class Outcome:
    """Digests of the results that must be equal: the exported weights, and the metrics without time fields."""

    export: str | None
    metrics: str | None


@dataclass(frozen=True)
class Reference:
    """The undisturbed run."""

    outcome: Outcome
    seconds: float
    best_epoch: int


@dataclass
class Row:
    """The result of a trial; README.md describes the fields."""

    trial: int
    fault: str
    moment: str
    detail: str
    struck: bool = False
    starts: int = 0
    statuses: list[int] = field(default_factory=list)
    actions: list[str] = field(default_factory=list)
    seconds: float = 0.0
    ended_after_seconds: float | None = None
    recovered: bool = False
    identical: bool = False
    hung: bool = False
    left_behind: list[str] = field(default_factory=list)
    broken_promises: list[str] = field(default_factory=list)
    last_message: str = ""

    @property
    def good(self) -> bool:
        return self.recovered and self.identical and not (self.hung or self.left_behind or self.broken_promises)


def settings(body: Path, data: Path, run: Path, timeout_seconds: float) -> dict[str, Any]:
    """Return the settings of the job: all stages, dropout on, many shards and checkpoints.

    Learning rates and `DEV_EXAMPLES` make each epoch better than the previous one, so the export depends on every step.
    """
    return {
        "run": {"dir": str(run), "timeout_seconds": timeout_seconds},
        "task": {"name": "sst2", "data": str(data), "max_length": 32},
        "teacher": {"model": str(body), "finetune": {"epochs": EPOCHS, "learning_rate": 3e-3, "batch_size": 16}},
        "student": {"layers": [1, 3]}, "cache": {"shard_rows": 50}, "metrics": {"port": 0},
        "train": {"epochs": EPOCHS, "batch_size": 16, "learning_rate": 3e-4, "deepspeed": "ds_configs/zero1.json"},
        "checkpoint": {"every_steps": 5, "min_seconds": 0}, "evaluate": {"latency_samples": 10},
        "export": {"formats": ["safetensors"]},
    }  # fmt: skip


def outcome(run: Path) -> Outcome:
    export = run / "export/model.safetensors"
    try:
        files = (run / name for name in ("teacher_metrics.jsonl", "metrics.jsonl"))
        records = [json.loads(line) for path in files for line in path.read_text().splitlines()]
        metrics = digest_of([{k: v for k, v in record.items() if k not in _TIMES} for record in records])
    except (OSError, ValueError):
        metrics = None
    return Outcome(sha256(export) if export.exists() else None, metrics)


def left_behind(run: Path) -> list[str]:
    """Return the locks and temporary files in a run folder."""
    found = (p for p in run.rglob("*") if p.name == "run.lock" or p.name.startswith(".") or p.suffix == ".tmp")
    return sorted(str(p.relative_to(run)) for p in found)


def complete(run: Path) -> bool:
    return (run / "export/model.safetensors").exists() and (run / "report.html").exists()


def follow(message: str, aside: Path) -> str | None:
    """Do what the message asks for, as an operator does, and return a description; None if it asks for nothing."""
    named = re.search(r"(/[^\s:,;]+)", message)
    path = Path(named[1]) if named else None
    if path and path.exists():
        if re.search(r"remove (the file|it)\b", message):
            path.unlink()
            return f"removed {path.name}"
        if re.search(r"remove the folder\b", message):
            folder = path.parent if path.is_file() else path
            shutil.rmtree(folder)
            return f"removed {folder.name}/"
        if re.search(r"move it away\b", message):
            aside.mkdir(exist_ok=True)
            os.replace(path, aside / f"{len(list(aside.iterdir()))}-{path.name}")
            return f"moved {path.name} away"
    return "--fresh" if "--fresh" in message else None


def undisturbed(folder: Path, body: Path, data: Path, ranks: int, watch: Watch, times: int) -> Reference:
    """Run the job several times without faults; return the fastest run. Raises if one fails or their results differ."""
    found: list[Reference] = []
    for number in range(1, times + 1):
        site = Site(folder / str(number), ranks)
        site.folder.mkdir()
        config = write_config(settings(body, data, site.run, TIMEOUT_SECONDS), site.folder)
        with Start(site.commands("--config", config), site.environment, site.folder / "start-1") as start:
            ended = start.await_end(watch, 600)
        if not ended or start.status or not complete(site.run):
            what = f"the undisturbed run ended with status {start.status}: {start.last_message}"
            raise RuntimeError(f"{what}; see {folder}")
        seconds = round(time.monotonic() - start.began, 2)
        best_epoch = json.loads((site.run / "stages/distill.json").read_text())["outputs"]["best_epoch"]
        found.append(Reference(outcome(site.run), seconds, best_epoch))
    if len({reference.outcome for reference in found}) > 1:
        raise RuntimeError(f"undisturbed runs differ; see {folder}")
    return min(found, key=lambda reference: reference.seconds)


class Trial:
    """One plan, run in its own folder."""

    def __init__(
        self, plan: Plan, folder: Path, body: Path, data: Path, ranks: int, reference: Reference, watch: Watch
    ):
        self.plan, self.folder, self.reference, self.watch = plan, folder, reference, watch
        self.site = {"fill-disk": SmallDisk, "cut-link": TwoNodes}.get(plan.fault, Site)(folder, ranks)
        self.stuck = plan.fault in ("stop-rank", "cut-link")
        timeout = STUCK_TIMEOUT_SECONDS if self.stuck else TIMEOUT_SECONDS
        self.config = write_config(settings(body, data, self.site.run, timeout), folder)
        moment = f"{plan.moment:.3f} of the duration" if isinstance(plan.moment, float) else plan.moment
        self.row = Row(plan.trial, plan.fault, f"{moment} + {1000 * plan.delay_seconds:.0f} ms", "")
        self.margin_seconds = max(MARGIN_SECONDS, reference.seconds)
        self.deadline_seconds = 60 + 6 * reference.seconds
        self.in_stages = False
        self.damaged: str | None = None

    def run(self) -> Row:
        row, run, began = self.row, self.site.run, time.monotonic()
        flags: list[str] = []
        with self.site:
            while row.starts < MAX_STARTS:
                start = self._start(flags)
                row.statuses.append(start.status)
                self._check_named(start)
                if start.status == 0 and complete(run):
                    row.recovered = True
                    break
                row.last_message = start.last_message.replace(f"{self.folder}/", "")
                action = follow(start.last_message, self.folder / "aside") if start.status == 2 else None
                flags = ["--fresh"] if action == "--fresh" else []
                row.actions += [action] if action else []
            row.left_behind = left_behind(run)
            row.identical = row.recovered and outcome(run) == self.reference.outcome
        row.seconds = round(time.monotonic() - began, 1)
        return row

    def _start(self, flags: list[str]) -> Start:
        """Start the command and wait for its end; the first start is disturbed."""
        self.row.starts += 1
        commands, number = self.site.commands("--config", self.config, *flags), self.row.starts
        with Start(commands, self.site.environment, self.folder / f"start-{number}") as start:
            if number == 1:
                self._disturb(start)
            elif not start.await_end(self.watch, self.deadline_seconds):
                self.row.hung = True
        return start

    def _disturb(self, start: Start) -> None:
        """Wait for the moment, strike, and wait for the end."""
        plan, row = self.plan, self.row
        self._await_moment(start)
        if start.ended():
            return
        self.in_stages = any(self.site.run.glob("stages/*.json"))
        row.struck = True
        struck_at = time.monotonic()
        with ExitStack() as after:
            self._strike(start, after)
            row.hung = not self._await_end(start)
            row.ended_after_seconds = round(time.monotonic() - struck_at, 1)
            if plan.fault != "stop-rank":  # the launcher still waits for the stopped rank
                start.await_end(self.watch, self.margin_seconds)
            start.kill()
        self._check_promises(start)
        if not plan.running:
            self._damage()

    def _await_moment(self, start: Start) -> None:
        moment = self.plan.moment

        def came() -> bool:
            if start.launchers[0].poll() is not None:
                return True
            if isinstance(moment, float):
                return time.monotonic() >= start.began + moment * self.reference.seconds
            return arrived(self.site.run, moment)

        self.watch.until(came, self.deadline_seconds)
        self.watch.until(lambda: False, self.plan.delay_seconds)

    def _strike(self, start: Start, after: ExitStack) -> None:
        """Strike once; `after` undoes it when the job has ended."""
        plan, site = self.plan, self.site
        signals = {"kill-rank": "SIGKILL", "stop-rank": "SIGSTOP", "signal-rank": plan.stop_signal}
        if plan.fault in signals:
            self.row.detail = f"{signals[plan.fault]} to rank {plan.rank}"
            if process := start.await_rank(self.watch, plan.rank, self.deadline_seconds):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.Signals[signals[plan.fault]])
        elif plan.fault == "signal-launcher":
            self.row.detail = f"{plan.stop_signal} to the launcher's {plan.target}"
            start.send(signal.Signals[plan.stop_signal], plan.target)
        elif isinstance(site, TwoNodes):
            site.cut()
            after.callback(site.restore)
            self.row.detail = "until the end" if plan.cut_seconds is None else f"for {plan.cut_seconds:.0f} s"
            if plan.cut_seconds is not None:
                start.await_end(self.watch, plan.cut_seconds)
                site.restore()
        elif isinstance(site, SmallDisk):
            site.fill(plan.free_bytes)
            after.callback(site.empty)
            self.row.detail = f"{plan.free_bytes} bytes left"
        elif plan.fault == "kill-job" or not plan.running:
            start.kill()
        else:
            self._damage()
            if plan.kill_after_seconds is not None:
                start.await_end(self.watch, plan.kill_after_seconds)
                start.kill()

    def _damage(self) -> None:
        """Damage one file, if the fault is of that kind and there is such a file."""
        plan, run = self.plan, self.site.run
        if plan.fault not in damage.CANDIDATES:
            return
        self.row.detail = "nothing there to damage"
        with suppress(FileNotFoundError):  # a running job also removes files
            path = damage.pick(plan.fault, run, plan.which)
            if path is None or not path.stat().st_size:
                return
            owed = plan.fault.startswith("damage") and not plan.running and damage.needed(run, path)
            kind = {"tear-metrics": "tear", "tear-marker": "truncate"}.get(plan.fault, plan.damage)
            what = damage.apply(kind, path, plan.where)
            self.damaged = path.name if owed else None
            self.row.detail = f"{path.relative_to(run)}: {what}, {'running' if plan.running else 'after kill -9'}"

    def _await_end(self, start: Start) -> bool:
        """Return whether the struck job ends by itself in the time it has."""
        plan, margin = self.plan, self.margin_seconds
        if plan.fault == "kill-rank":
            return start.await_ranks_end(self.watch, margin)
        if plan.fault == "stop-rank" or (plan.fault == "cut-link" and plan.cut_seconds is None):
            stopped = plan.rank if plan.fault == "stop-rank" else None
            return start.await_ranks_end(self.watch, STUCK_TIMEOUT_SECONDS + margin, but=stopped)
        return start.await_end(self.watch, self.deadline_seconds)

    def _check_promises(self, start: Start) -> None:
        """Check what the disturbed start owes its user: exit status, one line, no temporary files."""
        plan, row, broken = self.plan, self.row, self.row.broken_promises
        if plan.fault == "fill-disk" and (lying := left_behind(self.site.run)):
            broken.append(f"left on the full disk: {', '.join(lying)}")
        killed = not self.stuck and start.status == 128 + signal.SIGKILL
        if not self.in_stages or row.hung or killed or start.status == 0:
            return
        status = {"fill-disk": 2, "signal-rank": 75}.get(plan.fault, start.status)
        if start.status != status:
            broken.append(f"status {start.status}, not {status}")
        if plan.fault == "signal-launcher":
            return  # which processes get the signal depends on the launcher
        spoken = start.messages
        promises = {
            f"{len(spoken)} lines `pkd: ...` on stderr, not one": len(spoken) == 1
            or (spoken and plan.fault == "cut-link"),
            "a traceback on stderr": "Traceback" not in start.errors,
            "the line names no bytes": plan.fault != "fill-disk" or any(map(_BYTES.search, spoken)),
            "the line names no rank": not self.stuck or any("rank" in line for line in spoken),
        }
        broken += [text for text, kept in promises.items() if not kept]

    def _check_named(self, start: Start) -> None:
        """Check that the start after the damage names the damaged file, if it still needed that."""
        if self.damaged is None or self.row.starts == 1:
            return
        name, self.damaged = self.damaged, None
        if name not in start.output:
            self.row.broken_promises.append(f"{name} was damaged, and the next start does not name it")
