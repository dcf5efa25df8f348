"""Stop signals: the first is noted and acted on at the next safe point, a second one ends the process at once.

Until the ranks have met there is nothing to commit and nobody to agree with: the first one ends the process.

The main thread may sit in a collective for minutes, where Python runs no handler. So the signals' numbers go through a
pipe, as the kernel delivers them, to a thread of their own.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from pkd_dist.distributed.ranks import first_of_node
from pkd_dist.errors import Preempted
from pkd_dist.telemetry.log import log

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SAY_SECONDS, _SAME_SECONDS = 1.0, 2.0
"""When the first is spoken of, and how long further signals count as the first: a launcher passes on what the terminal sends to all."""


class StopSignals:
    """Notes the first of `SIGNALS` from `install` on; to be used in the main thread.

    Attributes:
        number: of the first signal; 0 until one has come.
    """

    def __init__(self) -> None:
        self.number = 0
        self._first_seconds = 0.0
        self._ending = threading.Event()
        self._met = False

    def install(self) -> StopSignals:
        ours, kernels = socket.socketpair()
        kernels.setblocking(False)
        self._pipe = ours, kernels
        signal.set_wakeup_fd(kernels.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)  # a handler of Python's must be there for the pipe to be written
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def uninstall(self) -> None:
        """Puts the signals back as a new process has them."""
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for end in self._pipe:
            end.close()

    def met(self) -> None:
        """The ranks have met: from now on they agree on when to stop."""
        self._met = True

    def ending(self) -> None:
        """The process is ending in good order: what comes now changes nothing."""
        self._ending.set()

    def _listen(self) -> None:
        while True:
            try:
                got = self._pipe[0].recv(64)
            except OSError:
                return
            if not got:
                return
            for number in got:
                if number in SIGNALS:
                    self._note(number)

    def _note(self, number: int) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if not self._met and not self._ending.is_set():
            if first_of_node():
                print(
                    f"pkd: stopped by {name} before the ranks had met; the same command goes on",
                    file=sys.stderr,
                    flush=True,
                )
            os._exit(Preempted.exit_status)
        if not self.number:
            self.number, self._first_seconds = number, now
            if not self._ending.wait(_SAY_SECONDS):  # a launcher also sends one when another rank was lost
                log.info("%s: stopping at the next safe point; the same signal again ends at once", name)
        elif now - self._first_seconds > _SAME_SECONDS and not self._ending.is_set():
            log.info("%s again: ending at once", name)
            os._exit(128 + number)


def name_of(number: int) -> Any:
    return signal.Signals(number).name
