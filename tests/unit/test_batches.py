"""Batches: an epoch is a permutation, and nothing depends on the number of ranks."""

import numpy as np
import pytest

from pkd_dist.data.batches import MULTIPLE, TrainingBatches, collate, epoch_order, micro_batches, scoring_batches
from pkd_dist.data.tokens import TokenSet


def token_set(lengths, typed=True, seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    return TokenSet(
        rng.integers(1, 99, size=total).astype(np.int32), rng.integers(2, size=total).astype(np.uint8) if typed else None,
        offsets, np.arange(len(lengths)) * 7 - 3, rng.integers(2, size=len(lengths)), "d", "i", 0,
    )  # fmt: skip


LENGTHS = np.random.default_rng(5).integers(3, 40, size=331)


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_is_a_permutation(epoch):
    order = epoch_order(LENGTHS, 32, 42, epoch)
    assert np.array_equal(np.sort(order), np.arange(len(LENGTHS)))


def test_each_epoch_and_seed_has_its_own_order():
    orders = [epoch_order(LENGTHS, 32, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(epoch_order(LENGTHS, 32, 1, 1), orders[1])


def test_a_file_sorted_by_label_is_shuffled():
    labels = np.repeat([0, 1], 500)
    order = epoch_order(np.full(1000, 10), 20, 0, 0)
    shares = labels[order].reshape(-1, 20).mean(axis=1)
    assert shares.min() > 0 and shares.max() < 1


def test_bucketing_saves_padding():
    lengths = np.random.default_rng(0).integers(5, 100, size=6400)

    def padded(order):
        return sum(32 * lengths[order[i : i + 32]].max() for i in range(0, 6400, 32))

    assert padded(epoch_order(lengths, 32, 0, 0)) < 1.1 * lengths.sum() < padded(np.arange(6400))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", ["auto", 5, 1])
def test_ranks_and_micro_batches_share_the_global_batch(world, micro):
    tokens = token_set(LENGTHS)
    ranks = [TrainingBatches(tokens, 32, micro, 42, rank, world, 0) for rank in range(world)]
    seen = []
    for step in range(ranks[0].steps):
        parts = [batches.step(batches.order(3), step) for batches in ranks]
        assert len({len(part) for part in parts}) == 1, "every rank does as many micro-batches"
        assert len({len(b.rows_B) for part in parts for b in part}) == 1, "of as many rows"
        flat = [b for part in parts for b in part]
        rows = np.concatenate([b.rows_B[b.weight_B.numpy() > 0] for b in flat])
        weights = np.concatenate([b.weight_B.numpy() for b in flat])
        assert weights.sum() == pytest.approx(1.0)
        assert len(np.unique(weights[weights > 0])) == 1
        expected = ranks[0].order(3)[step * 32 : (step + 1) * 32]
        assert np.array_equal(np.sort(rows), np.sort(expected))
        seen.append(rows)
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(len(LENGTHS)))


def test_more_ranks_than_rows_in_the_last_batch():
    tokens = token_set(LENGTHS[:33])
    parts = [TrainingBatches(tokens, 32, "auto", 0, rank, 4, 0) for rank in range(4)]
    last = [batches.step(batches.order(0), 1) for batches in parts]
    assert [sum(float(b.weight_B.sum()) for b in part) for part in last] == [1.0, 0.0, 0.0, 0.0]


def test_micro_batches():
    assert micro_batches(32, 1, "auto") == (32, 1)
    assert micro_batches(256, 1, "auto") == (64, 4)
    assert micro_batches(32, 3, 4) == (4, 3)
    assert micro_batches(4, 8, "auto") == (1, 1)


@pytest.mark.parametrize("typed", [True, False])
def test_collate_equals_a_loop(typed):
    tokens = token_set(LENGTHS, typed)
    rows = np.array([5, 0, 330, 17])
    batch = collate(tokens, rows, np.array([0.5, 0.5, 0.0, 0.0]), pad_id=0)
    for b, row in enumerate(rows):
        start, stop = tokens.offsets_N1[row : row + 2]
        n = stop - start
        assert batch.input_ids_BL[b, :n].tolist() == tokens.input_ids_T[start:stop].tolist()
        assert batch.input_ids_BL[b, n:].eq(0).all()
        assert batch.attention_mask_BL[b].sum() == n and batch.attention_mask_BL[b, :n].all()
        if typed:
            assert batch.type_ids_BL[b, :n].tolist() == tokens.type_ids_T[start:stop].tolist()
    longest = int(tokens.lengths_N[rows].max())
    assert longest <= batch.input_ids_BL.shape[1] < longest + MULTIPLE
    assert batch.input_ids_BL.shape[1] % MULTIPLE == 0
    assert ("token_type_ids" in batch.inputs) == typed
    assert batch.tokens == LENGTHS[[5, 0]].sum()
    assert batch.ids_B.tolist() == [int(tokens.ids_N[r]) for r in rows]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_scoring_covers_each_example_once(world):
    tokens = token_set(LENGTHS)
    rows = [r for rank in range(world) for batch in scoring_batches(tokens, 64, rank, world) for r in batch]
    assert sorted(rows) == list(range(len(LENGTHS)))
