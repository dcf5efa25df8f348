"""Requests into batches: a bounded queue, and one worker that takes what has come within a few milliseconds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

Texts = tuple[str, ...]
"""The one or two texts of a request."""


class Full(Exception):  # noqa: N818 - an answer to the client
    """The queue has no room; the request is to come again later."""


class Batcher:
    """Answers texts in batches, in the order they came.

    Args:
        answer: texts -> their answers, in order; runs in one thread of its own, one batch at a time.
        max_batch: texts of one batch.
        max_delay_seconds: a batch waits so long for more.
        max_queue: texts that wait at most.
        seen: told the size of each batch.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Texts]], list[Any]],
        max_batch: int,
        max_delay_seconds: float,
        max_queue: int,
        seen: Callable[[int], None] = lambda size: None,
    ):
        self._answer, self._seen = answer, seen
        self._max_batch, self._max_delay = max_batch, max_delay_seconds
        self._queue: asyncio.Queue[tuple[Texts, asyncio.Future[Any]]] = asyncio.Queue(max_queue)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pkd-serve")
        self._worker: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    async def ask(self, texts: Sequence[Texts]) -> list[Any]:
        """The answers of one request's texts.

        Raises:
            Full: there is no room for them; none is answered.
        """
        if self._queue.qsize() + len(texts) > self._queue.maxsize:
            raise Full
        loop = asyncio.get_running_loop()
        answers: list[asyncio.Future[Any]] = [loop.create_future() for _ in texts]
        for text, answer in zip(texts, answers, strict=True):
            self._queue.put_nowait((text, answer))
        return await asyncio.gather(*answers)

    async def __aenter__(self) -> Batcher:
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Answers what waits, then ends."""
        await self._queue.join()
        assert self._worker is not None
        self._worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._worker
        self._thread.shutdown()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            if self._queue.qsize() + 1 < self._max_batch:
                await asyncio.sleep(self._max_delay)
            while len(batch) < self._max_batch and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            self._seen(len(batch))
            try:
                found = await loop.run_in_executor(self._thread, self._answer, [text for text, _ in batch])
                for (_, answer), value in zip(batch, found, strict=True):
                    if not answer.done():  # its client has gone
                        answer.set_result(value)
            except Exception as error:
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
            finally:
                for _ in batch:
                    self._queue.task_done()
