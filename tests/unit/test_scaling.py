"""The scaling arithmetic against formulas, published cases and counted steps; the simulated orders on small caches."""

import dataclasses
import math

import numpy as np
import pytest

from benchmarks.common import RESULTS, filled, read_json
from benchmarks.scaling import model, report, shuffle
from benchmarks.scaling.model import Shape, bert

COUNTED = report.CONSTANTS["steps"] + report.CONSTANTS["counted"]
"""Steps that were counted under the engine: bytes of memory, of messages, and calls."""


def minilm(layers):
    return Shape(layers, 384, 1536, 12)


KINDS = {"allreduce": "all_reduce", "allgather_base": "all_gather", "reduce_scatter_base": "reduce_scatter"}


def ring_all_reduce(n, chunk_bytes):
    """Does it: returns the sums that every rank ends with, and the bytes that rank 0 sent."""
    held, sent = [[float(r + 10 * c) for c in range(n)] for r in range(n)], 0
    for phase in ("reduce", "gather"):
        for step in range(n - 1):
            moves = [(r, (r - step + (phase == "gather")) % n) for r in range(n)]
            for r, chunk, value in [(r, c, held[r][c]) for r, c in moves]:
                other = (r + 1) % n
                held[other][chunk] = value + (held[other][chunk] if phase == "reduce" else 0)
                sent += chunk_bytes * (r == 0)
    return held, sent


@pytest.mark.parametrize("n", [2, 3, 4, 8])
def test_ring_all_reduce_bytes(n):
    held, sent = ring_all_reduce(n, 1000)
    assert all(chunks == [sum(r + 10 * c for r in range(n)) for c in range(n)] for chunks in held)
    assert model.wire_bytes("all_reduce", 1000 * n, n) == pytest.approx(sent)
    assert model.wire_bytes("all_reduce", 1.0, n) == pytest.approx(2 * (n - 1) / n)
    assert model.wire_bytes("all_gather", 1.0, n) == pytest.approx((n - 1) / n)


# ------------------------------------------------------------------------------------------------------- memory, FLOPs


def test_zero_paper_figure_1():
    """7.5 B parameters on 64 GPUs, 2 + 2 + 12 bytes: 120, 31.4, 16.6 and 1.9 GB (Rajbhandari et al. 2020)."""
    kept = [model.zero_memory(7_500_000_000, stage, "bf16", 64) for stage in range(4)]
    assert [m.kept / 1e9 for m in kept] == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


def test_autocast_keeps_16_bytes_a_parameter_and_zero_adds_a_copy():
    assert model.zero_memory(100, 0, "autocast", 1).model == 1600
    assert model.zero_memory(100, 1, "autocast", 1).model == 2000
    assert model.zero_memory(100, 2, "autocast", 2, bucket=1000).bucket == 4000


def test_published_parameter_counts():
    assert bert(12).parameters == 109_483_778  # BERT-base with two classes
    assert minilm(6).parameters == 22_713_986 and minilm(3).parameters == 17_390_594  # README.md


def test_flops_are_those_of_the_products():
    s, rows, length = Shape(2, 8, 16, 2, vocabulary=50, classes=3), 3, 5
    head = s.hidden // s.heads
    full = [(rows * length, 8, 8)] * 4 + [(rows * length, 8, 16), (rows * length, 16, 8)]
    full += [(length, head, length), (length, length, head)] * (rows * s.heads)
    last = [(rows, 8, 8)] * 2 + [(rows, head, 8), (rows, 8, head)] * s.heads + [(rows, 8, 16), (rows, 16, 8)]
    last += [(s.heads, 8, length), (s.heads, length, 8)] * rows
    products = full + last + [(rows, 8, 8), (rows, 8, 3)]
    assert s.forward_flops(rows, length) == sum(2 * m * k * n for m, k, n in products)


def test_cache_row():
    assert model.cache_row_bytes(2, 768, 2) == 8 + 2 * 2 + 2 * 768 * 2
    assert model.cache_row_bytes(2, 768, 2, tokens=10) == 8 + 4 + 8 + 10 * 2 * 768 * 2


def test_bytes_follow_the_stage():
    whole = 4 * bert(3).parameters
    sent = [model.step_wire_bytes(bert(3), stage, "autocast", 10**9) / whole for stage in range(4)]
    assert sent == pytest.approx([2, 3, 3, 2])
    four = [model.step_wire_bytes(bert(3), stage, "autocast", 10**9, 4) / whole for stage in range(4)]
    assert four == pytest.approx([2, 3, 9, 8])


# ------------------------------------------------------------------------------------------------------ against counts


def precision_of(step):
    return "bf16" if "bf16" in step["config"] else "autocast"


def label(step):
    return f"{step['config']}-{step['ranks']}-{step['layers']}-{step['accumulation']}"


@pytest.mark.parametrize("step", [s for s in COUNTED if (s["layers"], s["accumulation"]) == (3, 1)], ids=label)
def test_memory_is_that_of_a_counted_step(step):
    made = model.zero_memory(minilm(3).parameters, int(step["config"][4]), precision_of(step), step["ranks"])
    assert 0.8 <= made.model / step["backward_bytes"] <= 1.1
    assert made.bucket == pytest.approx(step["bucket_bytes"], rel=0.01)


@pytest.mark.parametrize("step", [s for s in COUNTED if s["ranks"] == 2], ids=label)
def test_messages_are_those_of_a_counted_step(step):
    stage, layers, micro = int(step["config"][4]), step["layers"], step["accumulation"]
    sent = sum(model.wire_bytes(KINDS[name], size, 2) for name, size in step["payload_bytes"].items())
    assert model.step_wire_bytes(minilm(layers), stage, precision_of(step), 2, micro) == pytest.approx(sent, rel=0.01)
    calls = sum(count for _, _, count in model.zero_messages(stage, layers, micro))
    assert 0 <= sum(step["collectives"].values()) - calls <= 3, "flags and norms"


def test_the_page_has_every_table_as_it_is_computed():
    text = report.DOCUMENT.read_text()
    assert filled(report.DOCUMENT, report.TABLES) == text, "run: python -m benchmarks.scaling.report"
    assert not [name for name in report.TABLES if f"<!-- figures: {name} -->" not in text]


def test_the_simulation_was_of_100_million_rows():
    found = read_json(RESULTS / "scaling_shuffle.json")
    assert found["settings"]["rows"] == report.ROWS_TOTAL
    assert all(epoch["every_row_once"] == 1 for name in shuffle.ORDERS for epoch in found[name]["epochs"])


# --------------------------------------------------------------------------------------------------------------- orders

SMALL = shuffle.Settings(rows=20_011, shard_rows=64, batch=64, lanes=16, window=2)
LENGTHS = shuffle.make_lengths(SMALL.rows, [4, 20, 27, 35, 79], 0)


def whole(name, settings=SMALL, epoch=0):
    lengths = LENGTHS if settings.rows == SMALL.rows else shuffle.make_lengths(settings.rows, [4, 79], 0)
    return np.concatenate(list(shuffle.ORDERS[name](settings, lengths, epoch)))


@pytest.mark.parametrize("name", list(shuffle.ORDERS))
@pytest.mark.parametrize("rows", [20_011, 4096, 64, 1])
def test_an_order_is_a_permutation(name, rows):
    order = whole(name, dataclasses.replace(SMALL, rows=rows))
    assert np.array_equal(np.sort(order), np.arange(rows))


@pytest.mark.parametrize("name", list(shuffle.ORDERS))
def test_an_order_is_a_function_of_seed_and_epoch(name):
    assert np.array_equal(whole(name), whole(name))
    assert not np.array_equal(whole(name), whole(name, epoch=1))
    assert not np.array_equal(whole(name), whole(name, dataclasses.replace(SMALL, seed=7)))


@pytest.mark.parametrize("ranks", [1, 2, 4, 16])
def test_a_rank_reads_its_own_shards_once(ranks):
    s = dataclasses.replace(SMALL, rows=64 * 320)  # ten full windows
    lengths = shuffle.make_lengths(s.rows, [4, 79], 0)
    opened = shuffle.balance(shuffle.sharded_order(s, lengths, 0), s, lengths, ranks)
    assert opened["shard_reads"] == s.shards
    present = shuffle.balance(shuffle.present_order(s, lengths, 0), s, lengths, ranks)
    assert present["shard_reads"] > 0.95 * s.shards * ranks, "there, every rank opens nearly every shard"


def test_mixing_tells_a_shuffle_from_none():
    expected = shuffle.expected_in_uniform(SMALL)
    first = np.zeros(SMALL.rows, dtype=np.int32)
    rng = np.random.default_rng(0)
    for epoch in (0, 1):
        good = shuffle.mixing([rng.permutation(SMALL.rows)], SMALL, first, epoch)
    for name, tolerance in {"mean_distance": 0.01, "batch_mean_variance": 0.25, "met_again": 0.4}.items():
        assert good[name] == pytest.approx(expected[name], abs=tolerance), name
    assert abs(good["rank_correlation_of_epochs"]) < 0.03 and good["every_row_once"] == 1
    bad = shuffle.mixing([np.arange(SMALL.rows)], SMALL, np.arange(SMALL.rows, dtype=np.int32), 1)
    assert bad["rank_correlation_with_cache"] == bad["rank_correlation_of_epochs"] == 1
    assert bad["met_again"] > 100 and bad["batch_mean_variance"] > 50
    assert shuffle.mixing([np.zeros(SMALL.rows, dtype=np.int64)], SMALL, first, 0)["every_row_once"] == 0


def test_variance_of_the_sharded_order_is_as_expected():
    s = shuffle.Settings(rows=64 * 3200, shard_rows=64, batch=64, lanes=16, window=2)
    lengths = np.full(s.rows, 10)
    first = np.zeros(s.rows, dtype=np.int32)
    got = np.mean(
        [shuffle.mixing(shuffle.sharded_order(s, lengths, e), s, first, 0)["batch_mean_variance"] for e in range(3)]
    )
    assert got == pytest.approx(shuffle.expected_batch_mean_variance(s), rel=0.15)


def test_lru():
    assert list(shuffle.lru_misses([1, 2, 1, 3, 2, 1], 2)) == [True, True, False, True, True, True]
    assert sum(shuffle.lru_misses(list(range(10)) * 3, 10)) == 10
    assert shuffle.page_cache(2000, 1, 1.0, 1, 0) == 0
    assert shuffle.page_cache(2000, 1, 0.001, 1, 0) > 0.99
    assert math.isclose(shuffle.page_cache(2000, 40, 1.0, 1, 0), 0)
