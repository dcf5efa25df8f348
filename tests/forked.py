"""Starts Python programs sooner: each process is forked from one that has loaded the large libraries and done nothing else.

A program runs in a process of its own as `__main__`, with its own arguments, environment, folder and output. What differs
from a start of its own: what the environment decides while Python and torch are loaded (such as the seed of string hashes, so
the order of sets) is the same for all, functions registered with atexit do not run, and nothing shows which of the libraries
a program needs, or what they print while they are loaded.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

# else a GPU that is looked for before a fork is lost after it
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
_FROM = multiprocessing.get_context("forkserver")
_LOADED = [
    "torch", "transformers.models.auto.modeling_auto", "transformers.models.bert.modeling_bert", "sklearn.metrics",
    "scipy.stats", "pkd_dist.cli.main", "pkd_dist.pipeline", "pkd_dist.report.pages", "pkd_dist.search.worker", "pkd_dist.search.page",
    "pkd_dist.comparison.study", "onnxscript", "onnxruntime.transformers.optimizer",
    "torch.onnx._internal.exporter._core",
]  # fmt: skip
if not os.path.exists("/dev/nvidiactl"):  # DeepSpeed may look for GPUs while it is imported
    _LOADED.append("pkd_dist.training.deepspeed_engine")
_FROM.set_forkserver_preload(_LOADED)
_GRACE = 20.0
"""Seconds that the other processes have once one has ended with a status other than 0."""


class Process:
    """A program in a process and session of its own, with the calls of `subprocess.Popen` that the tests need."""

    def __init__(
        self,
        program: Path,
        arguments: Sequence[object],
        cwd: Path,
        environment: Mapping[str, str],
        out: Path,
        err: Path,
    ):
        given = str(program), [str(argument) for argument in arguments], str(cwd), dict(environment), str(out), str(err)
        for file in (out, err):
            file.touch()
        self._process = _FROM.Process(target=_become, args=given)
        self._process.start()
        self._out, self._err = out, err
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.sentinel = self._process.sentinel

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise AssertionError(f"did not end in time:\n{self._out.read_text()}\n{self._err.read_text()}")
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        return self._out.read_text(), self._err.read_text()

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it and what it started, and waits until it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()  # before it has a group of its own
        self._process.join()


def run(
    program: Path, arguments: Sequence[object], cwd: Path, environments: Sequence[Mapping[str, str]], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, once for each environment at the same time.

    Returns:
        What `subprocess.run` does, with the output of all processes. The status is 0 where that of all is, else that of
        one that died of a signal, else the least of the others.

    Raises:
        AssertionError: they did not end in time, and were killed; says what they had printed.
    """
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        processes: list[Process] = []
        try:
            for environment in environments:
                processes.append(Process(program, arguments, cwd, environment, out, err))
            deadline, running = time.monotonic() + timeout, {p.sentinel: p for p in processes}
            while running:
                ended = wait(list(running), max(0.0, deadline - time.monotonic()))
                if not ended:
                    said = f"{out.read_text()}\n{err.read_text()}"
                    raise AssertionError(
                        f"{program.name}: {len(running)} of {len(processes)} did not end in time:\n{said}"
                    )
                if any([running.pop(sentinel).wait() for sentinel in ended]):
                    deadline = min(deadline, time.monotonic() + _GRACE)
        finally:
            for process in processes:
                process.kill()
        statuses = [process.returncode for process in processes if process.returncode]
        return subprocess.CompletedProcess(str(program), min(statuses, default=0), out.read_text(), err.read_text())


def _become(program: str, arguments: list[str], cwd: str, environment: dict[str, str], out: str, err: str) -> None:
    import torch

    gc.freeze()  # else a collection walks, and so copies, all that was loaded
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for place, number in ((out, 1), (err, 2)):
        file = os.open(place, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    if (threads := environment.get("OMP_NUM_THREADS", "")).isdecimal():  # torch has read the parent's
        torch.set_num_threads(int(threads))
    sys.argv = [program, *arguments]
    sys.path[0] = str(Path(program).parent)
    runpy.run_path(program, run_name="__main__")
