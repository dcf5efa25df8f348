"""Where DeepSpeed keeps weights and Adam's moments, at each stage; the one place that knows.

Out of it come slices that name no rank and no stage (see `checkpoint.py`), and any rank of any run takes from them what it
owns. Float32 master weights count; what the forward pass reads is set from them.

    stage 0     every rank has all of it; the ranks take turns in writing. In half precision the masters are copies
    stage 1, 2  the parameters of a group lie end to end in one flat tensor, of which each rank owns an equal part
    stage 3     each rank owns an equal share of every parameter, the last shares padded
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from pkd_dist.training.checkpoint import MOMENTS, WEIGHT, Shards, Slice

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class _Part:
    """A rank's part of one parameter: `count` elements from `start`, found at `at` in a flat tensor with Adam's state."""

    start: int
    count: int
    flat: torch.Tensor
    at: int


class OptimizerState:
    """The state of one engine's optimizer, on one rank.

    Args:
        module: as DeepSpeed has wrapped it.
        optimizer: DeepSpeed's.
        adam: torch's, inside of it.
        stage: of ZeRO.
    """

    def __init__(self, module: nn.Module, optimizer: Any, adam: torch.optim.AdamW, stage: int, rank: int, size: int):
        self._module, self._optimizer, self._adam = module, optimizer, adam
        self._stage, self._rank, self._size = stage, rank, size
        self._named: list[tuple[str, Any]] = list(module.named_parameters())
        halves, fulls = getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", [])
        pairs = [pair for half, full in zip(halves, fulls, strict=False) for pair in zip(half, full, strict=True)]
        self._copies = dict(pairs) if stage == 0 else {}

    def master(self, parameter: Any) -> torch.Tensor:
        """Stage 0: a parameter's float32 master weight."""
        return self._copies.get(parameter, parameter)

    def _part(self, parameter: Any) -> _Part | None:
        """What of a trained parameter lies on this rank; None where nothing does."""
        if self._stage == 0:
            return _Part(0, parameter.numel(), self.master(parameter), 0)
        if self._stage == 3:
            start, count = self._share(parameter)
            group, at, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            return _Part(start, count, self._optimizer.fp32_partitioned_groups_flat[group], at)
        here = parameter._hp_mapping
        if here is None:
            return None
        flat = self._adam.param_groups[here.param_group_index]["params"][0]
        return _Part(
            here.lp_fragment_address.start, here.lp_fragment_address.numel, flat, here.hp_fragment_address.start
        )

    def _share(self, parameter: Any) -> tuple[int, int]:
        """Stage 3: first element and number of elements of this rank's share, padding left out."""
        share = parameter.ds_tensor.ds_numel
        return self._rank * share, max(0, min(share, parameter.ds_numel - self._rank * share))

    def _view(self, part: _Part, kind: str) -> torch.Tensor:
        flat = part.flat.detach() if kind == WEIGHT else self._adam.state[part.flat][kind]
        return flat.view(-1).narrow(0, part.at, part.count)

    def slices(self) -> list[Slice]:
        """What this rank writes into a checkpoint: over all ranks every value once. Parameters that are not trained and
        buffers are among them."""
        out: list[Slice] = []
        for turn, (name, parameter) in enumerate(self._named):
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            mine = self._stage > 0 or turn % self._size == self._rank
            part = self._part(parameter) if parameter.requires_grad and mine else None
            if part and part.count:
                kinds = (WEIGHT, *MOMENTS) if MOMENTS[0] in self._adam.state[part.flat] else (WEIGHT,)
                out += [Slice(kind, name, part.start, self._view(part, kind), shape) for kind in kinds]
            elif not parameter.requires_grad and hasattr(parameter, "ds_id"):
                start, count = self._share(parameter)
                out += [Slice(WEIGHT, name, start, parameter.ds_tensor.detach()[:count], shape)] if count else []
            elif not parameter.requires_grad and self._rank == 0:
                out.append(Slice(WEIGHT, name, 0, parameter.detach().reshape(-1), shape))
        if self._rank == 0:
            buffers = persistent_buffers(self._module)
            out += [Slice(WEIGHT, name, 0, b.detach().reshape(-1), tuple(b.shape)) for name, b in buffers]
        return out

    def counters(self) -> dict[str, Any]:
        """What the optimizer counts, the same on all ranks: updates applied, and fp16's loss scale."""
        updates = [int(state["step"]) for state in self._adam.state.values() if "step" in state]
        scale = {key: getattr(scaler, key) for scaler in self._scalers() for key in _SCALER if hasattr(scaler, key)}
        return {"updates": max(updates, default=0), "loss_scale": scale}

    @torch.no_grad()
    def restore(self, shards: Shards, counters: dict[str, Any]) -> None:
        """Takes weights and optimizer state from a checkpoint of any world size and stage. Not collective."""
        for name, parameter in self._named:
            part = self._part(parameter) if parameter.requires_grad else None
            if part:
                self._allocate(part.flat, counters["updates"])
                for kind in (WEIGHT, *MOMENTS):
                    if part.count and f"{kind}/{name}" in shards:
                        self._view(part, kind).copy_(shards.read(kind, name, part.start, part.count))
        for name, tensor in (*self._named, *persistent_buffers(self._module)):
            self._fill(tensor, shards, name)
        for scaler in self._scalers():
            for key, value in counters["loss_scale"].items():
                setattr(scaler, key, value)

    def allocate(self) -> None:
        """Makes what Adam's first step would make, where it is not there yet."""
        for _, parameter in self._named:
            part = self._part(parameter) if parameter.requires_grad else None
            if part and MOMENTS[0] not in self._adam.state[part.flat]:
                self._allocate(part.flat, 0)

    def _allocate(self, flat: torch.Tensor, updates: int) -> None:
        """Adam's state as its first step would make it."""
        state = self._adam.state[flat]
        for kind in MOMENTS:
            if kind not in state:
                state[kind] = torch.zeros_like(flat, requires_grad=False)
        # torch keeps the count where its kernel wants it: beside the values when fused, else on the CPU
        state["step"] = torch.tensor(float(updates), device=flat.device if self._adam.defaults["fused"] else "cpu")

    def _fill(self, tensor: Any, shards: Shards, name: str) -> None:
        """Sets what the forward pass reads, in its own precision."""
        if not hasattr(tensor, "ds_id"):
            tensor.copy_(shards.whole(WEIGHT, name))
            return
        start, count = self._share(tensor)
        if count:
            tensor.ds_tensor[:count].copy_(shards.read(WEIGHT, name, start, count))
        if tensor.numel() == tensor.ds_numel:  # small ones are kept whole beside their shares
            tensor.copy_(shards.whole(WEIGHT, name))

    @property
    def loss_scale_can_fall(self) -> bool:
        """fp16: whether a step that overflowed may do better at the next lower loss scale."""
        return any(
            scaler.cur_scale > max(1.0, getattr(scaler, "min_scale", getattr(scaler, "min_loss_scale", None)) or 1.0)
            for scaler in self._scalers()
        )

    def _scalers(self) -> list[Any]:
        """fp16's loss scaler, where there is one; it goes by two names."""
        found = (getattr(self._optimizer, name, None) for name in ("loss_scaler", "loss_scale_config"))
        return [scaler for scaler in found if getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False))]


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The buffers that belong to a module's state, by name."""
    kept = {name for name, _ in module.named_buffers()} & module.state_dict(keep_vars=True).keys()
    return ((name, buffer) for name, buffer in module.named_buffers() if name in kept)
