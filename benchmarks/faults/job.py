"""One start of the job: its processes, what they said, how they ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from benchmarks.faults.tiny import ROOT

_PAUSE_SECONDS = 0.004  # between two looks at files
_SLOW_SECONDS = 0.05  # between two looks at processes


class Interrupted(Exception):  # noqa: N818 - the campaign was told to stop
    """The campaign is to end; what a trial holds is cleaned up on the way out."""


class Watch:
    """Waiting that a stop of the campaign ends."""

    def __init__(self) -> None:
        self.stop = threading.Event()

    def until(self, condition: Callable[[], bool], seconds: float, pause_seconds: float = _PAUSE_SECONDS) -> bool:
        """Whether the condition came true in time.

        Raises:
            Interrupted: the campaign is to end.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            if self.stop.wait(min(pause_seconds, max(0.0, deadline - time.monotonic()))):
                raise Interrupted
        return True


def arrived(run: Path, moment: str) -> bool:
    """Whether a file of the pattern exists; `pattern:n` waits for its n-th line."""
    pattern, _, lines = moment.partition(":")
    try:
        found = list(run.glob(pattern))
        return any(path.read_bytes().count(b"\n") >= int(lines) for path in found) if lines else bool(found)
    except OSError:  # it went while we looked
        return False


class Start:
    """The processes of one start: one launcher, or one on each node.

    Args:
        commands: one for each node.
        environment: of all.
        log: stdout and stderr of node k go to `LOG.k.out` and `LOG.k.err`.
    """

    def __init__(self, commands: Sequence[Sequence[str]], environment: dict[str, str], log: Path):
        self.began = time.monotonic()
        self._logs = [log.with_name(f"{log.name}.{node}") for node in range(len(commands))]
        self.launchers = []
        for argv, path in zip(commands, self._logs, strict=True):
            with open(f"{path}.out", "wb") as out, open(f"{path}.err", "wb") as err:
                self.launchers.append(
                    subprocess.Popen(
                        argv, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                        start_new_session=True,
                    )
                )  # fmt: skip

    def members(self) -> list[psutil.Process]:
        """All living processes of this start, those included whose launcher is gone."""
        groups = {launcher.pid for launcher in self.launchers}
        for launcher in self.launchers:
            launcher.poll()  # reaps
        out = []
        for pid in psutil.pids():
            try:
                if os.getpgid(pid) in groups:
                    process = psutil.Process(pid)
                    if process.status() != psutil.STATUS_ZOMBIE:
                        out.append(process)
            except (ProcessLookupError, psutil.Error):  # it is just ending
                continue
        return out

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes that are alive, by rank."""
        out: dict[int, psutil.Process] = {}
        for process in self.members():
            try:
                rank = process.environ().get("RANK")
                if rank is not None and any(part.endswith("launcher/train.py") for part in process.cmdline()):
                    out.setdefault(int(rank), process)
            except psutil.Error:  # it is just ending
                continue
        return out

    def child(self) -> psutil.Process | None:
        """The process that the launcher's command starts, and that starts the ranks of its node."""
        try:
            return next(iter(psutil.Process(self.launchers[0].pid).children()), None)
        except psutil.NoSuchProcess:
            return None

    def ended(self) -> bool:
        return not self.members()

    def await_end(self, watch: Watch, seconds: float) -> bool:
        """Whether all processes end by themselves in time."""
        return watch.until(self.ended, seconds, _SLOW_SECONDS)

    def await_rank(self, watch: Watch, rank: int, seconds: float) -> psutil.Process | None:
        """A rank's process, once there is one; None where the job ends without."""
        watch.until(lambda: rank in self.ranks() or self.ended(), seconds, _SLOW_SECONDS)
        return self.ranks().get(rank)

    def await_ranks_end(self, watch: Watch, seconds: float, but: int | None = None) -> bool:
        """Whether all ranks, but one where it is given, end by themselves in time."""
        return watch.until(lambda: self.ranks().keys() <= {but}, seconds, _SLOW_SECONDS)

    def kill(self) -> None:
        """Kills every process and waits until none is left, so that the next start meets none of them."""
        while members := self.members():
            for process in members:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            time.sleep(_SLOW_SECONDS)

    @property
    def status(self) -> int:
        """The exit status of the first launcher that did not end with 0, as a shell sees it; 0 where all did."""
        statuses = [launcher.wait() for launcher in self.launchers]
        return next((128 - status if status < 0 else status for status in statuses if status), 0)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to all processes, as a terminal does."""
        for launcher in self.launchers:
            try:
                os.killpg(launcher.pid, number)
            except ProcessLookupError:
                continue

    def _text(self, suffix: str) -> str:
        return "\n".join(Path(f"{path}{suffix}").read_text(errors="replace") for path in self._logs)

    @property
    def output(self) -> str:
        return self._text(".out") + self._text(".err")

    @property
    def errors(self) -> str:
        return self._text(".err")

    @property
    def messages(self) -> list[str]:
        """The lines that the package addressed to the user on stderr."""
        return re.findall(r"^pkd: .*$", self.errors, re.MULTILINE)

    @property
    def last_message(self) -> str:
        """The last of `messages`, else the last line on stderr."""
        lines = self.messages or [line for line in self.errors.splitlines() if line.strip()] or [""]
        return lines[-1].strip()
