"""Distributed Patient Knowledge Distillation: a fine-tuned BERT-like teacher in, a small student ready to serve out.

    from pkd_dist import distill, sweep

docs/architecture.md describes the modules, how layers are counted, and what the suffix of a name like `logits_BC` means.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pkd_dist.api import distill, sweep

__version__ = "0.1.0"
__all__ = ["__version__", "distill", "sweep"]


def __getattr__(name: str) -> object:
    if name in ("distill", "sweep"):
        from pkd_dist import api

        return getattr(api, name)
    raise AttributeError(f"module 'pkd_dist' has no attribute {name!r}")
