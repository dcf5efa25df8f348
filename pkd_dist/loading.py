"""Settings of the C allocator for the large blocks of a training step.

A step allocates and frees the same few dozen blocks of several megabytes. By default, glibc returns each to the kernel,
which clears its pages again in the next step: a third of the step on a CPU. Kept blocks in huge pages avoid this.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_blocks() -> None:
    """Keep freed blocks in the process, in huge pages if the kernel offers them. Call before torch is imported."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
