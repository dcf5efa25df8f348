"""Clients of `pkd serve` over plain sockets: valid and invalid requests, each with the response it must get."""

import asyncio
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.faults.tiny import ROOT, environment

JSON = "application/json"


@contextmanager
def server(export: Path, *options: str, prefix: Sequence[str] = ("-m", "pkd_dist.cli")) -> Any:
    """Run `pkd serve` on a free port; yield (process, port); stop it at the end."""
    process = subprocess.Popen(
        [sys.executable, *prefix, "serve", str(export), "--port", "0", *options],
        cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        found = re.search(r"http://[\d.]+:(\d+)/", process.stdout.readline())
        if not found:
            raise RuntimeError(f"pkd serve did not start: {process.communicate()[1]}")
        yield process, int(found[1])
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


def head(method: str, path: str, kind: str, length: int) -> bytes:
    return f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n".encode()


class Client:
    """One connection, kept open as long as the server keeps it."""

    def __init__(self, port: int):
        self.port = port
        self.reader: asyncio.StreamReader | None = None

    async def send(self, raw: bytes) -> tuple[int, Any]:
        """Return (status, body, parsed if JSON) of a raw request; (0, None) if the server closes without a response."""
        if self.reader is None:
            self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            self.writer.write(raw)
            await self.writer.drain()
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
            headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
            body = await self.reader.readexactly(int(headers.get("content-length", 0)))
        except (asyncio.IncompleteReadError, ConnectionError):
            self.close()
            return 0, None
        if headers.get("connection") == "close":
            self.close()
        return int(lines[0].split()[1]), json.loads(body) if headers.get("content-type") == JSON else body

    async def post(self, content: Any, kind: str = JSON) -> tuple[int, Any]:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return await self.send(head("POST", "/predict", kind, len(body)) + body)

    async def get(self, path: str) -> tuple[int, Any]:
        return await self.send(head("GET", path, JSON, 0))

    def close(self) -> None:
        if self.reader is not None:
            self.writer.close()
            self.reader = None


BAD: dict[str, tuple[Any, str, int]] = {
    "empty text": ({"text": "  "}, JSON, 422),
    "empty body": (b"", JSON, 400),
    "huge body": (b'{"text": "' + b"a" * (2 << 20) + b'"}', JSON, 413),
    "long text": ({"text": "word " * 10_000}, JSON, 413),
    "too many texts": ({"texts": ["a"] * 1000}, JSON, 413),
    "not UTF-8": (b'{"text": "\xff\xfe"}', JSON, 400),
    "half a surrogate pair": (b'{"text": "\\ud800"}', JSON, 422),
    "not JSON": (b'{"text": "a"', JSON, 400),
    "deep JSON": (b"[" * 100_000, JSON, 400),
    "no text": ({"sentence": "a"}, JSON, 422),
    "not a text": ({"text": 1}, JSON, 422),
    "a list": (["a"], JSON, 422),
    "another kind": (b"text=a", "application/x-www-form-urlencoded", 415),
}
"""Name -> (content, content-type, status of the response)."""


async def _send_bad(client: Client, rng: random.Random) -> None:
    name = rng.choice([*BAD, "not HTTP"])
    if name == "not HTTP":
        status, _ = await client.send(rng.randbytes(rng.randrange(1, 200)) + b"\r\n\r\n")
        assert status in (0, 400), f"{name}: {status}"
        client.close()
    else:
        content, kind, wanted = BAD[name]
        status, body = await client.post(content, kind)
        assert status == wanted and body["error"], f"{name}: {status} {body}"


async def _client(
    port: int, rng: random.Random, texts: Sequence[str], check: Callable[[str, Any], None], more: Callable[[int], bool]
) -> Counter[str]:
    client, counts, done = Client(port), Counter[str](), 0
    while more(done):
        done += 1
        if rng.random() < 0.3:
            await _send_bad(client, rng)
            counts["refused"] += 1
        else:
            chosen = rng.choices(texts, k=rng.randrange(1, 9))
            status, body = await client.post({"texts": chosen} if len(chosen) > 1 else {"text": chosen[0]})
            if status == 429:
                counts["busy"] += 1
                await asyncio.sleep(0.01)
                continue
            assert status == 200, f"{status} {body}"
            for text, answer in zip(chosen, body["answers"] if len(chosen) > 1 else [body], strict=True):
                check(text, answer)
            counts["answered"] += 1
            counts["texts"] += len(chosen)
    client.close()
    return counts


async def load(
    port: int, texts: Sequence[str], check: Callable[[str, Any], None], clients: int = 64, requests: int | None = None,
    seconds: float = 0.0, seed: int = 1, watch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """Run concurrent clients, each for `requests` requests or for `seconds`; about a third of the requests are invalid.

    `check` gets each text and its answer, `watch` is called every second. Raises AssertionError for a wrong response.
    """
    end = time.monotonic() + seconds

    def more(done: int) -> bool:
        return time.monotonic() < end if requests is None else done < requests

    async def watching() -> None:
        while True:
            watch()
            await asyncio.sleep(1)

    watcher, start = asyncio.create_task(watching()), time.monotonic()
    runs = (_client(port, random.Random(f"{seed} {i}"), texts, check, more) for i in range(clients))
    try:
        found = await asyncio.gather(*runs)
    finally:
        watcher.cancel()
    return {"clients": clients, "seconds": time.monotonic() - start, **sum(found, Counter())}
