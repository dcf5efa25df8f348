"""Write the tables of docs/scaling.md: python -m benchmarks.scaling.report

The arithmetic is in model.py; counts of real steps are in benchmarks/results/scaling_constants.json, recorded on
2026-11-24; the simulation is in benchmarks/results/scaling_shuffle.json.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.common import DOCS, RESULTS, read_json, table, write_page
from benchmarks.scaling.model import PRECISIONS, bert, cache_row_bytes, step_wire_bytes, zero_memory
from benchmarks.scaling.shuffle import ORDERS, Settings

DOCUMENT = DOCS / "scaling.md"
LENGTH = 32
"""Tokens of a row after padding; the mean of the embedded data is 27."""
ROWS_TOTAL, SHARD_ROWS = 100_000_000, 4096
ROW_BYTES = cache_row_bytes(pairs=2, hidden=768, classes=2)
"""Of the cache of a BERT-base teacher and a 3-layer student."""
CONSTANTS, SIMULATION = (read_json(RESULTS / f"scaling_{name}.json") for name in ("constants", "shuffle"))


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
    return numbers(("layers", *(f"{n:,} rows" for n in sizes)), rows)


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
    return numbers(("states", "bytes a row", "TB", "shards of 4,096 rows", "MB a shard"), rows)


def mixing() -> str:
    sim, uniform = SIMULATION, SIMULATION["uniform"]
    shown = {
        "every_row_once": "every row exactly once (1: yes)",
        "rank_correlation_with_cache": "rank correlation of the order with the cache",
        "rank_correlation_of_epochs": "rank correlation of two epochs' orders",
        "mean_distance": "distance in the cache of neighbours in a batch, as a share of the cache",
        "shards_of_batch": "different shards in a batch",
        "met_again": "neighbours that shared a batch in the previous epoch, over chance",
        "batch_mean_variance": "variance of a batch's mean of a label sorted along the cache, over chance",
    }
    rows = [(text, uniform[k], *(sim[o]["epochs"][1][k] for o in ORDERS)) for k, text in shown.items()]
    return numbers(("two epochs of 100 M rows, batches of 4,096", "uniform", *ORDERS), rows)


def reading() -> str:
    sim = SIMULATION
    s = Settings(**{k: v for k, v in sim["settings"].items() if k != "shards"})
    rows: list[tuple[Any, ...]] = [
        ("CPU seconds to make an order, one rank", *(sim[o]["order_processor_seconds"] for o in ORDERS)),
        ("memory while making it, GB a rank", *(sim[o]["order_peak_bytes"] / 1e9 for o in ORDERS)),
    ]
    for n in ("8", "64", "256"):
        found = [sim[o]["ranks"][n] for o in ORDERS]
        held = s.lanes / int(n) * s.window * ROW_BYTES * SHARD_ROWS / 1e9
        rows += [
            (f"{n} ranks: shards opened by all ranks, each kept for 1,024 batches", *(f"{f['shard_reads']:,}" for f in found)),
            (f"{n} ranks: computed tokens over real ones", *(f["padding"] for f in found)),
            (f"{n} ranks: fullest rank of a step over the mean", *(f["slowest_rank"] for f in found)),
            (f"{n} ranks: most over fewest tokens in an epoch", *(f"{f['tokens_spread']:.4f}" for f in found)),
            (f"{n} ranks: shards held by a rank, GB", "all, in the page cache", held),
        ]  # fmt: skip
    return numbers(("", *ORDERS), rows)


def storage() -> str:
    """Reads of one node in an epoch, after two epochs."""
    touched = CONSTANTS["storage"]["random_rows_without_read_ahead"]["device_bytes_per_byte_wanted"]
    blocks = {(p["rows_per_block"], p["nodes"], p["share_cached"]): p["blocks_per_row"] for p in SIMULATION["page_cache"]}  # fmt: skip
    rows = []
    for nodes in (1, 4):
        for share in (0.1, 0.25, 0.5, 0.75, 1.0):
            used, page, around = ROWS_TOTAL / nodes, blocks[1, nodes, share], blocks[40, nodes, share]
            shards = page * -(-ROWS_TOTAL // SHARD_ROWS) / nodes  # their order is a permutation too
            rows.append((str(nodes), f"{share:.0%} ({share * ROW_BYTES * ROWS_TOTAL / 1e9:.3g} GB)", page * used / 1e6,
                         page * used * ROW_BYTES * touched / 1e12, around * used * 40 * ROW_BYTES / 1e12,
                         f"{shards:,.0f}", shards * ROW_BYTES * SHARD_ROWS / 1e12))  # fmt: skip
    head = ("nodes", "page cache of a node", "present: random reads, M", "TB with MADV_RANDOM",
            "TB with read-around of 128 KiB", "sharded: reads", "TB")  # fmt: skip
    return numbers(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "memory": memory, "activations": activations, "wire": wire,
    "cache-size": cache_size, "mixing": mixing, "reading": reading, "storage": storage,
}  # fmt: skip


if __name__ == "__main__":
    write_page(DOCUMENT, TABLES)
