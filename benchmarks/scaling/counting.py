"""Counts what a training step does, below autograd and DeepSpeed, so that nothing has to be assumed about either."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = ("mm", "addmm", "bmm", "_scaled_dot_product", "linear", "mkldnn")


def tensor_bytes(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(value) if isinstance(t, torch.Tensor))


class StepCounter(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        operations: kernels that were started: views, collectives and allocations left out.
        traffic_bytes: read and written by operations that are no matrix products, nor the optimizer's.
        collectives: number of calls, by name.
        payload_bytes: of the whole (gathered, unreduced) tensor of each call, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.traffic_bytes = 0
        self.collectives: Counter[str] = Counter()
        self.payload_bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if func.namespace == "c10d":
            sizes = [tensor_bytes(a) for a in args[:2] if isinstance(a, (torch.Tensor, list, tuple))]
            if sizes and "barrier" not in name:
                self.collectives[name.strip("_")] += 1
                self.payload_bytes[name.strip("_")] += max(sizes)
        elif func.is_view or name.startswith(("empty", "detach", "record_stream", "_local_scalar")):
            pass
        else:
            self.operations += 1
            if not name.startswith(_PRODUCTS) and "adam" not in name:
                self.traffic_bytes += tensor_bytes((args, kwargs, out))
        return out


@contextlib.contextmanager
def saved_for_backward() -> Iterator[list[int]]:
    """Bytes of the distinct tensors that autograd keeps for backward, in a list of one number."""
    total, seen = [0], {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = tensor  # kept, so that no address is used twice
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def live_bytes(large_elements: int) -> tuple[int, int]:
    """Bytes of all live tensors of this process: (all but the large, those of at least `large_elements` elements)."""
    storages = {}
    gc.collect()
    for found in gc.get_objects():
        if not isinstance(found, torch.Tensor) or found.device.type == "meta":
            continue
        for tensor in (found, found.grad if found.is_leaf else None):
            if tensor is not None:
                storages[tensor.untyped_storage().data_ptr()] = (
                    tensor.untyped_storage().nbytes(),
                    tensor.element_size(),
                )
    large = sum(size for size, element in storages.values() if size // element >= large_elements)
    return sum(size for size, _ in storages.values()) - large, large
