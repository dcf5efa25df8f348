"""Where the time of a training step goes, without waits for the device that the step would not do anyway."""

from __future__ import annotations

import time

import torch

PARTS = ("data", "forward", "backward", "ranks", "optimizer", "device")
"""Parts of a step, in the records' order.

`data` makes the batch; `forward` includes reading the teacher outputs; `backward` includes averaging gradients over ranks;
`ranks` sums over all ranks, with the wait for slower ones. `device` is the whole step in a CUDA graph (`graph_step.py`).
"""


class StepClock:
    """Measures the parts of one step on this rank.

    A GPU runs asynchronously, but the host reads the loss of every micro-batch, which waits for its forward and backward
    pass. An event on the device, read only after that wait, splits the time between the two. The end of the optimizer's
    update runs during the next step.

    Attributes:
        start: `time.perf_counter()` at the start of the step.
        seconds: by part. `device` stays 0 here.
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
        """Add the time since the last call (or the start) to a part.

        Forward and backward alternate. Call it for `backward` after the host has read the loss.
        """
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
