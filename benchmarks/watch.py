"""Runs a command to its end and notes what it needs: wall time, the memory of each of its processes, and how contended
the cores were meanwhile."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.faults.tiny import environment

WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
"""Of the environment of a process that is to use the CPU alone."""
_STATUS_FIELDS = {"VmHWM": "peak", "RssAnon": "anonymous", "RssFile": "file", "RssShmem": "shared"}


@dataclass
class Memory:
    """The most that was seen of one process, bytes.

    Attributes:
        command: its argument vector, joined.
        peak: of its resident set, as the kernel counted it (pages of mapped files included).
        anonymous: its own memory, that cannot be dropped.
        file: resident pages of mapped files, which the kernel drops where it needs the room.
        shared: shared memory.
        proportional: the resident set, each page divided by the processes that share it (PSS); 0 where not asked for.
    """

    command: str
    peak: int = 0
    anonymous: int = 0
    file: int = 0
    shared: int = 0
    proportional: int = 0


@dataclass
class Watched:
    """seconds: wall. status: of the command. memory: by process id. waiting_share: see `waited_seconds`."""

    seconds: float
    status: int
    waiting_share: float
    started: float
    memory: dict[int, Memory] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """Of all processes of the command together, launchers included; each at its own peak."""
        return sum(process.peak for process in self.memory.values())


def waited_seconds() -> float:
    """Seconds in which some task waited for a core, since the start of the machine (pressure stall information)."""
    pressure = Path("/proc/pressure/cpu")
    return int(pressure.read_text().split("total=")[1].split()[0]) / 1e6 if pressure.exists() else float("nan")


def processor() -> str:
    """What the machine calls its processor."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return names[0] if names else platform.machine()


def run(
    command: Sequence[str | Path],
    log: Path,
    threads: int,
    seconds_between: float = 0.5,
    proportional: bool = False,
    tick: Callable[[subprocess.Popen[bytes]], None] = lambda process: None,
    extra: Mapping[str, str] | None = None,
) -> Watched:
    """Runs a command in the project's folder; its output goes to `log`.

    Args:
        threads: of each of its processes.
        seconds_between: looks at its memory.
        proportional: also read PSS, which takes the kernel milliseconds a look.
        tick: called at each look.
        extra: more environment.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    root = Path(__file__).parents[1]
    chosen = environment(OMP_NUM_THREADS=str(threads), PYTHONWARNINGS="ignore", **(extra or {}))
    waited, started, clock = waited_seconds(), time.time(), time.perf_counter()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command], cwd=root, env=chosen, stdout=output, stderr=subprocess.STDOUT
        )
    memory: dict[int, Memory] = {}
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(seconds_between):
            with contextlib.suppress(psutil.Error):
                for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                    _look_at(each, memory, proportional)
            tick(process)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        status = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        seconds = time.perf_counter() - clock
        ended.set()
        looking.join()
    return Watched(seconds, status, (waited_seconds() - waited) / seconds, started, memory)


def _look_at(process: psutil.Process, memory: dict[int, Memory], proportional: bool) -> None:
    with contextlib.suppress(psutil.Error, OSError):
        known = memory.setdefault(process.pid, Memory(" ".join(process.cmdline())))
        lines = dict(
            line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if ":" in line
        )
        for name, kept in _STATUS_FIELDS.items():
            if name in lines:
                setattr(known, kept, max(getattr(known, kept), int(lines[name].split()[0]) * 1024))
        if proportional:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            found = int(text.split("\nPss:")[1].split()[0]) * 1024
            known.proportional = max(known.proportional, found)


def cores() -> int:
    return len(os.sched_getaffinity(0))
