"""The peak of the machine: FLOP/s of matrix products."""

import time

import torch

_SIZES = ((1024, 384, 1536), (2048, 2048, 2048), (4096, 4096, 4096), (1024, 768, 3072))
LONGEST_SECONDS = 5.0
"""Sizes for which one product would take longer are skipped."""


def peak(dtype: torch.dtype, device: torch.device | None = None, seconds: float = 0.4) -> float:
    """Return the FLOP/s of matrix products on all threads or a GPU: the best of some sizes, each tried for `seconds`."""
    device, best = device or torch.device("cpu"), 0.0
    for m, k, n in _SIZES:
        if best and 2 * m * k * n / best > LONGEST_SECONDS:
            continue  # a CPU without bfloat16 instructions would take minutes
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(k, n, device=device, dtype=dtype)
        out, until = a @ b, time.perf_counter() + seconds
        while time.perf_counter() < until:
            start = time.perf_counter()
            for _ in range(4):
                torch.mm(a, b, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best = max(best, 4 * 2 * m * k * n / (time.perf_counter() - start))
    return best


def peaks(device: torch.device) -> dict[str, float]:
    return {name: peak(getattr(torch, name), device) for name in ("float32", "bfloat16")}
