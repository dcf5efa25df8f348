"""What the tests of `pkd sweep` and `pkd compare` share: a command in the background, its workers, and what a run recorded."""

import contextlib
import time

import forked
import psutil
from conftest import ROOT, environment

from benchmarks import sweep
from pkd_dist.telemetry.records import read


@contextlib.contextmanager
def in_background(log, *arguments):
    """Runs `pkd`, whose output is appended to a file; if it still runs at the end, it is killed with its workers."""
    process = forked.Process(ROOT / "pkd_dist/cli/__main__.py", arguments, ROOT, environment(), log, log)
    try:
        yield process
    finally:
        if process.poll() is None:  # else its workers end by themselves
            process.kill()


def workers_of(process):
    return sweep.workers_of(psutil.Process(process.pid))


def wait_for(happens, process, timeout_seconds=120):
    """Waits for something that a process does while it lives."""
    deadline = time.monotonic() + timeout_seconds
    while not happens():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)  # watching, not hoping


def steps(metrics):
    """All that a training recorded, but for times."""
    return [
        {key: value for key, value in row.items() if key not in ("time", "seconds", "samples_per_second")}
        for row in read(metrics)
    ]
