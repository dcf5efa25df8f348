"""The scaling model against formulas, published cases and what was counted; the simulated orders on small caches."""

import dataclasses
import math

import numpy as np
import pytest

from benchmarks.scaling import model, report, shuffle
from benchmarks.scaling.model import Link, Shape, bert, h100, minilm

COUNTS = model.Counts(500, 250, 9, 60, 20, (12, 40, 40, 40), (0, 20, 20, 20), (600, 680, 730, 800), 120)


# ---------------------------------------------------------------------------------------------------------- collectives


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


def test_latency_and_bandwidth_terms():
    link = Link(1e-6, 1e9)
    assert model.flat_seconds("all_gather", 4e6, 4, link) == pytest.approx(3e-6 + 3e-3)
    assert model.flat_seconds("all_reduce", 4e6, 4, link) == pytest.approx(6e-6 + 6e-3), "large: a ring"
    assert model.flat_seconds("all_reduce", 8, 64, link) == pytest.approx(12e-6, rel=0.01), "small: a tree of 6 levels"
    assert model.flat_seconds("all_reduce", 4e6, 1, link) == 0


def test_two_levels():
    machine = h100({"call_seconds": 0, "inside_latency_seconds": 0, "between_latency_seconds": 0})
    inside, between = (links["all_reduce"].bytes_per_second for links in (machine.inside, machine.between))
    expected = 2 * 7 / 8 * 1e9 / inside + 2 * 3 / 4 * (1e9 / 8) / between
    assert model.collective_seconds("all_reduce", 1e9, 32, machine) == pytest.approx(expected)
    assert model.collective_seconds("all_reduce", 1e9, 8, machine) == pytest.approx(2 * 7 / 8 * 1e9 / inside)
    assert all(model.collective_seconds(kind, 1e9, 1, h100()) == 0 for kind in model.KINDS)


# ------------------------------------------------------------------------------------------------------- memory, FLOPs


def test_zero_paper_figure_1():
    """7.5 B parameters on 64 GPUs, 2 + 2 + 12 bytes: 120, 31.4, 16.6 and 1.9 GB (Rajbhandari et al. 2020)."""
    kept = [model.zero_memory(7_500_000_000, stage, "bf16", 64) for stage in range(4)]
    got = [(m.weights + m.gradients + m.optimizer) / 1e9 for m in kept]
    assert got == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.05)


def test_autocast_keeps_16_bytes_a_parameter_and_zero_adds_a_copy():
    assert model.zero_memory(100, 0, "autocast", 1).total == 1600
    assert model.zero_memory(100, 1, "autocast", 1).total == 2000
    assert model.zero_memory(100, 2, "autocast", 2, bucket=1000).bucket == 4000


def test_published_parameter_counts():
    assert bert(12).parameters == 109_483_778  # BERT-base with two classes
    assert minilm(6).parameters == 22_713_986 and minilm(3).parameters == 17_390_594  # README.md


def test_flops_are_those_of_the_products():
    s, rows, length = Shape(2, 8, 16, 2, vocabulary=50, classes=3), 3, 5
    head = s.hidden // s.heads
    full = [(rows * length, 8, 8)] * 4 + [(rows * length, 8, 16), (rows * length, 16, 8)]
    full += [(length, head, length), (length, length, head)] * (rows * s.heads)
    lean = [(rows, 8, 8)] * 2 + [(rows, head, 8), (rows, 8, head)] * s.heads + [(rows, 8, 16), (rows, 16, 8)]
    lean += [(s.heads, 8, length), (s.heads, length, 8)] * rows
    products = full + lean + [(rows, 8, 8), (rows, 8, 3)]
    assert s.forward_flops(rows, length) == sum(2 * m * k * n for m, k, n in products)


def test_cache_row():
    assert model.cache_row_bytes(2, 768, 2) == 8 + 2 * 2 + 2 * 768 * 2
    assert model.cache_row_bytes(2, 768, 2, tokens=10) == 8 + 4 + 8 + 10 * 2 * 768 * 2


# ---------------------------------------------------------------------------------------------------------------- steps


def test_a_step_alone_sends_nothing_and_more_ranks_cost_more():
    times = [model.step_seconds(bert(3), 64, 32, 3, "autocast", n, h100(), COUNTS) for n in (1, 8, 64)]
    assert times[0].communication == 0 < times[1].communication < times[2].communication
    assert times[0].total == pytest.approx(times[0].compute + times[0].optimizer)


def test_a_gpu_hides_the_host_and_a_cpu_does_not():
    gpu = h100()
    cpu = dataclasses.replace(gpu, asynchronous=False)
    a, b = (model.step_seconds(bert(3), 64, 32, 0, "autocast", 1, m, COUNTS) for m in (gpu, cpu))
    assert a.compute == max(a.host, a.products + a.traffic)
    assert b.compute == pytest.approx(a.host + a.products + a.traffic)


def test_efficiency():
    shares = [model.efficiency(bert(3), 4096, 32, 0, n, h100(), COUNTS, 512) for n in (1, 8, 64, 256)]
    assert shares[0] == 1 and shares == sorted(shares, reverse=True)


def test_bytes_follow_the_stage():
    whole = 4 * bert(3).parameters
    sent = [model.step_wire_bytes(bert(3), stage, "autocast", 10**9) / whole for stage in range(4)]
    assert sent == pytest.approx([2, 3, 3, 2])
    four = [model.step_wire_bytes(bert(3), stage, "autocast", 10**9, 4) / whole for stage in range(4)]
    assert four == pytest.approx([2, 3, 9, 8])


# ------------------------------------------------------------------------------------------------- against measurements


def ratios(table, column):
    return [float(line.split("|")[column + 1]) for line in table.splitlines()[2:]]


def test_counted_bytes_and_memory_are_the_models():
    table = report.check_bytes()
    assert ratios(table, 5) == pytest.approx([1] * 13, abs=0.01)
    calls = [line.split("|")[7].split(" / ") for line in table.splitlines()[2:]]
    assert all(0 <= int(counted) - int(predicted) <= 3 for predicted, counted in calls), "flags and norms"
    assert all(0.8 <= ratio <= 1.1 for ratio in ratios(report.check_memory(), 4))


def test_work_of_a_measured_step_is_predicted_within_a_third():
    assert all(0.67 <= ratio <= 1.5 for ratio in ratios(report.check_seconds(), 9))


def test_the_document_says_what_the_model_says():
    text = report.DOCUMENT.read_text()
    assert report.filled(text) == text, "run: python -m benchmarks.scaling.report"
    missing = [name for name in report.TABLES if f"<!-- table: {name} -->" not in text]
    assert not missing
    for plot in ("scaling-steps.png", "scaling-limits.png"):
        assert plot in text and report.DOCUMENT.with_name(plot).is_file()


def test_the_simulation_was_of_100_million_rows():
    found = report.simulation()
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


def test_lanes_must_divide_the_batch():
    with pytest.raises(ValueError, match="multiple"):
        shuffle.Settings(batch=100, lanes=16)


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
