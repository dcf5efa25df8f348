"""Simulate reading a teacher cache of 100 M rows in shuffled order, without the cache.

Two orders of an epoch, as positions in the cache, whose rows are in the order of their ids:

present   `pkd_dist.data.batches.epoch_order`: one permutation of all rows, held in full by every rank.
sharded   whole shards, permuted in each epoch and dealt to `lanes` lanes, `window` shards to each at a time. A lane
          shuffles the rows of its window; position p of the epoch comes from lane p mod lanes. A rank takes every n-th
          row of a batch, as it does now, so if n divides `lanes` it alone reads the shards of lanes r, r+n, ..., and the
          order does not depend on n. Length buckets are made in each lane. Rows left over from a window end the epoch.

For each order: is every row read exactly once, how well is it mixed over two epochs, how do rows and tokens fall on the
ranks, what does computing it cost, and what is read. Writes benchmarks/results/scaling_shuffle.json.
"""

import argparse
import datetime
import json
import resource
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS, read_json
from pkd_dist.data.batches import epoch_order
from pkd_dist.files import write_json

POOL_BATCHES, LENGTH_MULTIPLE = 50, 8
"""As in `pkd_dist/data/batches.py`: batches sorted by length together, and the multiple that lengths are padded to."""


@dataclass(frozen=True)
class Settings:
    """rows: in the cache. batch: global, a multiple of `lanes`. window: shards that a lane holds at a time."""

    rows: int = 100_000_000
    shard_rows: int = 4096
    batch: int = 4096
    lanes: int = 256
    window: int = 4
    seed: int = 42

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)


def make_lengths(rows: int, deciles: list[float], seed: int) -> np.ndarray:
    """Return token lengths, distributed as those of the embedded data."""
    out, rng = np.empty(rows, dtype=np.int64), np.random.default_rng([seed, 2])
    for start in range(0, rows, 1 << 22):
        part = out[start : start + (1 << 22)]
        part[:] = np.interp(rng.random(len(part)), np.linspace(0, 1, len(deciles)), deciles)
    return out


def present_order(s: Settings, lengths_N: np.ndarray, epoch: int) -> Iterator[np.ndarray]:
    """Yield the package's order in pieces of whole batches."""
    order = epoch_order(lengths_N, s.batch, s.seed, epoch)
    for start in range(0, s.rows, 1024 * s.batch):
        yield order[start : start + 1024 * s.batch]


def sharded_order(s: Settings, lengths_N: np.ndarray, epoch: int) -> Iterator[np.ndarray]:
    """Yield the order by whole shards, window by window; only the last piece has a short batch."""
    rng, tail = np.random.default_rng([s.seed, epoch]), []
    shards = rng.permutation(s.shards)
    for start in range(0, s.shards, s.lanes * s.window):
        chosen = shards[start : start + s.lanes * s.window]
        rows = (chosen[:, None] * s.shard_rows + np.arange(s.shard_rows)).reshape(-1)
        rows = rows[rows < s.rows]
        full = len(rows) // s.batch * s.batch
        tail.append(rows[full:].copy())  # a view would keep the window
        lanes_KL = rng.permuted(rows[:full].reshape(s.lanes, -1), axis=1).T  # row k of every lane side by side
        yield _bucketed(lanes_KL, s, lengths_N, rng)
    yield rng.permutation(np.concatenate(tail))


def _bucketed(lanes_KL: np.ndarray, s: Settings, lengths_N: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Sort each lane by length inside pools of batches, then shuffle the batches."""
    out, deep = np.empty(lanes_KL.shape, dtype=np.int64), POOL_BATCHES * (s.batch // s.lanes)
    for start in range(0, len(lanes_KL), deep):
        pool_KL = lanes_KL[start : start + deep]
        by_length_KL = np.argsort(lengths_N[pool_KL], axis=0, kind="stable")
        out[start : start + len(pool_KL)] = np.take_along_axis(pool_KL, by_length_KL, axis=0)
    batches = out.reshape(-1, s.batch)
    return batches[rng.permutation(len(batches))].reshape(-1)


ORDERS = {"present": present_order, "sharded": sharded_order}


def mixing(pieces: Iterable[np.ndarray], s: Settings, first_N: np.ndarray, epoch: int) -> dict[str, float]:
    """Return statistics of one epoch, which docs/scaling.md explains; `expected_in_uniform` has those of a uniform shuffle.

    rank_correlation_* is Spearman's, of the position in the epoch with that in the cache or in epoch 0. `first_N` (int32) is
    filled with the position of every row in epoch 0.
    """
    seen, position, means, shards = np.zeros(s.rows, dtype=bool), 0, [], []
    with_cache = with_first = distance = neighbors = together = 0.0
    for piece in pieces:
        seen[piece] = True
        here, full = np.arange(position, position + len(piece)), len(piece) // s.batch
        batches = piece[: full * s.batch].reshape(full, s.batch)
        with_cache += float(np.square((piece - here).astype(np.float64)).sum())
        if epoch:
            with_first += float(np.square((first_N[piece] - here).astype(np.float64)).sum())
            first = first_N[batches] // s.batch
            together += float((first[:, 1:] == first[:, :-1]).sum())
        else:
            first_N[piece] = here
        means.append(batches.mean(axis=1))
        distance += float(np.abs(np.diff(batches, axis=1)).sum())
        neighbors += full * (s.batch - 1)
        shards += [len(np.unique(batch // s.shard_rows)) for batch in batches[:: max(1, full // 16)]]
        position += len(piece)
    cube = s.rows * (s.rows**2 - 1.0)
    variance = np.square((np.concatenate(means) + 0.5) / s.rows - 0.5).mean()
    out = {
        "every_row_once": float(position == s.rows and seen.all()), "mean_distance": distance / neighbors / s.rows,
        "rank_correlation_with_cache": 1 - 6 * with_cache / cube, "shards_of_batch": float(np.mean(shards)),
        "batch_mean_variance": float(variance * 12 * s.batch),
    }  # fmt: skip
    if epoch:
        out["rank_correlation_of_epochs"] = 1 - 6 * with_first / cube
        out["met_again"] = together / (neighbors * (s.batch - 1) / (s.rows - 1))
    return out


def expected_in_uniform(s: Settings) -> dict[str, float]:
    return {
        "every_row_once": 1.0, "rank_correlation_with_cache": 0.0, "rank_correlation_of_epochs": 0.0,
        "mean_distance": 1 / 3, "batch_mean_variance": 1.0 - s.batch / s.rows, "met_again": 1.0,
        "shards_of_batch": s.shards * (1 - (1 - 1 / s.shards) ** s.batch),
    }  # fmt: skip


def expected_batch_mean_variance(s: Settings) -> float:
    """Return it for the sharded order: a window holds a sample of the shards, a batch equally many rows of each lane."""
    held = min(s.shards, s.lanes * s.window)
    return 1 - s.lanes / held + s.batch / held * (1 - held / s.shards)


def balance(pieces: Iterable[np.ndarray], s: Settings, lengths_N: np.ndarray, ranks: int) -> dict[str, float]:
    """Return how rows, tokens and shards fall on the ranks, each of which takes every `ranks`-th row of a batch.

    padding: tokens computed (the longest of a rank's share, rounded up) over real ones. slowest_rank: computed tokens of
    the fullest rank over the mean, mean over steps. shard_reads: of a rank that keeps all shards of a piece.
    """
    tokens_R, computed, slowest, steps, reads = np.zeros(ranks), 0.0, 0.0, 0, 0
    for piece in pieces:
        full = len(piece) // s.batch
        rows_TBR = piece[: full * s.batch].reshape(full, s.batch // ranks, ranks)
        lengths, shards_TBR = lengths_N[rows_TBR], rows_TBR // s.shard_rows
        tokens_R += lengths.sum(axis=(0, 1))
        longest_TR = -(-lengths.max(axis=1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        computed += float(longest_TR.sum()) * (s.batch // ranks)
        slowest += float((longest_TR.max(axis=1) / longest_TR.mean(axis=1)).sum())
        steps += full
        for r in range(ranks):
            opened = np.zeros(s.shards, dtype=bool)
            opened[shards_TBR[:, :, r]] = True
            reads += int(opened.sum())
    return {
        "padding": computed / float(tokens_R.sum()), "slowest_rank": slowest / steps,
        "tokens_spread": float(tokens_R.max() / tokens_R.min()), "shard_reads": reads,
    }  # fmt: skip


def lru_misses(accesses: Iterable[int], capacity: int) -> Iterator[bool]:
    """Yield whether each access misses an LRU cache of `capacity` blocks; exact."""
    held: OrderedDict[int, None] = OrderedDict()
    for block in accesses:
        yield block not in held
        held[block] = None
        held.move_to_end(block)
        if len(held) > capacity:
            held.popitem(last=False)


def page_cache(rows: int, rows_per_block: int, share_cached: float, nodes: int, seed: int) -> float:
    """Return the blocks that a node reads in its third epoch, per row it uses, with an exact LRU cache of a share."""
    rng, used = np.random.default_rng(seed), rows // nodes
    epochs = [rng.permutation(rows)[:used] // rows_per_block for _ in range(3)]
    missed = list(lru_misses(np.concatenate(epochs).tolist(), max(1, round(share_cached * rows / rows_per_block))))
    return sum(missed[-used:]) / used


def simulate(name: str, s: Settings, deciles: list[float]) -> dict[str, Any]:
    """Simulate two epochs of one order; called in its own process so that its memory can be measured."""
    lengths_N, order = make_lengths(s.rows, deciles, s.seed), ORDERS[name]
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for _ in order(s, lengths_N, 0):
        pass
    used = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    out: dict[str, Any] = {
        "order_processor_seconds": time.process_time() - start, "order_peak_bytes": used, "epochs": [],
    }  # fmt: skip
    first_N = np.zeros(s.rows, dtype=np.int32)
    for epoch in (0, 1):
        pieces = list(order(s, lengths_N, epoch))
        out["epochs"].append(mixing(pieces, s, first_N, epoch))
        if epoch == 0:
            out["ranks"] = {str(n): balance(pieces, s, lengths_N, n) for n in (8, 64, 256)}
        del pieces
    return out


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling.shuffle", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=Settings.rows, help="of the cache (default: 100 million)")
    parser.add_argument("--output", type=Path, default=RESULTS / "scaling_shuffle.json")
    options = parser.parse_args()
    s, start = Settings(rows=options.rows), time.perf_counter()
    deciles = read_json(RESULTS / "scaling_constants.json")["teacher"]["length_deciles"]
    result: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "settings": asdict(s) | {"shards": s.shards},
        "uniform": expected_in_uniform(s), "expected_batch_mean_variance": expected_batch_mean_variance(s),
    }  # fmt: skip
    for name in ORDERS:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            result[name] = pool.submit(simulate, name, s, deciles).result()
        print(name, json.dumps(result[name]), flush=True)
    result["page_cache"] = [
        {"rows_per_block": k, "nodes": nodes, "share_cached": share,
         "blocks_per_row": page_cache(240_000, k, share, nodes, 0)}
        for k in (1, 40) for nodes in (1, 4) for share in (0.1, 0.25, 0.5, 0.75, 1.0)
    ]  # fmt: skip
    write_json(options.output, result | {"wall_seconds": time.perf_counter() - start})
    print(f"{options.output}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
