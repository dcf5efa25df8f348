"""Build `kernels.c` for this machine on first use, keep the library in the user's cache, and call it with tensors.

The compiler targets this processor. The library uses PyTorch's own OpenMP threads, which it finds in the process, so that
two thread pools do not compete for the cores. `PKD_KERNELS=0` turns the kernels off.
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

import torch

from pkd_dist.telemetry.log import log

SOURCE = Path(__file__).with_name("kernels.c")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-w")
# One letter per argument. Tensors: h bfloat16, f float32, t either of them, w int32; r is a bfloat16 tensor (B, rows, heads,
# size) whose heads and sizes are dense. Numbers: i int, l int64, d double, s seed.
_SIGNATURES = {
    "attend": "rrrhdsdiiiiirf",
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
    """The functions of `kernels.c`. Their arguments are CPU tensors, None, and numbers, as in `_SIGNATURES`.

    Raises (each function):
        TypeError: A tensor has another dtype, device, or layout than the function reads.
        MemoryError: No memory is left for its working space.
    """

    def __init__(self, library: Path):
        loaded = ctypes.CDLL(str(library))
        for name, letters in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes = [_TYPES.get(letter, ctypes.c_void_p) for letter in letters]
            setattr(self, name, functools.partial(_call, function, letters))

    attend: Callable[..., None]
    attend_backward: Callable[..., None]
    add_norm: Callable[..., None]
    add_norm_backward: Callable[..., None]
    look_up: Callable[..., None]


def _call(function: Callable[..., int], letters: str, *arguments: torch.Tensor | float | None) -> None:
    if function(*map(_c_argument, letters, arguments)):
        raise MemoryError(f"{function.__name__}: no memory is left for its working space")


def _c_argument(letter: str, given: torch.Tensor | float | None) -> _Rows | float | None:
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
def load_kernels() -> Kernels | None:
    """Return the compiled kernels, or None, with the reason in the log, if they cannot be built."""
    if os.environ.get("PKD_KERNELS") == "0":
        return None
    problem = "no C compiler found"
    for compiler in dict.fromkeys((os.environ.get("CC") or "cc", "cc", "gcc")):
        try:
            return _load_or_build(shlex.split(compiler))
        except FileNotFoundError:
            continue
        except subprocess.CalledProcessError as error:
            output = (error.stderr or "").strip().splitlines() or ["no output"]
            problem = f"{compiler} failed: {next((line for line in output if 'error' in line), output[-1])}"
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            problem = f"{compiler}: {error}"  # no home, a full disk, a hang, ...
    log.info("CPU kernels are off (%s); the encoder uses PyTorch's operations, which are slower", problem)
    return None


def _load_or_build(compiler: list[str]) -> Kernels:
    """Load the library from the cache; build it if it is absent or unreadable.

    Raises:
        OSError, RuntimeError, ValueError, subprocess.SubprocessError: It cannot be built or loaded.
    """
    target = _run([*compiler, *_FLAGS, "-dM", "-E", "-x", "c", os.devnull])  # the compiler and the processor's features
    name = hashlib.sha256("\0".join([SOURCE.read_text(), *_FLAGS, target]).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pkd_dist"
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):  # a read-only home: built again by each process
        with tempfile.TemporaryDirectory() as private:
            return Kernels(_build(compiler, Path(private)))
    if {folder.lstat().st_uid, folder.stat().st_uid} != {os.getuid()} or folder.stat().st_mode & 0o022:
        raise OSError(f"{folder} can be written by others; its code would not be safe to run")
    folder.chmod(0o700)
    library = folder / f"kernels-{name}.so"
    if library.is_file():
        if _is_sealed(library):
            with suppress(OSError):
                return Kernels(library)
        library.unlink(missing_ok=True)  # damaged by a power loss or a full disk
    for other in folder.glob("kernels-*.so"):
        if time.time() - other.stat().st_mtime > _UNUSED_DAYS * 86400:
            other.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = _build(compiler, Path(temporary))
        kernels = Kernels(built)
        _seal(built)
        with suppress(FileExistsError):  # built by another rank, which may have loaded it
            os.link(built, library)
    return kernels


def _build(compiler: list[str], folder: Path) -> Path:
    objects, built = folder / "kernels.o", folder / "kernels.so"
    _run([*compiler, *_FLAGS, "-c", str(SOURCE), "-o", str(objects)])
    # Linked without -fopenmp, so that the OpenMP functions resolve to PyTorch's.
    _run([*compiler, "-shared", str(objects), "-o", str(built), "-lm"])
    return built


def _seal(library: Path) -> None:
    """Append the digest of a library to it; the loader ignores what follows the last section."""
    with library.open("r+b") as file:
        file.write(hashlib.sha256(file.read()).digest())
        os.fsync(file.fileno())


def _is_sealed(library: Path) -> bool:
    """Return whether a library is complete and unchanged: the loader dies of SIGBUS where one is truncated."""
    content = library.read_bytes()
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=True, timeout=300)
    return done.stdout
