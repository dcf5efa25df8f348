"""`kernels.c`, compiled on this machine for this machine: once, and kept in the user's cache.

The C compiler is asked for code for this very processor, with vectors as wide as it has. Its threads are those of
PyTorch's own OpenMP, which the library finds in the process, so there are not two pools that take each other's cores.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pkd_dist.telemetry.log import log

SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
_ARGUMENTS = {  # p: a tensor's memory, i: int, d: double, s: a seed
    "attend": "ppdsiiiipp",
    "attend_backward": "ppdsiiiippp",
    "add_norm": "pipdsppdiippppp",
    "add_norm_backward": "ppdsppppiipppp",
}
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "d": ctypes.c_double, "s": ctypes.c_uint64}


class Kernels:
    """The functions of `kernels.c`, called with tensors, None, and numbers."""

    def __init__(self, library: Path):
        loaded = ctypes.CDLL(str(library))
        for name, arguments in _ARGUMENTS.items():
            function = getattr(loaded, name)
            function.argtypes = [_TYPES[a] for a in arguments]
            setattr(self, name, functools.partial(_call, function))

    attend: Callable[..., None]
    attend_backward: Callable[..., None]
    add_norm: Callable[..., None]
    add_norm_backward: Callable[..., None]


def _call(function: Any, *arguments: Any) -> None:
    if function(*(a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments)):
        raise MemoryError


@functools.cache
def kernels() -> Kernels | None:
    """None, with a word in the log, where there is no C compiler or it cannot make them."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        problem = "there is no C compiler"
    else:
        try:
            return Kernels(_compiled(compiler))
        except subprocess.CalledProcessError as error:
            said = (error.stderr or "").strip().splitlines() or ["without a word"]
            problem = f"{compiler} failed: {said[0]}"
        except (OSError, RuntimeError) as error:  # a cache that cannot be written, no home, no OpenMP in the process
            problem = str(error)
    log.info("the encoder's own CPU kernels are not used (%s): the same by PyTorch's operations, slower", problem)
    return None


def _compiled(compiler: str) -> Path:
    """The library, made where it is not there yet."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [SOURCE.read_text(), *_FLAGS, compiler, version, _processor()]
    name = f"kernels-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pkd_dist"
    library = folder / name
    if not library.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:  # ranks may do so at once: each renames a whole file
            made, compiled = Path(place) / "kernels.o", Path(place) / name
            subprocess.run([compiler, *_FLAGS, "-c", SOURCE, "-o", made], capture_output=True, text=True, check=True)
            # without -fopenmp: its functions are found among PyTorch's
            subprocess.run(
                [compiler, "-shared", made, "-o", compiled, "-lm"], capture_output=True, text=True, check=True
            )
            compiled.rename(library)
    return library


def _processor() -> str:
    """What code for this very processor depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features"))))
    except OSError:
        return platform.processor() + platform.machine()
