"""Measure the effect of many and slow scrapers on the steps of a run: segments with and without them alternate.

A tiny teacher is distilled on sentences of one length, so that all steps are equal, with one thread: the scrapers' own
work uses another core, as if they ran elsewhere. In a segment with scrapers 50 connections hang (half of them silent,
half after a request whose response they never read) and 20 scrapes a second are answered. The order in a pair
alternates. Writes benchmarks/results/scrapers.json. The exit status is 1 if a step takes 2% longer with scrapers.
"""

import argparse
import contextlib
import json
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, ROOT, stamp
from benchmarks.faults.tiny import BAD, GOOD, PLAIN, command, environment, make_body, write_config, write_tsv
from pkd_dist.files import write_json
from pkd_dist.network import free_port
from pkd_dist.telemetry.records import read

REQUEST = b"GET /metrics HTTP/1.0\r\n\r\n"
SEGMENT_SECONDS, HANGING, SCRAPES_PER_SECOND = 5.0, 50, 20.0
HIDDEN, WORDS, WARM_UP_STEPS, SETTLE_SECONDS, LIMIT_PERCENT = 384, 24, 50, 0.5, 2.0


@contextlib.contextmanager
def run(folder: Path, port: int) -> Iterator[Path]:
    """Start a run that trains without end; yield its metrics.jsonl after the warm-up."""
    body, draw, never = make_body(folder / "body", layers=6, hidden=HIDDEN), random.Random(1), 10**6
    for split, count in (("train", 640), ("dev", 32)):
        labels = [draw.randrange(2) for _ in range(count)]
        rows = [(" ".join([*draw.choices(PLAIN, k=WORDS - 1), draw.choice((BAD, GOOD)[y])]), y) for y in labels]
        write_tsv(folder / f"data/{split}.tsv", rows)
    settings = {
        "run": {"dir": str(folder / "run")}, "metrics": {"port": port}, "student": {"layers": [1, 3, 5]},
        "task": {"name": "sst2", "data": str(folder / "data"), "max_length": 64},
        "teacher": {"model": str(body), "finetune": {"epochs": 1}},
        "train": {"epochs": never, "batch_size": 32, "deepspeed": "ds_configs/zero1_fp32.json"},
        "checkpoint": {"every_steps": 10**9}, "evaluate": {"every_epochs": never},
    }  # fmt: skip
    steps, argv = folder / "run/metrics.jsonl", command("--config", write_config(settings, folder))
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(argv, cwd=ROOT, env=environment(), stdout=log, stderr=log)
        try:
            while not steps.exists() or len(steps.read_bytes().splitlines()) < WARM_UP_STEPS:
                if process.poll() is not None:
                    raise SystemExit((folder / "log").read_text())
                time.sleep(0.5)
            yield steps
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def scrape(port: int) -> float:
    """Read the metrics once; return the seconds it took."""
    began, response = time.perf_counter(), b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(REQUEST)
        while part := connection.recv(1 << 16):
            response += part
    if not response.startswith(b"HTTP/1.0 200") or b"pkd_samples_total " not in response:
        raise SystemExit(f"unexpected response: {response[:200]!r}")
    return time.perf_counter() - began


def scrapers(port: int) -> list[float]:
    """Scrape for a segment beside connections that hang; return the seconds of each scrape."""
    took = []
    with contextlib.ExitStack() as stack:
        for number in range(HANGING):
            connection = stack.enter_context(socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            connection.connect(("127.0.0.1", port))
            if number % 2:
                connection.sendall(REQUEST)
        start = time.monotonic()
        for number in range(round(SEGMENT_SECONDS * SCRAPES_PER_SECOND)):
            time.sleep(max(0.0, start + number / SCRAPES_PER_SECOND - time.monotonic()))
            took.append(scrape(port))
        time.sleep(max(0.0, start + SEGMENT_SECONDS - time.monotonic()))
    return took


def measure(pairs: int) -> dict[str, Any]:
    segments: list[tuple[bool, float, float]] = []
    took: list[float] = []
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, run(Path(folder), port) as steps:
        for pair in range(pairs):
            for on in (False, True) if pair % 2 else (True, False):
                time.sleep(SETTLE_SECONDS)
                start = time.time()
                if on:
                    took += scrapers(port)
                else:
                    time.sleep(SEGMENT_SECONDS)
                segments.append((on, start, time.time()))
        times = [record["time"] for record in read(steps)]
    durations: dict[bool, list[float]] = {True: [], False: []}
    medians: dict[bool, list[float]] = {True: [], False: []}
    for on, start, end in segments:
        here = [b - a for a, b in zip(times, times[1:], strict=False) if start <= a and b <= end]
        durations[on] += here
        medians[on].append(statistics.median(here))
    changes = [100 * (a / b - 1) for a, b in zip(medians[True], medians[False], strict=True)]
    return stamp() | {
        "pairs": pairs, "steps_without": len(durations[False]), "steps_beside": len(durations[True]),
        "step_ms_without": percentiles(durations[False]), "step_ms_beside": percentiles(durations[True]),
        "change_percent_of_pairs": changes, "median_change_percent_of_pairs": statistics.median(changes),
        "scrapes_answered": len(took), "scrape_ms": percentiles(took),
    }  # fmt: skip


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Return percentiles in milliseconds."""
    return {f"p{share}": 1e3 * float(np.percentile(seconds, share)) for share in (10, 50, 90)}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scrapers", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=6, help="pairs of segments (default 6)")
    parser.add_argument("--output", type=Path, default=RESULTS / "scrapers.json")
    options = parser.parse_args()
    found = measure(options.pairs)
    write_json(options.output, found)
    print(json.dumps(found, indent=1))
    changed = found["median_change_percent_of_pairs"]
    print(f"\nwith scrapers a step takes {changed:+.2f}% (limit {LIMIT_PERCENT:g}%): {options.output}")
    return int(changed >= LIMIT_PERCENT)


if __name__ == "__main__":
    sys.exit(main())
