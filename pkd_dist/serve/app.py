"""The ASGI application: `/predict`, `/healthz` and `/metrics` over a loaded model."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pkd_dist.serve.batcher import Batcher, QueueFull
from pkd_dist.serve.model import ServedModel
from pkd_dist.serve.requests import Limits, parse_texts, read_body
from pkd_dist.telemetry.log import log

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class _Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "pkd_serve_requests", "Requests to /predict, by HTTP status.", ["status"], registry=registry
        )
        self.seconds = Histogram(
            "pkd_serve_request_seconds", "Time from the head of a request to its response.", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.batch_texts = Histogram(
            "pkd_serve_batch_texts", "Texts per forward pass.", buckets=_TEXTS, registry=registry
        )
        self.waiting_texts = Gauge("pkd_serve_waiting_texts", "Texts that wait for a batch.", registry=registry)


class _Service:
    """The handlers, and what they share.

    Attributes:
        cut_off: requests that the end of the server left without an answer.
    """

    def __init__(self, model: ServedModel, limits: Limits):
        self._model, self._limits = model, limits
        self._metrics = _Metrics()
        self._batcher = Batcher(
            model.answer, limits.batch, limits.delay_seconds, limits.queue, self._metrics.batch_texts.observe
        )
        self._metrics.waiting_texts.set_function(lambda: self._batcher.waiting)
        self._active = self.cut_off = 0

    async def predict(self, request: Request) -> Response:
        start = time.perf_counter()
        self._active += 1
        try:
            response = await self._respond(request)
        except QueueFull:
            waiting = f"more than {self._limits.queue} texts are waiting"
            response = _error_response(HTTPException(429, waiting, {"retry-after": "1"}))
        except HTTPException as error:
            response = _error_response(error)
        except ClientDisconnect:
            response = Response(status_code=499)
        except asyncio.CancelledError:  # not raised again: the server ends, and waits only for this response
            self.cut_off += 1
            response = _error_response(HTTPException(503, "the server was stopped"))
        except Exception:
            log.exception("serve: a request failed")
            response = _error_response(HTTPException(500, "internal error; see the log of the server"))
        finally:
            self._active -= 1
        self._metrics.requests.labels(str(response.status_code)).inc()
        self._metrics.seconds.observe(time.perf_counter() - start)
        return response

    async def _respond(self, request: Request) -> Response:
        if self._active > self._limits.concurrency:
            raise HTTPException(503, f"more than {self._limits.concurrency} requests at once", {"retry-after": "1"})
        body = await read_body(request, self._limits)
        single, texts = parse_texts(body, self._model.pair, self._limits, options=self._model.choices is not None)
        answers = await self._batcher.ask(texts)
        return JSONResponse(answers[0] if single else {"answers": answers})

    async def healthz(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"} | self._model.about)

    async def metrics_page(self, _: Request) -> Response:
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        with contextlib.suppress(asyncio.CancelledError):  # the server ends without waiting
            async with self._batcher:
                yield


def make_app(model: ServedModel, limits: Limits) -> Starlette:
    """Return the application that serves a loaded model; `state.service` is its `_Service`."""
    service = _Service(model, limits)
    app = Starlette(
        routes=[
            Route("/predict", service.predict, methods=["POST"]),
            Route("/healthz", service.healthz),
            Route("/metrics", service.metrics_page),
        ],
        lifespan=service.lifespan,
        exception_handlers={HTTPException: _on_http_exception},
    )
    app.state.service = service
    return app


async def _on_http_exception(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error_response(error)


def _error_response(error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)
