"""Where the time of a training step goes, without a wait for the device that the step does not do anyway."""

from __future__ import annotations

import time

import torch

PARTS = ("data", "forward", "backward", "ranks", "optimizer", "device")


class StepClock:
    """Stands beside one step and is told when each of its parts has ended.

    A GPU works behind the host's back, but the loss of a micro-batch is read on the host, which waits for its forward and
    backward pass. How those two shared the time, an event on the device says; it is read only after that wait. What is
    left of an optimizer's update runs under the next step.

    Attributes:
        start: `time.perf_counter()` at its beginning.
        seconds: of this rank, by part: `data` (the batch made), `forward` (and the teacher's answers fetched), `backward`
            (and gradients averaged over ranks), `ranks` (sums over all ranks, and the wait for slower ones), `optimizer`.
            `device` is for a step that is launched whole (`whole.py`), and stays 0 here.
    """

    def __init__(self, device: torch.device):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._on_gpu = device.type == "cuda"
        self._event = self._now()
        self.start = self._last = time.perf_counter()

    def _now(self) -> torch.cuda.Event | None:
        if not self._on_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ended(self, part: str) -> None:
        """What was done since the last call, or since the start, was this part. Forward and backward are told in turn, the
        latter when the host has read the loss."""
        before, self._event = self._event, self._now() if part != "backward" else self._event
        now = time.perf_counter()
        took, self._last = now - self._last, now
        self.seconds[part] += took
        if part == "forward":
            self._forward, self._began = took, before
        elif part == "backward" and self._began and self._event:
            late = self._began.elapsed_time(self._event) / 1e3 - self._forward
            self.seconds["forward"] += late
            self.seconds["backward"] -= late
            self._event = self._now()
