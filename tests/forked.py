"""Starts Python programs sooner: each process is forked from one that has loaded the large libraries and done nothing else.

A program runs as it does by itself: its own process, as `__main__`, with its own arguments, environment, folder and
output. What is read from the environment while torch is imported (OMP_NUM_THREADS) is that of the tests.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_FROM = multiprocessing.get_context("forkserver")
_FROM.set_forkserver_preload(
    ["torch", "transformers.models.auto.modeling_auto", "transformers.models.bert.modeling_bert", "sklearn.metrics",
     "scipy.stats", "pkd_dist.cli", "pkd_dist.pipeline"]
)  # fmt: skip


def start(
    program: Path, arguments: Sequence[object], cwd: Path, environment: Mapping[str, str], out: Path, err: Path
) -> multiprocessing.process.BaseProcess:
    """Starts a program in a session of its own; its output is appended to files."""
    given = str(program), [str(argument) for argument in arguments], str(cwd), dict(environment), str(out), str(err)
    process = _FROM.Process(target=_become, args=given)
    process.start()
    with contextlib.suppress(ProcessLookupError):  # it has ended
        while os.getsid(process.pid) != process.pid:
            time.sleep(0.0005)
    return process


def run(
    program: Path, arguments: Sequence[object], cwd: Path, environments: Sequence[Mapping[str, str]], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, once for each environment at the same time; what `subprocess.run` returns, with the
    output of all processes and the first status that is not 0.

    Raises:
        subprocess.TimeoutExpired: they were killed.
    """
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        processes = [start(program, arguments, cwd, environment, out, err) for environment in environments]
        try:
            for process in processes:
                process.join(timeout)
                if process.exitcode is None:
                    raise subprocess.TimeoutExpired(str(program), timeout, out.read_bytes(), err.read_bytes())
        finally:
            for process in processes:
                process.kill()
        status = next((process.exitcode for process in processes if process.exitcode), 0)
        return subprocess.CompletedProcess(str(program), status, out.read_text(), err.read_text())


def _become(program: str, arguments: list[str], cwd: str, environment: dict[str, str], out: str, err: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    os.setsid()
    for place, number in ((out, 1), (err, 2)):
        file = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.argv = [program, *arguments]
    sys.path[0] = str(Path(program).parent)
    runpy.run_path(program, run_name="__main__")
