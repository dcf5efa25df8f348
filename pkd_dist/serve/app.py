"""The ASGI application: `/predict`, `/healthz`, `/metrics`, and what is refused with which status."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pkd_dist.evaluation.answer import is_empty
from pkd_dist.serve.batcher import Batcher, Full, Texts
from pkd_dist.serve.model import ServedModel
from pkd_dist.telemetry.log import log

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


@dataclass(frozen=True)
class Limits:
    """What one request, and all that are there at once, may take.

    Attributes:
        body_bytes: of a request; more is 413.
        text_characters: of a text; more is 413.
        texts: of a request; more is 413.
        batch: texts of one forward pass.
        delay_seconds: a batch waits so long for more.
        queue: texts that wait; more is 429.
        concurrency: requests in the works; more is 503.
        body_seconds: a body that takes longer to arrive is 408.
    """

    body_bytes: int = 1 << 20
    text_characters: int = 20_000
    texts: int = 64
    batch: int = 16
    delay_seconds: float = 0.002
    queue: int = 256
    concurrency: int = 256
    body_seconds: float = 10.0


class _Metrics:
    def __init__(self, batcher: Batcher):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "pkd_serve_requests", "Requests to /predict, by HTTP status.", ["status"], registry=self.registry
        )
        self.seconds = Histogram(
            "pkd_serve_request_seconds",
            "From a request's head to its answer.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        waiting = Gauge("pkd_serve_waiting_texts", "Texts that wait for a batch.", registry=self.registry)
        waiting.set_function(lambda: batcher.waiting)


def make_app(model: ServedModel, limits: Limits) -> Starlette:
    """The application over a loaded model."""
    sizes: list[Histogram] = []
    batcher = Batcher(
        model.answer, limits.batch, limits.delay_seconds, limits.queue, lambda size: sizes[0].observe(size)
    )
    metrics = _Metrics(batcher)
    sizes.append(
        Histogram("pkd_serve_batch_texts", "Texts of one forward pass.", registry=metrics.registry,
                  buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256))
    )  # fmt: skip
    working = 0

    async def predict(request: Request) -> Response:
        nonlocal working
        start = time.perf_counter()
        working += 1
        try:
            if working > limits.concurrency:
                raise HTTPException(503, f"more than {limits.concurrency} requests at once", {"retry-after": "1"})
            single, texts = _texts(await _body(request, limits), model.pair, limits)
            answers = await batcher.ask(texts)
            response: Response = JSONResponse(answers[0] if single else {"answers": answers})
        except Full:
            response = _refusal(HTTPException(429, f"more than {limits.queue} texts wait", {"retry-after": "1"}))
        except HTTPException as error:
            response = _refusal(error)
        except ClientDisconnect:
            response = Response(status_code=499)
        except Exception:
            log.exception("serve: a request failed")
            response = _refusal(HTTPException(500, "a defect of the server; its log says more"))
        finally:
            working -= 1
        metrics.requests.labels(str(response.status_code)).inc()
        metrics.seconds.observe(time.perf_counter() - start)
        return response

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"} | model.about)

    async def metrics_page(_: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with batcher:
            yield

    return Starlette(
        routes=[
            Route("/predict", predict, methods=["POST"]),
            Route("/healthz", healthz),
            Route("/metrics", metrics_page),
        ],
        lifespan=lifespan,
        exception_handlers={HTTPException: lambda _, error: _refusal(error)},
    )


def _refusal(error: Any) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _body(request: Request, limits: Limits) -> bytes:
    """The body, no more than is allowed of it. What is too long is read to its end all the same (to a limit), so that the
    client, which sends first and listens then, hears why."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"content-type must be application/json, not {kind or 'absent'}")
    body = bytearray()
    size = 0
    try:
        async with _within(limits.body_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limits.body_bytes:
                    body += chunk
                elif size > 32 * limits.body_bytes:
                    break
    except asyncio.TimeoutError:
        raise HTTPException(408, f"the body took longer than {limits.body_seconds:g} s") from None
    if size > limits.body_bytes:
        raise HTTPException(413, f"the body has more than {limits.body_bytes} bytes", {"connection": "close"})
    return bytes(body)


@contextlib.asynccontextmanager
async def _within(seconds: float) -> AsyncIterator[None]:
    """`asyncio.timeout`, which Python 3.10 lacks."""
    task = asyncio.current_task()
    assert task is not None
    late = False

    def end() -> None:
        nonlocal late
        late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, end)
    try:
        yield
    except asyncio.CancelledError:
        if late:
            raise asyncio.TimeoutError from None
        raise
    finally:
        timer.cancel()


def _texts(body: bytes, pair: bool, limits: Limits) -> tuple[bool, list[Texts]]:
    """(whether it is one text, not a list; the texts) of a request.

    Raises:
        HTTPException: 400 no JSON in UTF-8; 413 too much text; 422 not what is asked for.
    """
    try:
        given = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"the body is not UTF-8 (byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    wanted = '{"text": ..., "text_pair": ...}' if pair else '{"text": ...}'
    if not isinstance(given, dict):
        raise HTTPException(422, f'the body must be {wanted}, or {{"texts": [{wanted}, ...]}}')
    single = "texts" not in given
    rows = [given] if single else given["texts"]
    if not isinstance(rows, list) or not rows or (not single and len(given) > 1):
        raise HTTPException(422, f"texts must be a list of {wanted}, and stand alone")
    if len(rows) > limits.texts:
        raise HTTPException(413, f"{len(rows)} texts; at most {limits.texts} are taken at once")
    return single, [_checked(row, pair, wanted, limits) for row in rows]


def _checked(row: Any, pair: bool, wanted: str, limits: Limits) -> Texts:
    names = ("text", "text_pair") if pair else ("text",)
    if isinstance(row, str) and not pair:
        row = {"text": row}
    if not isinstance(row, dict) or set(row) != set(names):
        raise HTTPException(422, f"each text must be {wanted}")
    texts: Sequence[Any] = [row[name] for name in names]
    for name, text in zip(names, texts, strict=True):
        if not isinstance(text, str):
            raise HTTPException(422, f"{name} must be text")
        if is_empty(text):
            raise HTTPException(422, f"{name} is empty")
        if len(text) > limits.text_characters:
            raise HTTPException(413, f"{name} has {len(text)} characters; at most {limits.text_characters} are taken")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise HTTPException(422, f"{name} holds half of a surrogate pair") from None
    return tuple(texts)
