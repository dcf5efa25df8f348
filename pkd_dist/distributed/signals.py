"""Stop signals: the first is noted and acted on at the next safe point; a second ends the process at once.

Until the ranks have met there is nothing to commit and no other rank to agree with, so the first ends the process.

The main thread may be in a collective for minutes, where Python runs no signal handlers. Signal numbers therefore go through
a wakeup pipe, written by the C-level handler, to a thread that reads it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

from pkd_dist.distributed.ranks import first_of_node
from pkd_dist.errors import Preempted
from pkd_dist.telemetry.log import log

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
_REPORT_SECONDS = 1.0
"""Delay before the first signal is reported: a launcher also sends one when another rank was lost."""
_SAME_SECONDS = 2.0
"""Signals this soon after the first count as the first: a launcher forwards what the terminal has sent to all processes."""


class StopSignals:
    """Notes the first of `SIGNALS` after `install`. To be used in the main thread.

    Attributes:
        number: the first signal, 0 if none has arrived.
    """

    def __init__(self) -> None:
        self.number = 0
        self._first_seconds = 0.0
        self._ending = threading.Event()
        self._met = False

    def install(self) -> StopSignals:
        # nohup starts its command with SIGHUP ignored, and it stays so.
        self._noted = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        self._pipe = reader, writer
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in self._noted:
            signal.signal(number, lambda *_: None)  # the pipe is only written for signals with a Python handler
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def uninstall(self) -> None:
        """Restore the handlers of a new process."""
        signal.set_wakeup_fd(-1)
        for number in self._noted:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for end in self._pipe:
            end.close()

    def met(self) -> None:
        """Note that the ranks have met: from now on they agree on when to stop."""
        self._met = True

    def ending(self) -> None:
        """Note that the process is ending in an orderly way: later signals are ignored."""
        self._ending.set()

    def _listen(self) -> None:
        while True:
            try:
                received = self._pipe[0].recv(64)
            except OSError:
                return
            if not received:
                return
            for number in received:
                if number in SIGNALS:
                    self._note(number)

    def _note(self, number: int) -> None:
        now, name = time.monotonic(), name_of(number)
        if not self._met and not self._ending.is_set():
            if first_of_node():
                message = f"pkd: stopped by {name} before the ranks had met; rerun the same command to resume"
                print(message, file=sys.stderr, flush=True)
            os._exit(Preempted.exit_status)
        if not self.number:
            self.number, self._first_seconds = number, now
            if not self._ending.wait(_REPORT_SECONDS):
                log.info("%s: stopping at the next safe point; send it again to end at once", name)
        elif now - self._first_seconds > _SAME_SECONDS and not self._ending.is_set():
            log.info("%s again: ending at once", name)
            os._exit(128 + number)


def name_of(number: int) -> str:
    return signal.Signals(number).name
