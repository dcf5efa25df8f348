"""A column of text on disk.

Texts are stored back to back as UTF-8 in an unlinked temporary file, which disappears with its column. Memory holds 8 bytes
per text: the position of its end.
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
from typing import overload

from pkd_dist.errors import UserError
from pkd_dist.files import require_space

_CHUNK_TEXTS = 4096


class TextColumn(Sequence[str]):
    """A sequence of N strings that can be extended, but not changed. A slice is a list.

    Args:
        texts: any number of strings; unpaired surrogates are preserved.

    Raises:
        UserError: the disk for temporary files is full, or there is no folder for them.
    """

    def __init__(self, texts: Iterable[str] = ()):
        try:
            self._descriptor, name = tempfile.mkstemp()
        except OSError as error:
            raise UserError(f"no usable folder for temporary files ({error.strerror}); set TMPDIR to one") from None
        weakref.finalize(self, os.close, self._descriptor)
        os.unlink(name)
        self._ends = array("q", [0])
        self.extend(texts)

    def extend(self, texts: Iterable[str]) -> None:
        """Append texts."""
        rest = iter(texts)
        while chunk := [text.encode("utf-8", "surrogatepass") for text in itertools.islice(rest, _CHUNK_TEXTS)]:
            with require_space(Path(tempfile.gettempdir()), 0, "the text of the data"):
                unwritten = memoryview(b"".join(chunk))
                while unwritten:
                    unwritten = unwritten[os.write(self._descriptor, unwritten) :]
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
            return list(self._read(start, stop)) if step == 1 else [self[i] for i in range(start, stop, step)]
        position = operator.index(index)
        position += len(self) if position < 0 else 0
        if not 0 <= position < len(self):
            raise IndexError(f"text {index} is out of range; the column has {len(self)}")
        return next(self._read(position, position + 1))

    def __iter__(self) -> Iterator[str]:
        return self._read(0, len(self))

    def _read(self, start: int, stop: int) -> Iterator[str]:
        for first in range(start, stop, _CHUNK_TEXTS):
            ends = self._ends[first : min(stop, first + _CHUNK_TEXTS) + 1]
            origin = ends[0]
            content = os.pread(self._descriptor, ends[-1] - origin, origin)
            for begin, end in itertools.pairwise(ends):
                yield content[begin - origin : end - origin].decode("utf-8", "surrogatepass")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]
