"""Time by named functions: each second counts once, for the innermost. Imports the standard library only, so that
imports can be measured with it."""

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any


class Spans:
    """Exclusive seconds by name, in the thread that created this object. `mark`: name -> context of each span."""

    def __init__(self, mark: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext()):
        self.seconds: dict[str, float] = {}
        self.mark = mark
        self._open: list[str] = []
        self._since, self._thread = time.perf_counter(), threading.get_ident()

    def clear(self) -> None:
        self.seconds.clear()
        self._since = time.perf_counter()

    def _settle(self) -> None:
        """Add the time since the last change to the innermost span."""
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        if threading.get_ident() != self._thread:
            yield
            return
        self._settle()
        self._open.append(name)
        try:
            with self.mark(name):
                yield
        finally:
            self._settle()
            self._open.pop()

    def wrapped(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def inner(*args: Any, **kwargs: Any) -> Any:
            if self._open and self._open[-1] == name:
                return function(*args, **kwargs)  # imports nest tens of thousands of times
            with self.span(name):
                return function(*args, **kwargs)

        return inner

    def finished(self) -> dict[str, float]:
        """Return the seconds so far, including spans that are still open."""
        self._settle()
        return dict(self.seconds)
