"""The body of a request to `/predict`: read within limits, parsed and checked.

bytes -> JSON -> the texts to answer; anything else is an HTTPException with the status and the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.requests import Request

from pkd_dist.config.multiple_choice import MOST_OPTIONS
from pkd_dist.evaluation.answer import is_empty
from pkd_dist.serve.tokenizer import Texts

_KEYS = {"text": "...", "text_pair": "...", "options": "[..., ...]"}
"""Key of an input -> what its value looks like, in messages."""


@dataclass(frozen=True)
class Limits:
    """Limits of one request and of the server, each with the HTTP status of what exceeds it.

    Attributes:
        body_bytes: Bytes of a request (413).
        text_characters: Characters of a text (413).
        texts: Texts of a request (413).
        batch: Texts of one forward pass.
        delay_seconds: How long a batch waits for more texts.
        queue: Texts that may wait (429).
        concurrency: Requests at once (503).
        body_seconds: Time for a body to arrive (408).
    """

    body_bytes: int = 1 << 20
    text_characters: int = 20_000
    texts: int = 64
    batch: int = 16
    delay_seconds: float = 0.002
    queue: int = 256
    concurrency: int = 256
    body_seconds: float = 10.0


async def read_body(request: Request, limits: Limits) -> bytes:
    """Return the body of a request.

    A body over the limit is still read to its end (up to 32 times the limit): clients that send before they listen would
    otherwise see a broken connection instead of the reason.

    Raises:
        HTTPException: 408, 413 or 415.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"content-type must be application/json, not {kind or 'absent'}")
    body = bytearray()
    size = 0
    try:
        async with _timeout(limits.body_seconds):
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
async def _timeout(seconds: float) -> AsyncIterator[None]:
    """Do what `asyncio.timeout` does, which Python 3.10 lacks."""
    task = asyncio.current_task()
    assert task is not None
    expired = False

    def expire() -> None:
        nonlocal expired
        expired = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, expire)
    try:
        yield
    except asyncio.CancelledError:
        if expired:
            raise asyncio.TimeoutError from None
        raise
    finally:
        timer.cancel()


def parse_texts(body: bytes, pair: bool, limits: Limits, options: bool = False) -> tuple[bool, list[Texts]]:
    """Return whether a request holds one text rather than a list, and its texts.

    Args:
        pair: Each is a pair.
        options: Each has options.

    Raises:
        HTTPException: 400 not JSON in UTF-8; 413 too much text; 422 not the expected form.
    """
    try:
        given = json.loads(body.decode("utf-8"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    except ValueError:
        raise HTTPException(400, "the body has a number with too many digits") from None
    except RecursionError:
        raise HTTPException(400, "the body is nested too deeply") from None
    names = ("text", *(("text_pair",) if pair else ()), *(("options",) if options else ()))
    form = "{" + ", ".join(f'"{name}": {_KEYS[name]}' for name in names) + "}"
    if not isinstance(given, dict):
        raise HTTPException(422, f'the body must be {form}, or {{"texts": [{form}, ...]}}')
    single = "texts" not in given
    rows = [given] if single else given["texts"]
    if not isinstance(rows, list) or not rows or (not single and len(given) > 1):
        raise HTTPException(422, f"texts must be a list of {form}, and the only key")
    if len(rows) > limits.texts:
        raise HTTPException(413, f"{len(rows)} texts; at most {limits.texts} are allowed in a request")
    return single, [_checked(row, names, form, limits) for row in rows]


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise HTTPException(422, "an object has a key twice")
    return record


def _checked(row: object, names: tuple[str, ...], form: str, limits: Limits) -> Texts:
    if isinstance(row, str) and names == ("text",):
        row = {"text": row}
    if not isinstance(row, dict) or set(row) != set(names):
        takes = "a pair of texts" if "text_pair" in names else "a single text"
        raise HTTPException(
            422, f"each text must be {form}: the model takes {takes}{' and options' if 'options' in names else ''}"
        )
    own = [name for name in names if name != "options"]
    texts = tuple(_checked_text(name, row[name], limits) for name in own)
    if all(map(is_empty, texts)):
        raise HTTPException(422, f"{' and '.join(own)} {'are both' if len(own) > 1 else 'is'} empty")
    return (*texts, *(_checked_options(row["options"], limits) if "options" in names else ()))


def _checked_options(options: object, limits: Limits) -> Texts:
    if not isinstance(options, list) or not 2 <= len(options) <= MOST_OPTIONS:
        raise HTTPException(422, f"options must be a list of 2 to {MOST_OPTIONS} strings")
    return tuple(_checked_text(f"options[{i}]", option, limits) for i, option in enumerate(options))


def _checked_text(name: str, text: object, limits: Limits) -> str:
    if not isinstance(text, str):
        raise HTTPException(422, f"{name} must be a string")
    if len(text) > limits.text_characters:
        raise HTTPException(413, f"{name} has {len(text)} characters; at most {limits.text_characters} are allowed")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise HTTPException(422, f"{name} has an unpaired surrogate") from None
    return text
