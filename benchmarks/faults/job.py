"""One start of the job: its processes, their output, and how they ended."""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.faults.tiny import ROOT

_PAUSE_SECONDS = 0.004  # between two looks at files
_SLOW_SECONDS = 0.05  # between two looks at processes


class Interrupted(Exception):  # noqa: N818 - the campaign was told to stop
    """The campaign must end; trials clean up on the way out."""


class Watch:
    """Waits that end when the campaign is stopped."""

    def __init__(self) -> None:
        self.stop = threading.Event()

    def until(self, condition: Callable[[], bool], seconds: float, pause_seconds: float = _PAUSE_SECONDS) -> bool:
        """Return whether the condition became true in time. Raises Interrupted if the campaign must end."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            if self.stop.wait(min(pause_seconds, max(0.0, deadline - time.monotonic()))):
                raise Interrupted
        return True


def arrived(run: Path, moment: str) -> bool:
    """Return whether a file matches the pattern; `pattern:n`: one with n lines."""
    pattern, _, lines = moment.partition(":")
    try:
        found = list(run.glob(pattern))
        return any(path.read_bytes().count(b"\n") >= int(lines) for path in found) if lines else bool(found)
    except OSError:  # it was removed meanwhile
        return False


class Start:
    """The processes of one start, with a command for each node, killed at the end of a `with` block."""

    def __init__(self, commands: Sequence[Sequence[str]], environment: dict[str, str], log: Path):
        self.began = time.monotonic()
        self._logs = [log.with_name(f"{log.name}.{node}") for node in range(len(commands))]
        self.launchers = []
        for argv, path in zip(commands, self._logs, strict=True):
            with open(f"{path}.out", "wb") as out, open(f"{path}.err", "wb") as err:
                self.launchers.append(subprocess.Popen(
                    argv, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                    start_new_session=True,
                ))  # fmt: skip

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def members(self) -> list[psutil.Process]:
        """Return all living processes of this start, even if their launcher is gone."""
        groups = {launcher.pid for launcher in self.launchers}
        for launcher in self.launchers:
            launcher.poll()  # reaps
        out = []
        for pid in psutil.pids():
            with suppress(ProcessLookupError, psutil.Error):  # it is ending
                if os.getpgid(pid) in groups and (process := psutil.Process(pid)).status() != psutil.STATUS_ZOMBIE:
                    out.append(process)
        return out

    def ranks(self) -> dict[int, psutil.Process]:
        """Return the living training processes by rank."""
        out: dict[int, psutil.Process] = {}
        for process in self.members():
            with suppress(psutil.Error):  # it is ending
                rank = process.environ().get("RANK")
                if rank is not None and any(part.endswith("launcher/train.py") for part in process.cmdline()):
                    out.setdefault(int(rank), process)
        return out

    def ended(self) -> bool:
        return not self.members()

    def await_end(self, watch: Watch, seconds: float) -> bool:
        """Return whether all processes end by themselves in time."""
        return watch.until(self.ended, seconds, _SLOW_SECONDS)

    def await_rank(self, watch: Watch, rank: int, seconds: float) -> psutil.Process | None:
        """Wait for the process of a rank; None if the job ends first."""
        watch.until(lambda: rank in self.ranks() or self.ended(), seconds, _SLOW_SECONDS)
        return self.ranks().get(rank)

    def await_ranks_end(self, watch: Watch, seconds: float, but: int | None = None) -> bool:
        """Return whether all ranks (except `but`) end by themselves in time."""
        return watch.until(lambda: self.ranks().keys() <= {but}, seconds, _SLOW_SECONDS)

    def kill(self) -> None:
        """Kill every process and wait until none is left."""
        while members := self.members():
            for process in members:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(_SLOW_SECONDS)

    @property
    def status(self) -> int:
        """Return the first exit status that is not 0, as a shell sees it; 0 if all launchers ended with 0."""
        statuses = [launcher.wait() for launcher in self.launchers]
        return next((128 - status if status < 0 else status for status in statuses if status), 0)

    def send(self, number: signal.Signals, target: str) -> None:
        """Send a signal to the launcher's `command`, to its `child`, which starts the ranks, or to the whole `group`."""
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if target == "group":
                for launcher in self.launchers:
                    os.killpg(launcher.pid, number)
                return
            command = psutil.Process(self.launchers[0].pid)
            children = command.children() if target == "child" else []
            (children or [command])[0].send_signal(number)

    def _text(self, suffix: str) -> str:
        return "\n".join(Path(f"{path}{suffix}").read_text(errors="replace") for path in self._logs)

    @property
    def errors(self) -> str:
        return self._text(".err")

    @property
    def output(self) -> str:
        return self._text(".out") + self.errors

    @property
    def messages(self) -> list[str]:
        """Return the lines `pkd: ...` on stderr."""
        return re.findall(r"^pkd: .*$", self.errors, re.MULTILINE)

    @property
    def last_message(self) -> str:
        return (self.messages or self.errors.strip().splitlines() or [""])[-1].strip()
