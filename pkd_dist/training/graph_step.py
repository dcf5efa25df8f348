"""A whole optimizer step that never waits for the host, and that a GPU is told of in one launch.

A small student's step is a thousand kernels of some microseconds each: launched one by one, they leave a GPU idle for most
of the time. Here forward and backward pass, clipping and AdamW's update are captured once for each shape of batch as a
CUDA graph, and replayed. The step's values are read when the next one is under way.

For a lone rank with float32 master weights, where DeepSpeed's engine has nothing to average or shard. The update is the
engine's own; a step whose loss or gradient is not finite changes no weight, which AdamW is told on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pkd_dist.data.batches import Batch
from pkd_dist.data.on_device import PendingBatch
from pkd_dist.telemetry.log import log

_WARM_UP = 2
"""Passes before a capture, in which libraries choose their kernels and take their memory."""


@dataclass(frozen=True)
class Values:
    """What a step was, once the device has done it.

    Attributes:
        host: float32 (terms + 1,): the loss terms, and the gradient's norm before clipping.
        events: around the step, of a GPU.
    """

    host: torch.Tensor
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None

    def read(self) -> tuple[np.ndarray, float]:
        """The values as float64, and the seconds that the device took; waits for it."""
        seconds = 0.0
        if self.events:
            self.events[1].synchronize()
            seconds = self.events[0].elapsed_time(self.events[1]) / 1e3
        return self.host.double().numpy(), seconds


class Lowered:
    """A module under autocast whose weights are cast at once, and so are their gradients: autocast does the same one by
    one, in more than a hundred kernels of a small student's step. Called as the module is. (`lean.attend_first` reads two
    biases itself, in float32: here they are rounded, as autocast rounds those of all other layers.)

    Args:
        low: autocast's dtype.
    """

    def __init__(self, module: nn.Module, low: torch.dtype):
        cast = {id(p) for layer in module.modules() if isinstance(layer, nn.Linear) for p in layer.parameters()}
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad and id(p) in cast]
        self._module = module
        self._masters: list[torch.Tensor] = [p for _, p in named]
        self._copies = {name: torch.empty_like(p, dtype=low).requires_grad_() for name, p in named}
        self._gradients = [torch.empty_like(p) for p in self._masters]

    def __call__(self, *arguments: Any) -> Any:
        with torch.no_grad():
            torch._foreach_copy_(list(self._copies.values()), self._masters)
        return torch.func.functional_call(self._module, self._copies, arguments)

    def zero_grad(self) -> None:
        for copy in self._copies.values():
            copy.grad = None

    def raise_gradients(self) -> None:
        """Gives the module's own weights the gradients of the copies."""
        wides, narrows = [], []
        for master, wide, copy in zip(self._masters, self._gradients, self._copies.values(), strict=True):
            if copy.grad is not None:
                wides.append(wide)
                narrows.append(copy.grad)
                master.grad = wide
        torch._foreach_copy_(wides, narrows)
        self.zero_grad()


class GraphStep:
    """One optimizer step of one module.

    Args:
        module: on its device, in training mode when called.
        adam: AdamW of its parameters, fused, its state allocated.
        losses: (module, batch) -> per-example terms (B,), `total` among them.
        terms: those whose sums over the batch are handed out, in this order.
        max_grad_norm: 0: no clipping.
        low: the dtype of the module's autocast; None: it has none.
        capture: replay CUDA graphs. Where a model cannot be captured its steps run operation by operation, which is said.
    """

    def __init__(
        self,
        module: nn.Module,
        adam: torch.optim.AdamW,
        losses: Callable[[Any, Batch], dict[str, torch.Tensor]],
        terms: Sequence[str],
        max_grad_norm: float,
        device: torch.device,
        low: torch.dtype | None,
        capture: bool,
    ):
        self._module, self._adam, self._losses, self._terms = module, adam, losses, tuple(terms)
        self._limit, self._device = max_grad_norm, device
        self._rate = torch.zeros((), device=device)
        for group in adam.param_groups:
            group["capturable"] = device.type == "cuda"
        self._parameters = [p for group in adam.param_groups for p in group["params"]]
        self._lowered = Lowered(module, low) if low else None
        self._values = torch.zeros(len(self._terms) + 1, device=device)
        self._graphs: dict[tuple[int, ...], tuple[Any, torch.cuda.CUDAGraph] | None] | None = {} if capture else None
        self._pool = torch.cuda.graph_pool_handle() if capture else None

    def __call__(self, batch: Batch | PendingBatch, rate: float, seed: int) -> Values:
        """Does a step, or has the device do it.

        Args:
            batch: with the teacher's answers where the losses need them, on the host or the device; or the rows of one.
            rate: learning rate.
            seed: of whatever is drawn at random in this step.
        """
        captured = self._captured(batch)
        self._rate.fill_(rate)
        if captured:
            static, graph = captured
            static.fill(batch)
        else:
            batch = batch.to(self._device)
        for generator in {self._generator, torch.default_generator}:
            generator.manual_seed(seed)
        events = None
        if self._device.type == "cuda":
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
        if captured:
            graph.replay()
        else:
            self._step(batch)
        if not events:
            return Values(self._values.clone(), None)
        host = torch.empty_like(self._values, device="cpu", pin_memory=True)
        host.copy_(self._values, non_blocking=True)
        events[1].record()
        return Values(host, events)

    @property
    def _generator(self) -> torch.Generator:
        on_gpu = self._device.type == "cuda"
        return torch.cuda.default_generators[self._device.index or 0] if on_gpu else torch.default_generator

    def _step(self, batch: Batch | PendingBatch) -> None:
        sums = self._backward(batch)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        torch.stack([*sums, norm], out=self._values)
        adam: Any = self._adam
        for group in adam.param_groups:
            group["lr"] = self._rate
        # the optimizer divides by it in its own pass over the gradients
        adam.grad_scale = ((norm + 1e-6) / self._limit).clamp(min=1.0) if self._limit > 0 else None
        adam.found_inf = (~torch.isfinite(self._values).all()).float()
        adam.step()
        adam.grad_scale = adam.found_inf = None
        adam.zero_grad(set_to_none=True)

    def _backward(self, given: Batch | PendingBatch) -> list[torch.Tensor]:
        batch = given.batch()
        terms = self._losses(self._lowered or self._module, batch)
        sums = {name: (value * batch.weight_B).sum() for name, value in terms.items()}
        sums["total"].backward()
        if self._lowered:
            self._lowered.raise_gradients()
        return [sums[name].detach().float() if name in sums else self._rate.new_zeros(()) for name in self._terms]

    def _captured(self, batch: Batch | PendingBatch) -> tuple[Any, torch.cuda.CUDAGraph] | None:
        if self._graphs is None:
            return None
        if batch.key not in self._graphs:
            stream = torch.cuda.current_stream()
            try:
                self._graphs[batch.key] = self._capture(batch.to(self._device))
            except torch.OutOfMemoryError:
                log.info("no room for the CUDA graph of batches of %s: they run kernel by kernel", batch.key)
                self._recover(stream)
                self._graphs[batch.key] = None
            except RuntimeError as error:
                why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                log.info("the model's steps cannot be captured as a CUDA graph, so they run kernel by kernel: %s", why)
                self._recover(stream)
                self._graphs = None
                return None
        return self._graphs[batch.key]

    def _recover(self, stream: torch.cuda.Stream) -> None:
        """Undoes what a capture that failed leaves behind; torch ends one that succeeds alone."""
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize()
        with contextlib.suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)  # type: ignore[arg-type]
        self._adam.zero_grad(set_to_none=True)
        if self._lowered:
            self._lowered.zero_grad()
        generator = self._generator
        generator.graphsafe_set_state(generator.clone_state())  # its own still believes to be captured

    def _capture(self, static: Batch | PendingBatch) -> tuple[Any, torch.cuda.CUDAGraph]:
        """The step as a graph that reads `static`; changes nothing but `.grad`, which it empties."""
        aside, now = torch.cuda.Stream(), torch.cuda.current_stream()
        aside.wait_stream(now)
        with torch.random.fork_rng([self._device]), torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                self._backward(static)
                self._adam.zero_grad(set_to_none=True)
        now.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # not "global": another thread may ask the device for its memory meanwhile, for the metrics
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._step(static)
        return static, graph
