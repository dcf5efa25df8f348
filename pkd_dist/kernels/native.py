"""`kernels.c`, compiled on this machine for this machine: once, and kept in the user's cache.

The C compiler is asked for code for this very processor. Its threads are those of PyTorch's own OpenMP, which the library
finds in the process, so there are not two pools that take each other's cores. `PKD_KERNELS=0` leaves it all to PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pkd_dist.telemetry.log import log

SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-w")
_ARGUMENTS = {  # h, f, t: a tensor in bfloat16, in float32, in either; r: rows (B, rows, heads, size) of one in bfloat16,
    "attend": "rrrhdsdiiiiirf",  # heads and sizes dense; w: a tensor of int32; i, l: int, int64; d: double; s: a seed
    "attend_backward": "rrrhdsdiiiiifrfrrr",
    "add_norm": "tihdsffdiiffffh",
    "add_norm_backward": "fhdsffffiifhff",
    "look_up": "hlwhh",
}


class _Rows(ctypes.Structure):
    """`rows` of kernels.c."""

    _fields_ = (("at", ctypes.c_void_p), ("example", ctypes.c_int64), ("row", ctypes.c_int64))


_TYPES = {"i": ctypes.c_int, "l": ctypes.c_int64, "d": ctypes.c_double, "s": ctypes.c_uint64, "r": _Rows}
_DTYPES = {
    "h": (torch.bfloat16,),
    "r": (torch.bfloat16,),
    "f": (torch.float32,),
    "w": (torch.int32,),
    "t": (torch.bfloat16, torch.float32),
}
_UNUSED_DAYS = 30


class Kernels:
    """The functions of `kernels.c`, called with tensors on the CPU, dense but for the rows of `rows`, None, and numbers."""

    def __init__(self, library: Path):
        loaded = ctypes.CDLL(str(library))
        for name, letters in _ARGUMENTS.items():
            function = getattr(loaded, name)
            function.argtypes = [_TYPES.get(letter, ctypes.c_void_p) for letter in letters]
            setattr(self, name, functools.partial(_call, function, letters))

    attend: Callable[..., None]
    attend_backward: Callable[..., None]
    add_norm: Callable[..., None]
    add_norm_backward: Callable[..., None]
    look_up: Callable[..., None]


def _call(function: Any, letters: str, *arguments: Any) -> None:
    if function(*map(_address, letters, arguments)):
        raise MemoryError(f"{function.__name__}: no memory is left for its working space")


def _address(letter: str, given: Any) -> Any:
    if not isinstance(given, torch.Tensor):
        return given
    if letter == "r":
        dense = given.ndim == 4 and given.stride(3) == 1 and given.stride(2) == given.shape[3]
    else:
        dense = given.is_contiguous()
    if given.dtype not in _DTYPES[letter] or given.device.type != "cpu" or not dense or not given.numel():
        raise TypeError(
            f"a kernel of kernels.c cannot read a tensor {tuple(given.shape)}, {given.dtype}, {given.device}"
        )
    return given.data_ptr() if letter != "r" else _Rows(given.data_ptr(), given.stride(0), given.stride(1))


@functools.cache
def kernels() -> Kernels | None:
    """None, with a word in the log, where there is no C compiler or it cannot make them."""
    if os.environ.get("PKD_KERNELS") == "0":
        return None
    problem = "there is no C compiler"
    for compiler in dict.fromkeys((os.environ.get("CC") or "cc", "cc", "gcc")):
        try:
            return _made_by(shlex.split(compiler))
        except FileNotFoundError:
            continue
        except subprocess.CalledProcessError as error:
            said = (error.stderr or "").strip().splitlines() or ["without a word"]
            problem = f"{compiler} failed: {next((line for line in said if 'error' in line), said[-1])}"
        except (
            OSError,
            RuntimeError,
            ValueError,
            subprocess.SubprocessError,
        ) as error:  # no home, a full disk, a hang, ...
            problem = f"{compiler}: {error}"
    log.info("the encoder's own CPU kernels are not used (%s): the same by PyTorch's operations, slower", problem)
    return None


def _made_by(compiler: list[str]) -> Kernels:
    """Loads the library, made where it is not there yet or cannot be read.

    Raises:
        OSError, RuntimeError, ValueError, subprocess.SubprocessError: there can be none.
    """
    target = _run([*compiler, *_FLAGS, "-dM", "-E", "-x", "c", os.devnull])  # compiler, processor, what it can do
    name = hashlib.sha256("\0".join([SOURCE.read_text(), *_FLAGS, target]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pkd_dist"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.stat().st_mode & 0o022:
        raise OSError(f"{folder} can be written by others; its code would not be safe to run")
    library = folder / f"kernels-{name}.so"
    if library.is_file():
        with suppress(OSError):
            return Kernels(library)
        library.unlink(missing_ok=True)  # a lost power supply, a full disk
    for other in folder.glob("kernels-*.so"):
        if time.time() - other.stat().st_mtime > _UNUSED_DAYS * 86400:
            other.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made, compiled = Path(place) / "kernels.o", Path(place) / library.name
        _run([*compiler, *_FLAGS, "-c", str(SOURCE), "-o", str(made)])
        # without -fopenmp: its functions are found among PyTorch's
        _run([*compiler, "-shared", str(made), "-o", str(compiled), "-lm"])
        found = Kernels(compiled)
        with suppress(FileExistsError):  # of another rank, which may have loaded it
            os.link(compiled, library)
    return found


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=300)
    return done.stdout
