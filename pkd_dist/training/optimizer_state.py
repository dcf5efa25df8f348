"""Where weights and Adam's moments are kept: the only module that knows the memory layout of each ZeRO stage.

    ReplicatedState    the plain engine and stage 0: every rank has everything; ranks take turns in writing
    FlatState          stages 1 and 2: a group's parameters are consecutive in one flat tensor, split evenly over ranks
    ShardedState       stage 3: every parameter is split evenly over ranks, with padding at the end

Each yields slices that name neither rank nor stage (see `checkpoint.py`), and each restores what it owns from the slices
of any run. Float32 master weights are what counts; the weights that the forward pass reads are set from them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pkd_dist.training.checkpoint import MOMENTS, WEIGHT, Counters, Shards, Slice

DeepSpeedParameter = Any
"""An `nn.Parameter` with the attributes that DeepSpeed adds: `ds_tensor`, `ds_shape`, `ds_numel`, `_hp_mapping`."""
DeepSpeedOptimizer = Any
"""DeepSpeed's wrapper of AdamW, of another class at each stage and precision; None on the plain engine."""

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class _Owned:
    """A rank's part of one parameter.

    Attributes:
        start, count: elements of the flattened parameter.
        flat: the float32 tensor that Adam updates.
        offset: of the first element in `flat`.
    """

    start: int
    count: int
    flat: torch.Tensor
    offset: int


class OptimizerState(ABC):
    """The state of one engine's optimizer on one rank.

    Args:
        module: as the engine has it.
        adam: torch's AdamW.
        rank, world_size: of this process.
        optimizer: DeepSpeed's, which may hold fp16 loss scalers.
    """

    def __init__(
        self,
        module: nn.Module,
        adam: torch.optim.AdamW,
        rank: int = 0,
        world_size: int = 1,
        optimizer: DeepSpeedOptimizer = None,
    ):
        self.module, self.adam, self.rank, self.world_size = module, adam, rank, world_size
        self._scalers = _loss_scalers(optimizer)

    # what a stage defines

    @abstractmethod
    def _owned(self, parameter: DeepSpeedParameter) -> _Owned | None:
        """Return this rank's part of a trained parameter, or None."""

    def _writes(self, index: int) -> bool:
        """Return whether this rank writes what it owns of the parameter with this index."""
        return True

    def _shape(self, parameter: DeepSpeedParameter) -> tuple[int, ...]:
        """Return a parameter's unsharded shape."""
        return tuple(parameter.shape)

    def _frozen(self, name: str, parameter: DeepSpeedParameter) -> list[Slice]:
        """Return this rank's slices of a parameter that is not trained."""
        return [_complete(name, parameter)] if self.rank == 0 else []

    def _fill(self, name: str, parameter: DeepSpeedParameter, shards: Shards) -> None:
        """Set what the forward pass reads of a parameter, in its own precision."""
        parameter.copy_(shards.tensor(WEIGHT, name))

    # the same at every stage

    def slices(self) -> list[Slice]:
        """Return what this rank writes into a checkpoint: over all ranks every value exactly once.

        Includes buffers and parameters that are not trained.
        """
        out: list[Slice] = []
        for index, (name, parameter) in enumerate(self.module.named_parameters()):
            if not parameter.requires_grad:
                out += self._frozen(name, parameter)
            elif self._writes(index):
                out += self._trained(name, parameter)
        if self.rank == 0:
            out += [_complete(name, buffer) for name, buffer in persistent_buffers(self.module)]
        return out

    def _trained(self, name: str, parameter: nn.Parameter) -> list[Slice]:
        owned, shape = self._owned(parameter), self._shape(parameter)
        if owned is None or not owned.count:
            return []
        kinds = (WEIGHT, *MOMENTS) if MOMENTS[0] in self.adam.state[owned.flat] else (WEIGHT,)
        return [Slice(kind, name, owned.start, self._view(owned, kind), shape) for kind in kinds]

    def _view(self, owned: _Owned, kind: str) -> torch.Tensor:
        flat = owned.flat.detach() if kind == WEIGHT else self.adam.state[owned.flat][kind]
        return flat.view(-1).narrow(0, owned.offset, owned.count)

    def counters(self) -> Counters:
        """Return the number of updates applied and fp16's loss scale: the same on all ranks."""
        updates = [int(state["step"]) for state in self.adam.state.values() if "step" in state]
        scale = {key: getattr(scaler, key) for scaler in self._scalers for key in _SCALER if hasattr(scaler, key)}
        return {"updates": max(updates, default=0), "loss_scale": scale}

    @torch.no_grad()
    def restore(self, shards: Shards, counters: Counters) -> None:
        """Load weights and optimizer state from a checkpoint of any world size and stage. Not collective."""
        for name, parameter in self.module.named_parameters():
            owned = self._owned(parameter) if parameter.requires_grad else None
            if owned:
                self._allocate(owned.flat, counters["updates"])
                for kind in (WEIGHT, *MOMENTS):
                    if owned.count and f"{kind}/{name}" in shards:
                        self._view(owned, kind).copy_(shards.read(kind, name, owned.start, owned.count))
        for name, parameter in self.module.named_parameters():
            self._fill(name, parameter, shards)
        for name, buffer in persistent_buffers(self.module):
            buffer.copy_(shards.tensor(WEIGHT, name))
        for scaler in self._scalers:
            for key, value in counters["loss_scale"].items():
                setattr(scaler, key, value)

    def allocate(self) -> None:
        """Allocate the moments that Adam's first step would allocate."""
        for parameter in self.module.parameters():
            owned = self._owned(parameter) if parameter.requires_grad else None
            if owned and MOMENTS[0] not in self.adam.state[owned.flat]:
                self._allocate(owned.flat, 0)

    def _allocate(self, flat: torch.Tensor, updates: int) -> None:
        state = self.adam.state[flat]
        for kind in MOMENTS:
            if kind not in state:
                state[kind] = torch.zeros_like(flat, requires_grad=False)
        # torch keeps the step count beside the values if AdamW is fused, else on the CPU
        state["step"] = torch.tensor(float(updates), device=flat.device if self.adam.defaults["fused"] else "cpu")

    @property
    def loss_scale_can_fall(self) -> bool:
        """Whether a step that overflowed in fp16 may succeed at a lower loss scale."""
        return any(
            scaler.cur_scale > max(1.0, getattr(scaler, "min_scale", getattr(scaler, "min_loss_scale", None)) or 1.0)
            for scaler in self._scalers
        )


class ReplicatedState(OptimizerState):
    """The plain engine and ZeRO 0. In 16-bit precision the float32 masters are copies, else the parameters themselves."""

    def __init__(
        self,
        module: nn.Module,
        adam: torch.optim.AdamW,
        rank: int = 0,
        world_size: int = 1,
        optimizer: DeepSpeedOptimizer = None,
    ):
        super().__init__(module, adam, rank, world_size, optimizer)
        halves, fulls = getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", [])
        pairs = [pair for half, full in zip(halves, fulls, strict=False) for pair in zip(half, full, strict=True)]
        self._masters: Mapping[nn.Parameter, torch.Tensor] = dict(pairs)

    def master(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return a parameter's float32 master weight."""
        return self._masters.get(parameter, parameter)

    def _owned(self, parameter: nn.Parameter) -> _Owned:
        return _Owned(0, parameter.numel(), self.master(parameter), 0)

    def _writes(self, index: int) -> bool:
        return index % self.world_size == self.rank


class FlatState(OptimizerState):
    """ZeRO 1 and 2. DeepSpeed notes on each parameter where its fragment is (`_hp_mapping`)."""

    def _owned(self, parameter: DeepSpeedParameter) -> _Owned | None:
        fragment = parameter._hp_mapping
        if fragment is None:
            return None
        flat = self.adam.param_groups[fragment.param_group_index]["params"][0]
        return _Owned(
            fragment.lp_fragment_address.start,
            fragment.lp_fragment_address.numel,
            flat,
            fragment.hp_fragment_address.start,
        )


class ShardedState(OptimizerState):
    """ZeRO 3. DeepSpeed gives each parameter its shard (`ds_tensor`), its numel and its shape."""

    def __init__(
        self, module: nn.Module, adam: torch.optim.AdamW, rank: int, world_size: int, optimizer: DeepSpeedOptimizer
    ):
        super().__init__(module, adam, rank, world_size, optimizer)
        self._optimizer = optimizer

    def _shard(self, parameter: DeepSpeedParameter) -> tuple[int, int]:
        """Return the first element and the number of elements of this rank's shard, without padding."""
        size = parameter.ds_tensor.ds_numel
        return self.rank * size, max(0, min(size, parameter.ds_numel - self.rank * size))

    def _owned(self, parameter: DeepSpeedParameter) -> _Owned:
        start, count = self._shard(parameter)
        group, offset, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
        return _Owned(start, count, self._optimizer.fp32_partitioned_groups_flat[group], offset)

    def _shape(self, parameter: DeepSpeedParameter) -> tuple[int, ...]:
        return tuple(parameter.ds_shape)

    def _frozen(self, name: str, parameter: DeepSpeedParameter) -> list[Slice]:
        start, count = self._shard(parameter)
        values = parameter.ds_tensor.detach()[:count]
        return [Slice(WEIGHT, name, start, values, self._shape(parameter))] if count else []

    def _fill(self, name: str, parameter: DeepSpeedParameter, shards: Shards) -> None:
        start, count = self._shard(parameter)
        if count:
            parameter.ds_tensor[:count].copy_(shards.read(WEIGHT, name, start, count))
        if parameter.numel() == parameter.ds_numel:  # DeepSpeed keeps small parameters complete beside their shards
            parameter.copy_(shards.tensor(WEIGHT, name))


def _complete(name: str, tensor: torch.Tensor) -> Slice:
    return Slice(WEIGHT, name, 0, tensor.detach().reshape(-1), tuple(tensor.shape))


def _loss_scalers(optimizer: DeepSpeedOptimizer) -> list[Any]:
    """Return the dynamic fp16 loss scalers of a DeepSpeed optimizer, which has them under two names."""
    found = (getattr(optimizer, name, None) for name in ("loss_scaler", "loss_scale_config"))
    return [scaler for scaler in found if getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False))]


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names and values of the buffers in a module's state dict."""
    saved = {name for name, _ in module.named_buffers()} & module.state_dict(keep_vars=True).keys()
    return ((name, buffer) for name, buffer in module.named_buffers() if name in saved)


def full_weights(module: nn.Module, full: Callable[[nn.Parameter], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies of a module's parameters in float32 and its persistent buffers, on the CPU.

    Args:
        full: parameter -> its unsharded value.
    """
    weights = {name: _copy(full(parameter).detach().float()) for name, parameter in module.named_parameters()}
    return weights | {name: _copy(buffer.detach()) for name, buffer in persistent_buffers(module)}


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().clone()
