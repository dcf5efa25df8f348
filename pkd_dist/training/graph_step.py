"""A step that one GPU does in one launch, without waiting for the host.

A small student's step is a thousand kernels of a few microseconds: launched one by one, they leave the GPU idle most of the
time. Here forward and backward pass, clipping and AdamW's update are captured once per batch shape as a CUDA graph, then
replayed (`GraphUpdate`). The host prepares and launches the next step, and only then reads the results of this one
(`GraphStep`).

For one rank on the plain engine, without accumulation. A step whose loss or gradient is not finite changes no weight, nor
do the steps launched after it: AdamW is told on the device (`found_inf`).
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pkd_dist.data.batches import Batch, collate
from pkd_dist.data.on_device import DeviceTokens, PendingBatch, open_device_tokens
from pkd_dist.metric_names import LOSS_TERMS
from pkd_dist.model.outputs import Forward, Outputs
from pkd_dist.telemetry.log import log
from pkd_dist.training.clock import PARTS
from pkd_dist.training.job import LossTerms
from pkd_dist.training.optimization import autocast, global_norm, set_learning_rate
from pkd_dist.training.plain_engine import PlainEngine
from pkd_dist.training.step import StepInputs, StepResult

_WARM_UP = 2
"""Passes before a capture, in which libraries choose their kernels and allocate their memory."""

Captured = tuple[Any, torch.cuda.CUDAGraph]
"""The static batch that a graph reads (`Batch` or `PendingBatch`), and the graph."""


@dataclass(frozen=True)
class _Launched:
    """What the host knows of a step that the device may still be doing."""

    values: Values
    step: int
    learning_rate: float
    examples: int
    tokens: int
    data_seconds: float
    teacher_seconds: float


class GraphStep:
    """A `step.TrainStep` whose results arrive one call later.

    A call launches step N on the device, then waits for step N-1 and returns its result; the first call returns None, and
    `flush` returns the last result. The host thus prepares a step while the device works on the one before.

    Args:
        update: of the engine in `inputs`.
        resident: the training set in the device's memory; None: the host makes the batches.
    """

    def __init__(self, inputs: StepInputs, update: GraphUpdate, resident: DeviceTokens | None):
        self._inputs, self._update, self._resident = inputs, update, resident
        self._launched: _Launched | None = None
        self._landed = 0.0

    def __call__(self, step: int) -> StepResult | None:
        began = time.perf_counter()
        if self._launched is None:
            self._landed = began
        inputs, job = self._inputs, self._inputs.job
        ((rows, weight),) = inputs.batches.rows(*inputs.position(step))
        batch: Batch | PendingBatch
        if self._resident:
            batch = self._resident.rows(rows, weight)
            made = time.perf_counter()
        else:
            batch = collate(job.train, rows, weight, job.pad_id)
            made = time.perf_counter()
            batch = inputs.with_teacher(batch)
        completed = time.perf_counter()
        rate = inputs.engine.schedule.learning_rate(step)
        values = self._update(batch, rate, inputs.seed(step))
        result = self.flush()
        self._launched = _Launched(
            values, step + 1, rate, inputs.examples(step), batch.tokens, made - began, completed - made
        )
        return result

    def flush(self) -> StepResult | None:
        if self._launched is None:
            return None
        done, self._launched = self._launched, None
        values, on_device = done.values.read()
        terms, norm = values[: len(LOSS_TERMS)], float(values[-1])
        if not np.isfinite(values).all():
            finite = bool(np.isfinite(terms).all())
            self._inputs.diverged("the gradient" if finite else "the loss", done.step, terms, finite, terms)
        before, self._landed = self._landed, time.perf_counter()
        took = self._landed - before
        idle = max(0.0, took - on_device)  # the device works while the host makes a batch
        data = min(done.data_seconds, idle)
        parts = {"data": data, "forward": min(done.teacher_seconds, idle - data), "device": on_device}
        return StepResult(
            step=done.step,
            terms=self._inputs.named(terms),
            grad_norm=norm,
            learning_rate=done.learning_rate,
            examples=done.examples,
            tokens=done.tokens,
            seconds={"step": took, **dict.fromkeys(PARTS, 0.0), **parts},
        )

    def stop_signal(self) -> int:
        return self._inputs.world.stop_signal()


def open_graph_step(inputs: StepInputs, engine: PlainEngine, capture: bool = True) -> GraphStep:
    """Return a graph step on the plain engine.

    Args:
        capture: False: run the same operations without a CUDA graph, on any device.
    """
    job = inputs.job
    engine.state.allocate()
    update = GraphUpdate(engine, inputs.losses, capture)
    return GraphStep(inputs, update, open_device_tokens(job.train, job.teacher_outputs, job.pad_id, engine.device))


@dataclass(frozen=True)
class Values:
    """What a step computed, once the device has done it.

    Attributes:
        host: float32 (terms + 1,): the loss terms, then the gradient norm before clipping.
        events: recorded on the GPU before and after the step; None on a CPU.
    """

    host: torch.Tensor
    events: tuple[torch.cuda.Event, torch.cuda.Event] | None

    def read(self) -> tuple[np.ndarray, float]:
        """Wait for the step; return its values as float64 and the seconds that the device took."""
        seconds = 0.0
        if self.events:
            self.events[1].synchronize()
            seconds = self.events[0].elapsed_time(self.events[1]) / 1e3
        return self.host.double().numpy(), seconds


class _CastModule:
    """A module under autocast whose weights, and whose gradients, are cast all at once.

    Autocast casts one by one, in more than a hundred kernels of a small student's step. (`first_token.py` reads two biases
    itself, in float32; here they are rounded, as autocast rounds those of all other layers.)

    Args:
        dtype: autocast's.
    """

    def __init__(self, module: nn.Module, device: torch.device, dtype: torch.dtype):
        cast = {id(p) for layer in module.modules() if isinstance(layer, nn.Linear) for p in layer.parameters()}
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad and id(p) in cast]
        self._module, self._autocast = module, autocast(device, dtype)
        self._masters: list[torch.Tensor] = [p for _, p in named]
        self._copies = {name: torch.empty_like(p, dtype=dtype).requires_grad_() for name, p in named}
        self._gradients = [torch.empty_like(p) for p in self._masters]

    def __call__(self, *arguments: Any) -> Outputs:
        with torch.no_grad():
            torch._foreach_copy_(list(self._copies.values()), self._masters)
        with self._autocast:
            return torch.func.functional_call(self._module, self._copies, arguments)

    def zero_grad(self) -> None:
        for copy in self._copies.values():
            copy.grad = None

    def cast_gradients(self) -> None:
        """Give the module's own weights the gradients of their copies, in float32."""
        wides, narrows = [], []
        for master, wide, copy in zip(self._masters, self._gradients, self._copies.values(), strict=True):
            if copy.grad is not None:
                wides.append(wide)
                narrows.append(copy.grad)
                master.grad = wide
        torch._foreach_copy_(wides, narrows)
        self.zero_grad()


class GraphUpdate:
    """One optimizer step of one module, captured as a CUDA graph per batch shape.

    Args:
        engine: its module is in training mode when called, and Adam's moments are allocated.
        losses: see `Job`.
        capture: replay CUDA graphs. If the model cannot be captured, its steps run kernel by kernel, with a log line.
    """

    def __init__(self, engine: PlainEngine, losses: LossTerms, capture: bool):
        device, dtype = engine.device, engine.autocast_dtype
        self._adam, self._losses, self._device = engine.optimizer, losses, device
        self._max_norm = engine.schedule.settings.max_grad_norm
        self._rate = torch.zeros((), device=device)
        for group in self._adam.param_groups:
            group["capturable"] = device.type == "cuda"
        self._parameters = [p for group in self._adam.param_groups for p in group["params"]]
        self._cast = _CastModule(engine.module, device, dtype) if dtype else None
        self._module: Forward = self._cast or engine.module
        self._values = torch.zeros(len(LOSS_TERMS) + 1, device=device)
        self._graphs: dict[tuple[int, ...], Captured | None] | None = {} if capture else None
        self._pool = torch.cuda.graph_pool_handle() if capture else None

    def __call__(self, batch: Batch | PendingBatch, rate: float, seed: int) -> Values:
        """Launch a step.

        Args:
            batch: with the teacher's outputs if the losses need them, on the host or the device; or the rows of one.
            rate: learning rate.
            seed: of everything drawn at random in this step.
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
        norm = global_norm([p.grad for p in self._parameters if p.grad is not None])
        torch.stack([*sums, norm], out=self._values)
        set_learning_rate(self._adam, self._rate)
        adam: Any = self._adam
        # fused AdamW divides gradients by `grad_scale` in its own pass, and skips the update if `found_inf`
        adam.grad_scale = ((norm + 1e-6) / self._max_norm).clamp(min=1.0) if self._max_norm > 0 else None
        adam.found_inf = (~torch.isfinite(self._values).all()).float()
        adam.step()
        adam.grad_scale = adam.found_inf = None
        adam.zero_grad(set_to_none=True)

    def _backward(self, given: Batch | PendingBatch) -> list[torch.Tensor]:
        batch = given.batch()
        terms = self._losses(self._module, batch)
        sums = {name: (value * batch.weight_B).sum() for name, value in terms.items()}
        sums["total"].backward()
        if self._cast:
            self._cast.cast_gradients()
        return [sums[name].detach().float() if name in sums else self._rate.new_zeros(()) for name in LOSS_TERMS]

    def _captured(self, batch: Batch | PendingBatch) -> Captured | None:
        if self._graphs is None:
            return None
        if batch.key not in self._graphs:
            stream = torch.cuda.current_stream()
            try:
                self._graphs[batch.key] = self._capture(batch.to(self._device))
            except torch.OutOfMemoryError:
                log.info("no memory for the CUDA graph of batches of shape %s: they run kernel by kernel", batch.key)
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
        """Undo what a failed capture leaves behind; torch cleans up only after a successful one."""
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize()
        with contextlib.suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index or 0, self._pool)  # type: ignore[arg-type]
        self._adam.zero_grad(set_to_none=True)
        if self._cast:
            self._cast.zero_grad()
        generator = self._generator
        generator.graphsafe_set_state(generator.clone_state())  # the old state still believes it is captured

    def _capture(self, static: Batch | PendingBatch) -> Captured:
        """Return the step as a graph that reads `static`. Changes nothing but `.grad`, which it clears."""
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.random.fork_rng([self._device]), torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._backward(static)
                self._adam.zero_grad(set_to_none=True)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # not "global": the metrics thread may ask the device for its memory meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._step(static)
        return static, graph
