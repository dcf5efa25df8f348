"""How the C allocator treats the large blocks of a training step.

A step allocates and frees the same few dozen blocks of megabytes. By default glibc gives each back to the kernel, which
clears its pages again at the next step: on a CPU that took a third of the step. Kept, and in huge pages, it does not.
"""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_blocks() -> None:
    """Keeps freed blocks in the process, in huge pages where the kernel offers them. Call before torch is imported."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # absent outside glibc
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
