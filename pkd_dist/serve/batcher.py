"""Batches of texts from many requests: a bounded queue, and one worker that takes whatever arrives within milliseconds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pkd_dist.evaluation.answer import Answer
from pkd_dist.serve.tokenizer import Texts


class QueueFull(Exception):  # noqa: N818 - a response to the client, not an error
    """The queue has no room for the texts of a request."""


class Batcher:
    """Answer texts in batches, in the order of their arrival.

    Args:
        answer: Texts -> their answers, in order; runs in one thread, one batch at a time.
        max_batch: Texts per batch.
        max_delay_seconds: How long a batch waits for more texts.
        max_queue: Texts that may wait.
        on_batch: Called with the size of each batch.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Texts]], list[Answer]],
        max_batch: int,
        max_delay_seconds: float,
        max_queue: int,
        on_batch: Callable[[int], None],
    ):
        self._answer, self._on_batch = answer, on_batch
        self._max_batch, self._max_delay_seconds = max_batch, max_delay_seconds
        self._queue: asyncio.Queue[tuple[Texts, asyncio.Future[Answer]]] = asyncio.Queue(max_queue)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="pkd-serve")
        self._worker: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """The number of texts in the queue."""
        return self._queue.qsize()

    async def ask(self, texts: Sequence[Texts]) -> list[Answer]:
        """Return the answers to the texts of one request.

        Raises:
            QueueFull: There is no room for all of them; none is answered.
        """
        if self._queue.qsize() + len(texts) > self._queue.maxsize:
            raise QueueFull
        loop = asyncio.get_running_loop()
        answers: list[asyncio.Future[Answer]] = [loop.create_future() for _ in texts]
        for text, answer in zip(texts, answers, strict=True):
            self._queue.put_nowait((text, answer))
        return await asyncio.gather(*answers)

    async def __aenter__(self) -> Batcher:
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Answer everything in the queue, then stop; stop at once where the block ended with an exception, such as a cancellation."""
        if kind is None:
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
                await asyncio.sleep(self._max_delay_seconds)
            while len(batch) < self._max_batch and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            asked = [(text, future) for text, future in batch if not future.done()]  # done: the request was cut off
            try:
                if not asked:
                    continue
                self._on_batch(len(asked))
                answers = await loop.run_in_executor(self._thread, self._answer, [text for text, _ in asked])
                for (_, future), answer in zip(asked, answers, strict=True):
                    if not future.done():  # done: the client has disconnected
                        future.set_result(answer)
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            finally:
                for _ in batch:
                    self._queue.task_done()
