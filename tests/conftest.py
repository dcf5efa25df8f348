"""What the tests share: a tiny teacher, tiny data, and a way to start the real launcher.

Everything is made here, from fixed seeds; nothing is fetched.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import forked
import psutil
import pytest

from benchmarks.faults.job import Start, arrived
from benchmarks.faults.tiny import (
    ROOT,
    command,
    environment,
    make_body,
    make_data,
    sentences,
    write_config,
    write_tsv,
)
from pkd_dist.limits import free_memory
from pkd_dist.network import free_port

__all__ = ["ROOT", "command", "environment", "make_body", "sentences", "write_config", "write_tsv"]


_MEMORY, _ROOM = Path("/dev/shm"), 4e9


def pytest_configure() -> None:
    """Put temporary folders in /dev/shm if it has space and allows execution: a third of a tiny run is waiting for the disk."""
    if "TMPDIR" in os.environ or free_memory() < 2 * _ROOM:
        return
    with contextlib.suppress(OSError):
        about = os.statvfs(_MEMORY)
        if about.f_bavail * about.f_frsize > _ROOM and not about.f_flag & os.ST_NOEXEC and os.access(_MEMORY, os.W_OK):
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_MEMORY))


_FIRST = (
    "test_sweep.py", "test_slurm.py", "test_launchers.py", "test_comparisons.py", "test_prometheus.py",
    "test_multiple_choice_runs.py", "test_export.py", "test_wheel.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files first that take longest, so that no worker of pytest-xdist is left alone with one at the end."""
    items.sort(key=lambda item: _FIRST.index(item.path.name) if item.path.name in _FIRST else len(_FIRST))


@pytest.fixture(scope="session", autouse=True)
def hangups_end_jobs() -> None:
    """Under nohup SIGHUP is ignored, and so it would be by the jobs that tests start and send it to."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def body(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny body; read-only."""
    return make_body(tmp_path_factory.mktemp("body") / "bert", heads=2)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """203 training and 41 dev sentences: neither divides by ranks or batch. Read-only."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def teacher(body: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny body with a classifier, as if fine-tuned; read-only."""
    import torch

    from pkd_dist.model.encoder import load_model, load_tokenizer, save_model

    labels = {"num_labels": 2, "id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    folder = tmp_path_factory.mktemp("teacher") / "bert"
    torch.manual_seed(5)
    save_model(load_model(str(body), new_head=True, **labels), load_tokenizer(str(body)), folder)
    return folder


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser, for pages that must be looked at as people do."""
    from playwright.sync_api import sync_playwright

    where = shutil.which("chromium") or shutil.which("google-chrome")
    assert where, "install the Debian package chromium (`.ci/run` does)"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=where, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that more threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


PACKAGES = {"prometheus": "prometheus", "promtool": "prometheus", "prometheus-pushgateway": "prometheus-pushgateway"}
"""Programs that tests run: the Debian package that brings each."""


@pytest.fixture(scope="session")
def prometheus_programs() -> None:
    missing = [program for program in PACKAGES if not shutil.which(program)]
    packages = " ".join(sorted({PACKAGES[program] for program in missing}))
    assert not missing, f"not on PATH: {', '.join(missing)}; install: apt-get install {packages}"


def whole_run(body: Path, data: Path, folder: Path) -> dict[str, Any]:
    """A whole run that takes seconds."""
    return {
        "run": {"dir": str(folder / "run"), "timeout_seconds": 120},
        "task": {"name": "sst2", "data": str(data), "max_length": 32},
        "teacher": {"model": str(body), "finetune": {"epochs": 2, "learning_rate": 3e-3, "batch_size": 16}},
        "student": {"layers": [1, 3]},
        "train": {"epochs": 2, "batch_size": 16, "learning_rate": 3e-3, "deepspeed": "ds_configs/zero1.json"},
        "cache": {"shard_rows": 50},
        "checkpoint": {"every_steps": 5, "min_seconds": 0},
        "evaluate": {"latency_samples": 10},
        "export": {"formats": ["safetensors"]},
        "metrics": {"enabled": False},
    }


@pytest.fixture
def settings(body: Path, data: Path, tmp_path: Path) -> dict[str, Any]:
    """A whole run; tests change it before they write it."""
    return whole_run(body, data, tmp_path)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def bare_ranks(count: int) -> list[dict[str, str]]:
    """The environments of so many ranks on this host, as torchrun makes them."""
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [environment(RANK=str(rank), LOCAL_RANK=str(rank), **common) for rank in range(count)]


def python(program: Path, *arguments: object, **extra: str) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, sooner than a Python of its own would; `extra` is added to the environment."""
    return forked.run(program, arguments, ROOT, [environment(**extra)], timeout=300)


def pkd(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs `pkd` to its end."""
    return python(ROOT / "pkd_dist/cli/__main__.py", *arguments)


TRAIN = ROOT / "launcher/train.py"
TO_EXPORT = ("--stages", "data,teacher,cache,init,distill,evaluate,export")
"""All but the report, which takes a quarter of the time of a tiny run."""


def launch(*arguments: str | Path, bare: int = 0, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs launcher/train.py to its end: as one process, or on so many ranks of no launcher."""
    return forked.run(TRAIN, arguments, ROOT, bare_ranks(bare) if bare else [environment()], timeout)


def refused(*arguments: str | Path, bare: int = 0) -> str:
    """Runs launcher/train.py, which must end with status 2 and one line on stderr; returns the line."""
    done = launch(*arguments, bare=bare)
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert done.stderr.startswith("pkd: ") and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr.rstrip("\n")


@pytest.fixture(scope="session")
def taught(body: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that was fine-tuned on the tiny data; read-only."""
    folder = tmp_path_factory.mktemp("taught")
    done = launch("--config", write_config(whole_run(body, data, folder), folder), "--stages", "data,teacher")
    assert done.returncode == 0, done.stderr
    return folder / "run/teacher"


@contextlib.contextmanager
def started(*arguments: str | Path, ranks: int = 1) -> Iterator[list[forked.Process]]:
    """The processes of a job, by rank, without a launcher; killed at the end, if they have not ended."""
    with tempfile.TemporaryDirectory() as place:
        job = []
        try:
            for rank, variables in enumerate(bare_ranks(ranks) if ranks > 1 else [environment()]):
                files = Path(place, f"{rank}.out"), Path(place, f"{rank}.err")
                job.append(forked.Process(TRAIN, arguments, ROOT, variables, *files))
            yield job
        finally:
            for process in job:
                process.kill()


class ForkedStart(Start):
    """A start of `benchmarks.faults` without a launcher: two ranks for a command of deepspeed, one process for one of Python."""

    def __init__(self, commands: Sequence[Sequence[str]], variables: dict[str, str], log: Path):
        [argv], self.began = commands, time.monotonic()
        program = argv.index(str(TRAIN))
        environments = [variables | rank for rank in bare_ranks(2)] if program > 1 else [variables]
        self._logs = [log.with_name(f"{log.name}.{rank}") for rank in range(len(environments))]
        self.launchers = [
            forked.Process(TRAIN, argv[program + 1 :], ROOT, own, Path(f"{text}.out"), Path(f"{text}.err"))
            for own, text in zip(environments, self._logs, strict=True)
        ]

    def ended(self) -> bool:  # a process that has just been forked is not in its own group yet
        return all(process.poll() is not None for process in self.launchers) and super().ended()

    def ranks(self) -> dict[int, psutil.Process]:
        alive = {process.pid: process for process in self.members()}
        return {rank: alive[process.pid] for rank, process in enumerate(self.launchers) if process.pid in alive}


def until(moment: str, run: Path, job: Sequence[forked.Process | subprocess.Popen[str]], timeout: float = 180) -> None:
    """Waits until a file of a run is there, as `arrived` reads the moment, while every process of the job lives."""
    deadline = time.monotonic() + timeout  # a slow machine may take a minute
    while not arrived(run, moment):
        ended = [process.communicate() for process in job if process.poll() is not None]
        assert not ended, ended
        assert time.monotonic() < deadline, f"{moment}: not within {timeout} s"
        time.sleep(0.004)  # watching, not hoping: what it waits for is a file


def losses(run: Path) -> list[float]:
    """The loss of each step of a run."""
    from pkd_dist.telemetry.records import read

    return [record["loss"] for record in read(run / "metrics.jsonl") if "split" not in record]


def results(run: Path) -> dict[str, Any]:
    return json.loads((run / "results_eval.json").read_text())
