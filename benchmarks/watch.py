"""Run a command to its end and record its wall time, the memory of its processes, and how busy the cores were."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.faults.tiny import ROOT, environment
from pkd_dist.errors import UserError

WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
_STATUS_FIELDS = {"VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "file"}


@dataclass
class Memory:
    """The maximum seen of one process, in bytes: the resident set, its own memory, and the pages of mapped files."""

    command: str
    peak: int = 0
    anonymous: int = 0
    file: int = 0


@dataclass
class Watched:
    """A finished command. `waiting_share` of its time some task waited for a core; `memory` is by process id."""

    status: int = 0
    seconds: float = 0.0
    waiting_share: float = 0.0
    started: float = field(default_factory=time.time)
    memory: dict[int, Memory] = field(default_factory=dict)
    stopped: bool = False

    @property
    def peak_bytes(self) -> int:
        """Return the sum of the peaks of all processes, launchers included."""
        return sum(process.peak for process in self.memory.values())


def cores() -> int:
    return len(os.sched_getaffinity(0))


def waited_seconds() -> float:
    """Return the seconds since boot in which some task waited for a core (pressure stall information)."""
    pressure = Path("/proc/pressure/cpu")
    return int(pressure.read_text().split("total=")[1].split()[0]) / 1e6 if pressure.exists() else float("nan")


def is_rank(argv: str) -> bool:
    """Return whether a process runs launcher/train.py itself, rather than starting processes that do."""
    before, found, _ = argv.partition("launcher/train.py")
    return bool(found) and "deepspeed" not in before and "torch.distributed" not in before


def run(
    argv: Sequence[str | Path], log: Path, threads: int = 1, extra: Mapping[str, str] | None = None,
    interval_seconds: float = 0.5, stop_when: Callable[[], bool] | None = None,
) -> Watched:  # fmt: skip
    """Run a command in the project's folder with its output in `log`, and `extra` variables in its environment.

    Each `interval_seconds` its memory is read and `stop_when` is called; once true, one rank gets SIGTERM, so all stop.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    chosen = environment(OMP_NUM_THREADS=str(threads), PYTHONWARNINGS="ignore", **(extra or {}))
    waited, clock, watched = waited_seconds(), time.perf_counter(), Watched()
    with open(log, "wb") as output:
        process = subprocess.Popen(list(map(str, argv)), cwd=ROOT, env=chosen, stdout=output, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(interval_seconds)
                break
            with contextlib.suppress(psutil.Error):
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                for each in family:
                    _look_at(each, watched.memory)
                if stop_when and not watched.stopped and stop_when():
                    for rank in [each for each in family if is_rank(" ".join(each.cmdline()))][:1]:
                        os.kill(rank.pid, signal.SIGTERM)
                        watched.stopped = True
    except BaseException:
        process.terminate()
        process.wait()
        raise
    watched.status, watched.seconds = process.returncode, time.perf_counter() - clock
    watched.waiting_share = (waited_seconds() - waited) / watched.seconds
    return watched


def run_checked(
    program: str, argv: Sequence[str | Path], log: Path, ranks: int = 1, gpu: bool = False,
    interval_seconds: float = 0.5, stop_when: Callable[[], bool] | None = None,
) -> Watched:  # fmt: skip
    """Run a command whose `ranks` processes share the cores. Raises UserError, which names the log, if it fails."""
    threads, extra = max(1, cores() // max(1, ranks)), {} if gpu else WITHOUT_GPU
    watched = run(argv, log, threads, extra, interval_seconds, stop_when)
    if watched.status and not watched.stopped:
        raise UserError(f"{program}: {log.stem} ended with status {watched.status}; see {log}")
    return watched


def _look_at(process: psutil.Process, memory: dict[int, Memory]) -> None:
    with contextlib.suppress(psutil.Error, OSError):
        known = memory.setdefault(process.pid, Memory(" ".join(process.cmdline())))
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if kept := _STATUS_FIELDS.get(name):
                setattr(known, kept, max(getattr(known, kept), int(value.split()[0]) * 1024))
