"""What a process sets before it loads torch and the libraries that need it.

A training step allocates and frees the same few dozen blocks of several megabytes. By default, glibc returns each to the kernel,
which clears its pages again in the next step: a third of the step on a CPU. Kept blocks in huge pages avoid this.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Load torch, and what needs it, in the block."""
    keep_freed_blocks()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else every rank warns of lost connections
    gc.disable()  # imports make millions of objects, none of them garbage: collecting takes a fifth of their time
    try:
        yield
    finally:
        gc.enable()


def keep_freed_blocks() -> None:
    """Keep freed blocks in the process, in huge pages if the kernel offers them. Call before torch is imported."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
