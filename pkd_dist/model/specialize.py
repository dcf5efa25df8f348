"""Change the forward pass of one module of a live model, in place, by a subclass of its own class."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

T = TypeVar("T", bound=nn.Module)
_SUBCLASSES: dict[tuple[type, type], type] = {}
"""(mixin, class of a module) -> their subclass, so that equal modules have equal classes."""


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
    base = type(module)
    if not issubclass(base, mixin):
        if (mixin, base) not in _SUBCLASSES:
            _SUBCLASSES[mixin, base] = type(f"{mixin.__name__}_{base.__name__}", (mixin, base), {})
        module.__class__ = _SUBCLASSES[mixin, base]
    assert isinstance(module, mixin)
    return module


def unspecialize(module: nn.Module, *mixins: type) -> None:
    """Take these mixins, and those derived from them, away from a module, in place; those below another stay."""
    while type(module) in _SUBCLASSES.values() and issubclass(type(module).__bases__[0], mixins):
        module.__class__ = type(module).__bases__[1]
