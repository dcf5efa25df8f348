"""Write the tables of docs/scaling.md: python -m benchmarks.scaling.report

The arithmetic is in model.py; counts of real steps are in benchmarks/results/scaling_constants.json (2026-11-24).
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.common import DOCS, RESULTS, read_json, table, write_page
from benchmarks.scaling.model import PRECISIONS, bert, cache_row_bytes, step_wire_bytes, zero_memory

DOCUMENT = DOCS / "scaling.md"
LENGTH = 32  # tokens of an example after padding
ROWS_TOTAL, SHARD_ROWS = 100_000_000, 4096
CONSTANTS = read_json(RESULTS / "scaling_constants.json")


def numbers(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a table of texts, and of numbers with three significant digits."""

    def shown(cell: Any) -> str:
        return cell if isinstance(cell, str) else f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"

    return table(head, (map(shown, row) for row in rows))


def memory() -> str:
    rows = []
    for layers, precision, stage in itertools.product((3, 6, 12), PRECISIONS, range(4)):
        cells = [zero_memory(bert(layers).parameters, stage, precision, n) for n in (1, 8, 256)]
        rows.append((f"{layers}", precision, str(stage), *(c.model / 1e9 for c in cells), cells[0].bucket / 1e9))
    return numbers(("layers", "precision", "ZeRO", "1 GPU", "8", "256", "plus the bucket"), rows)


def activations() -> str:
    """Bytes kept for backward, from counts of bytes per token and unit of hidden size, by layer and elsewhere."""
    layer, rest = CONSTANTS["counts"]["saved_per_layer"], CONSTANTS["counts"]["saved_rest"]
    sizes = (64, 512, 4096)
    rows = [(str(d), *(n * LENGTH * 768 * (layer * (d - 1) + rest) / 1e9 for n in sizes)) for d in (3, 6, 12)]
    return numbers(("layers", *(f"{n:,} examples" for n in sizes)), rows)


def wire() -> str:
    cases = (("autocast", 2, 1), ("autocast", 8, 1), ("autocast", 256, 1), ("autocast", 256, 4), ("bf16", 256, 1))
    rows = []
    for layers, stage in itertools.product((3, 6, 12), range(4)):
        cells = (step_wire_bytes(bert(layers), stage, p, n, a) / 1e6 for p, n, a in cases)
        rows.append((str(layers), str(stage), *cells))
    return numbers(("layers", "ZeRO", "2 GPUs", "8", "256", "256, 4 micro-batches", "256, bf16"), rows)


def cache_size() -> str:
    mean = CONSTANTS["teacher"]["mean_length"]
    cases = (("cls, 3-layer student", 2, None), ("cls, 6-layer student", 5, None), ("tokens, 3-layer", 2, mean))
    rows = []
    for name, pairs, tokens in cases:
        row = cache_row_bytes(pairs, 768, 2, tokens=tokens)
        rows.append((name, row, row * ROWS_TOTAL / 1e12, f"{-(-ROWS_TOTAL // SHARD_ROWS):,}", row * SHARD_ROWS / 1e6))
    return numbers(("states", "bytes per example", "TB", "shards of 4,096 examples", "MB per shard"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "memory": memory, "activations": activations, "wire": wire, "cache-size": cache_size,
}  # fmt: skip


if __name__ == "__main__":
    write_page(DOCUMENT, TABLES)
