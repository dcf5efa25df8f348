"""Change the forward pass of one module of a live model, in place, by a subclass of its own class."""

from __future__ import annotations

from functools import cache
from typing import TypeVar

from torch import nn

T = TypeVar("T", bound=nn.Module)


def specialize(module: nn.Module, mixin: type[T]) -> T:
    """Make a module an instance of `mixin` as well as of its own class; the mixin's methods come first.

    Parameters, hooks and `isinstance` checks keep working: transformers selects the layers whose hidden states it
    records by class. `torch.distributed.fsdp.fully_shard` changes module classes in the same way.

    Args:
        module: Changed in place; unchanged if it is already an instance of `mixin`.
        mixin: Needs no constructor; `super().forward` is the module's own forward pass.

    Returns:
        The module.
    """
    if not isinstance(module, mixin):
        module.__class__ = _subclass(mixin, type(module))
    assert isinstance(module, mixin)
    return module


@cache
def _subclass(mixin: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    return type(f"{mixin.__name__}_{base.__name__}", (mixin, base), {"__module__": __name__})
