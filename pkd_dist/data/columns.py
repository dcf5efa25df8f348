"""A column of text that lies on disk.

Texts are kept as UTF-8, one after the other, in a temporary file without a name; it is gone with its column. In memory are
8 bytes of each text: where it ends.
"""

from __future__ import annotations

import itertools
import operator
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from pkd_dist.errors import UserError
from pkd_dist.files import require_space

_CHUNK = 4096


class TextColumn(Sequence[str]):
    """N strings, which may be iterated, indexed and sliced as often as one likes; a slice is a list.

    Args:
        texts: any number of strings; half a surrogate pair is kept as it is.

    Raises:
        UserError: the disk of temporary files is full, or there is no folder for them.
    """

    def __init__(self, texts: Iterable[str] = ()):
        try:
            self._descriptor, name = tempfile.mkstemp()
        except OSError as error:
            raise UserError(
                f"no folder for temporary files can be used ({error.strerror}); set TMPDIR to one"
            ) from None
        weakref.finalize(self, os.close, self._descriptor)
        os.unlink(name)
        self._ends = array("q", [0])
        self.extend(texts)

    def extend(self, texts: Iterable[str]) -> None:
        rest = iter(texts)
        while chunk := [text.encode("utf-8", "surrogatepass") for text in itertools.islice(rest, _CHUNK)]:
            with require_space(Path(tempfile.gettempdir()), 0, "the text of the data"):
                left = memoryview(b"".join(chunk))
                while left:
                    left = left[os.write(self._descriptor, left) :]
            end = self._ends[-1]
            self._ends.extend([end := end + len(text) for text in chunk])

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            return list(self._between(start, stop)) if step == 1 else [self[i] for i in range(start, stop, step)]
        at = operator.index(index)
        at += len(self) if at < 0 else 0
        if not 0 <= at < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        return next(self._between(at, at + 1))

    def __iter__(self) -> Iterator[str]:
        return self._between(0, len(self))

    def _between(self, start: int, stop: int) -> Iterator[str]:
        for first in range(start, stop, _CHUNK):
            ends = self._ends[first : min(stop, first + _CHUNK) + 1]
            origin = ends[0]
            content = os.pread(self._descriptor, ends[-1] - origin, origin)
            for begin, end in itertools.pairwise(ends):
                yield content[begin - origin : end - origin].decode("utf-8", "surrogatepass")

    def __eq__(self, other: Any) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]
