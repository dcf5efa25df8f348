"""Tables and plots of docs/scaling.md.

python -m benchmarks.scaling.report            writes the tables between their markers, and the plots
python -m benchmarks.scaling.report --check    exits with 1 where a table is not what the model gives now
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.scaling.model import (
    H100_ASSUMED,
    KINDS,
    PRECISIONS,
    Counts,
    Link,
    Machine,
    activation_bytes,
    bert,
    cache_row_bytes,
    efficiency,
    h100,
    minilm,
    step_seconds,
    step_wire_bytes,
    teacher_seconds_per_row,
    wire_bytes,
    zero_memory,
    zero_messages,
)
from benchmarks.scaling.shuffle import ORDERS, Settings

ROOT = Path(__file__).parents[2]
RESULTS, DOCUMENT = ROOT / "benchmarks" / "results", ROOT / "docs" / "scaling.md"
RANKS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
LENGTH = 32
"""Tokens of a row after padding, all over; the embedded data's mean is 27."""
ROWS_TOTAL = 100_000_000
TEACHER, PAIRS, HIDDEN, CLASSES, SHARD_ROWS = bert(12), 2, 768, 2, 4096
"""The case of the cache: BERT-base teacher, 3-layer student (2 pairs), two classes."""


@cache
def constants() -> dict[str, Any]:
    return json.loads((RESULTS / "scaling_constants.json").read_text())


@cache
def simulation() -> dict[str, Any]:
    return json.loads((RESULTS / "scaling_shuffle.json").read_text())


@cache
def counts() -> Counts:
    """Forward and backward from `counts`; the engine: what steps at 1 and 2 ranks were counted to touch beyond that."""
    plain, p = constants()["counts"], minilm(3).parameters
    once = [[steps(f"zero{stage}", n)[0] for n in (1, 2)] for stage in range(4)]
    per_token = 384 * (2 * plain["traffic_per_layer"] + plain["traffic_rest"])
    extra = [
        [(s["traffic_bytes"] - s["rows"] * LENGTH * per_token) / p - plain["traffic_per_parameter"] for s in pair]
        for pair in once
    ]
    return Counts(
        **{f.name: plain[f.name] for f in fields(Counts) if f.name in plain and f.name != "operations"},
        engine_whole=tuple(2 * two - one for one, two in extra),
        engine_shard=tuple(2 * (one - two) for one, two in extra),
        operations=tuple(float(two["operations"]) for _, two in once),
    )


def steps(config: str, ranks: int, layers: int = 3, accumulation: int = 1) -> list[dict[str, Any]]:
    """The measured steps of these settings."""
    wanted = {"config": config, "ranks": ranks, "layers": layers, "accumulation": accumulation}
    return [step for step in constants()["steps"] + constants()["counted"] if wanted.items() <= step.items()]


def this_machine(ranks: int) -> Machine:
    """One core a rank; gloo's latency from its smallest message, its bandwidth from its largest."""
    measured = constants()
    links = {}
    for kind in KINDS:
        rows = [r for r in measured["collectives"][f"{max(2, ranks)} ranks"] if r["kind"] == kind]
        hops = (2 if kind == "all_reduce" else 1) * (max(2, ranks) - 1)
        latency, large = rows[0]["seconds"] / hops, rows[-1]
        sent = wire_bytes(kind, large["payload_bytes"], max(2, ranks))
        links[kind] = Link(latency, sent / (large["seconds"] - rows[0]["seconds"]))
    m = measured["machine"]
    return Machine(
        "this machine, one core a rank", m["product_flops_per_second"]["bfloat16"], m["memory_bytes_per_second"],
        m["operation_seconds"], 0.0, False, 1024, links, links,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- format


def number(value: float) -> str:
    """Three significant digits."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def milli(seconds: float) -> str:
    return number(seconds * 1e3)


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [list(map(str, head))]
    lines += [[x if isinstance(x, str) else number(x) for x in row] for row in rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -------------------------------------------------------------------------------------------------------------- tables


def assumed() -> str:
    head = ("constant", "value", "unit", "from")
    return table(head, [(f"`{k}`", f"{a.value:g}", a.unit, a.source) for k, a in H100_ASSUMED.items()])


def measured() -> str:
    c = constants()
    m, gloo, disk, host, teacher = c["machine"], this_machine(2).inside, c["storage"], c["host"], c["teacher"]
    products = [f"{number(v / 1e9)} {k}" for k, v in m["product_flops_per_second"].items()]

    def pair(a: float, b: float) -> str:
        return f"{number(a)}; {number(b)}"

    def cold(name: str) -> str:
        return pair(disk[name]["rows_per_second"], disk[name]["device_bytes_per_byte_wanted"])

    rows = [
        ("machine", f"{m['processor']}, {m['cores']} cores, {m['memory_bytes'] / 2**30:.0f} GiB; {m['date']}"),
        ("product 1024 x 384 x 1536, one core, GFLOP/s", "; ".join(products)),
        ("memory, one core, GB/s", m["memory_bytes_per_second"] / 1e9),
        ("start of an operation, us", m["operation_seconds"] * 1e6),
        *(
            (f"gloo {k}, 2 ranks: latency, us; sent by a rank, GB/s",
             pair(gloo[k].latency_seconds * 1e6, gloo[k].bytes_per_second / 1e9))
            for k in KINDS
        ),
        ("cold file in order; cold shards at random, MB/s",
         pair(*(disk[k]["bytes_per_second"] / 1e6 for k in ("in_order", "random_shards")))),
        ("cold rows of 3 KiB at random by memory map: rows/s; bytes read per byte wanted", cold("random_rows")),
        ("the same with MADV_RANDOM", cold("random_rows_without_read_ahead")),
        ("`CacheReader.rows_of`, all in memory, 64 rows of 64 shards; of one shard: rows/s",
         pair(*(host["rows_of"][f"64 rows, {k}"] for k in ("scattered", "adjacent")))),
        ("files open; memory maps, for each shard of a reader",
         pair(host["open_files_per_shard"], host["mappings_per_shard"])),
        ("`collate`, rows/s", host["collate_rows_per_second"]),
        ("read; tokenise, rows/s", pair(teacher["read_rows_per_second"], teacher["tokenize_rows_per_second"])),
        ("`build` with a 6-layer MiniLM; with a teacher that answers at once: rows/s",
         pair(teacher["build_minilm_rows_per_second"], teacher["build_stub_rows_per_second"])),
    ]  # fmt: skip
    return table(("measured here, of one core", "value"), rows)


def check_memory() -> str:
    rows = []
    for config, ranks in [
        (f"zero{s}{p}", n) for p, ns in (("", (1, 2, 4)), ("_bf16", (2,))) for s in range(4) for n in ns
    ]:
        got, stage = steps(config, ranks)[0], int(config[4])
        precision = "bf16" if "bf16" in config else "autocast"
        model = zero_memory(minilm(3).parameters, stage, precision, ranks)
        expected = model.total - model.bucket
        rows.append(
            (f"`{config}`", str(ranks), expected / 1e6, got["backward_bytes"] / 1e6, expected / got["backward_bytes"],
             model.bucket / 1e9, got["bucket_bytes"] / 1e9)
        )  # fmt: skip
    head = ("config", "ranks", "predicted, MB", "counted, MB", "ratio", "bucket predicted, GB", "bucket counted, GB")
    return table(head, rows)


def check_bytes() -> str:
    names = {"allreduce": "all_reduce", "allgather_base": "all_gather", "reduce_scatter_base": "reduce_scatter"}
    rows = []
    for config, layers, accumulation in [
        *((f"zero{s}", 3, 1) for s in range(4)), *((f"zero{s}", 3, 2) for s in range(4)),
        *((f"zero{s}_bf16", 3, 1) for s in range(4)), ("zero3", 6, 1),
    ]:  # fmt: skip
        got = steps(config, 2, layers, accumulation)[0]
        precision = "bf16" if "bf16" in config else "autocast"
        expected = step_wire_bytes(minilm(layers), int(config[4]), precision, 2, accumulation)
        counted = sum(wire_bytes(names[k], v, 2) for k, v in got["payload_bytes"].items())
        calls = sum(m.calls for m in zero_messages(int(config[4]), layers, accumulation))
        rows.append(
            (f"`{config}`", str(layers), str(accumulation), expected / 1e6, counted / 1e6, expected / counted,
             f"{calls} / {sum(got['collectives'].values())}")
        )  # fmt: skip
    head = ("config", "layers", "micro-batches", "predicted, MB", "counted, MB", "ratio", "calls predicted / counted")
    return table(head, rows)


def check_seconds() -> str:
    rows = []
    for ranks in (1, 2):
        for stage in range(4):
            got = steps(f"zero{stage}", ranks)[0]
            step = step_seconds(minilm(3), got["rows"], LENGTH, stage, "autocast", ranks, this_machine(ranks), counts())
            parts = (step.host, step.products, step.traffic, step.optimizer, step.communication)
            took = got["processor_seconds"], got["wall_seconds"]
            rows.append(
                (f"`zero{stage}`", str(ranks), *map(milli, (*parts, step.total, took[0])), step.total / took[0],
                 milli(took[1]), step.total / took[1])
            )  # fmt: skip
    head = (
        "config", "ranks", "host", "products", "other operations", "optimizer", "messages", "predicted, sum",
        "processor, measured", "ratio", "wall, measured", "ratio",
    )  # fmt: skip
    return table(head, rows)


def memory() -> str:
    rows = []
    for layers in (3, 6, 12):
        for precision in PRECISIONS:
            for stage in range(4):
                cells = [zero_memory(bert(layers).parameters, stage, precision, n) for n in (1, 8, 256)]
                rows.append(
                    (
                        f"{layers}",
                        precision,
                        str(stage),
                        *((c.total - c.bucket) / 1e9 for c in cells),
                        cells[0].bucket / 1e9,
                    )
                )
    head = ("layers", "precision", "ZeRO", "1 GPU", "8", "256", "and the bucket")
    return table(head, rows)


def activations() -> str:
    rows = [
        (str(layers), *(activation_bytes(bert(layers), n * LENGTH, counts()) / 1e9 for n in (64, 512, 4096)))
        for layers in (3, 6, 12)
    ]
    return table(("layers", "64 rows", "512 rows", "4,096 rows"), rows)


def wire() -> str:
    rows = []
    for layers in (3, 6, 12):
        for stage in range(4):
            cases = (
                ("autocast", 2, 1),
                ("autocast", 8, 1),
                ("autocast", 256, 1),
                ("autocast", 256, 4),
                ("bf16", 256, 1),
            )
            cells = [step_wire_bytes(bert(layers), stage, p, n, a) / 1e6 for p, n, a in cases]
            rows.append((str(layers), str(stage), *cells))
    head = ("layers", "ZeRO", "2 GPUs", "8", "256", "256, 4 micro-batches", "256, bf16")
    return table(head, rows)


def seconds(rows_per_gpu: int) -> str:
    rows = []
    for layers in (3, 6, 12):
        for stage in range(4):
            cells = [
                step_seconds(bert(layers), rows_per_gpu, LENGTH, stage, "autocast", n, h100(), counts()) for n in RANKS
            ]
            rows.append(
                (
                    str(layers),
                    str(stage),
                    *(milli(c.total) for c in cells),
                    f"{cells[0].dominant} / {cells[-1].dominant}",
                )
            )
    return table(("layers", "ZeRO", *map(str, RANKS), "dominates at 1 / 256"), rows)


def limits() -> str:
    """The largest number of GPUs at which 80% (50%) of a GPU's speed alone are kept, by global batch."""
    rows = []
    for layers in (3, 6, 12):
        for batch in (64, 512, 4096, 32768, 262144):
            cells = []
            for most in (64, 4096):
                for stage in (0, 1, 3):
                    kept = {
                        n: efficiency(bert(layers), batch, LENGTH, stage, n, h100(), counts(), most)
                        for n in RANKS
                        if n <= batch
                    }
                    cells.append(" / ".join(str(max(n for n, e in kept.items() if e >= least)) for least in (0.8, 0.5)))
            rows.append((str(layers), f"{batch:,}", *cells))
    head = ("layers", "global batch", *(f"ZeRO {s}, micro {m}" for m in ("64", "4,096") for s in (0, 1, 3)))
    return table(head, rows)


def throughput(layers: int, rows_per_gpu: int, ranks: int) -> float:
    """Rows per second of one GPU."""
    return rows_per_gpu / step_seconds(bert(layers), rows_per_gpu, LENGTH, 0, "autocast", ranks, h100(), counts()).total


def cache_size() -> str:
    mean, rows = constants()["teacher"]["mean_length"], []
    for name, pairs, tokens in (
        ("cls, 3-layer student", 2, None),
        ("cls, 6-layer student", 5, None),
        ("tokens, 3-layer", 2, mean),
    ):
        row = cache_row_bytes(pairs, HIDDEN, CLASSES, 2, tokens)
        shards = -(-ROWS_TOTAL // SHARD_ROWS)
        need = [throughput(3 if pairs == 2 else 6, r, 8) * 8 * row / 1e9 for r in (64, 4096)]
        rows.append((name, row, row * ROWS_TOTAL / 1e12, f"{shards:,}", row * SHARD_ROWS / 1e6, *need))
    head = (
        "states",
        "bytes a row",
        "TB",
        "shards of 4,096 rows",
        "MB a shard",
        "GB/s a node needs, micro 64",
        "micro 4,096",
    )
    return table(head, rows)


def build_time() -> str:
    t = constants()["teacher"]
    rate = constants()["machine"]["product_flops_per_second"]["bfloat16"]
    predicted = rate / t["teacher_forward_flops_per_row"]
    built = t["build_minilm_rows_per_second"]
    device = 1 / teacher_seconds_per_row(TEACHER, LENGTH, h100())
    host = t["build_stub_rows_per_second"]
    each = min(device, host)
    rows = [
        ("6-layer MiniLM, a core of this machine: rows/s predicted by products alone; measured; ratio",
         f"{number(predicted)}; {number(built)}; {number(predicted / built)}"),
        ("BERT-base, H100 (assumed): rows/s by products alone", device),
        ("host's part of `build` at BERT-base's width: rows/s of a rank, measured on this processor", host),
        ("100 M rows on 8 / 64 / 256 H100 by the smaller of the two, minutes",
         " / ".join(number(ROWS_TOTAL / each / n / 60) for n in (8, 64, 256))),
        ("100 M rows read and tokenised by one process, processor hours",
         ROWS_TOTAL * (1 / t["read_rows_per_second"] + 1 / t["tokenize_rows_per_second"]) / 3600),
    ]  # fmt: skip
    return table(("building the cache", ""), rows)


def mixing() -> str:
    sim, names = simulation(), simulation()["uniform"]
    shown = {
        "every_row_once": "every row exactly once (1: yes)",
        "rank_correlation_with_cache": "rank correlation of the order with the cache",
        "rank_correlation_of_epochs": "rank correlation of two epochs' orders",
        "mean_distance": "distance in the cache of neighbours in a batch, share of it",
        "shards_of_batch": "different shards in a batch",
        "met_again": "neighbours that shared a batch in the epoch before, over chance",
        "batch_mean_variance": "variance of a batch's mean of a label sorted along the cache, over chance",
    }
    rows = [(text, names[k], *(sim[o]["epochs"][1][k] for o in ORDERS)) for k, text in shown.items()]
    return table(("two epochs of 100 M rows, batches of 4,096", "uniform", *ORDERS), rows)


def reading() -> str:
    sim = simulation()
    shard = cache_row_bytes(PAIRS, HIDDEN, CLASSES) * SHARD_ROWS
    s = Settings(**{k: v for k, v in sim["settings"].items() if k != "shards"})
    rows: list[tuple[Any, ...]] = [
        ("processor seconds to make an order, one rank", *(sim[o]["order_processor_seconds"] for o in ORDERS)),
        ("memory while making it, GB a rank", *(sim[o]["order_peak_bytes"] / 1e9 for o in ORDERS)),
    ]
    for n in ("8", "64", "256"):
        rows += [
            (
                f"{n} ranks: shards opened by all ranks, each kept for 1,024 batches",
                *(f"{sim[o]['ranks'][n]['shard_reads']:,}" for o in ORDERS),
            ),
            (f"{n} ranks: computed tokens over real ones", *(sim[o]["ranks"][n]["padding"] for o in ORDERS)),
            (f"{n} ranks: fullest rank of a step over the mean", *(sim[o]["ranks"][n]["slowest_rank"] for o in ORDERS)),
            (
                f"{n} ranks: most over least tokens in an epoch",
                *(f"{sim[o]['ranks'][n]['tokens_spread']:.4f}" for o in ORDERS),
            ),
        ]
        held = s.lanes / int(n) * s.window * shard / 1e9
        rows.append((f"{n} ranks: shards held by a rank, GB", "all, by page cache", number(held)))
    return table(("", *ORDERS), rows)


def storage() -> str:
    """Reads of one node in an epoch, after two epochs."""
    touched = constants()["storage"]["random_rows_without_read_ahead"]["device_bytes_per_byte_wanted"]
    row = cache_row_bytes(PAIRS, HIDDEN, CLASSES)
    total = row * ROWS_TOTAL
    rows = []
    for nodes in (1, 4):
        for share in (0.1, 0.25, 0.5, 0.75, 1.0):
            page, around = (
                next(p["blocks_per_row"] for p in simulation()["page_cache"]
                     if (p["rows_per_block"], p["nodes"], p["share_cached"]) == (k, nodes, share))
                for k in (1, 40)
            )  # fmt: skip
            used = ROWS_TOTAL / nodes
            shards = page * -(-ROWS_TOTAL // SHARD_ROWS) / nodes  # their order is a permutation too
            rows.append(
                (str(nodes), f"{share:.0%} ({number(share * total / 1e9)} GB)", page * used / 1e6,
                 page * used * row * touched / 1e12, around * used * 40 * row / 1e12,
                 page * used / H100_ASSUMED["random_reads_per_second"].value / 60, f"{shards:,.0f}",
                 shards * row * SHARD_ROWS / 1e12,
                 shards * row * SHARD_ROWS / H100_ASSUMED["storage_bytes_per_second"].value / 60)
            )  # fmt: skip
    head = (
        "nodes", "page cache of a node", "present: random reads, M", "TB with MADV_RANDOM",
        "TB with read-around of 128 KiB", "minutes, assumed rate", "sharded: reads", "TB", "minutes, assumed rate",
    )  # fmt: skip
    return table(head, rows)


def epoch_minutes() -> str:
    rows = []
    for nodes in (1, 4, 8, 32):
        n = nodes * 8
        cells = [ROWS_TOTAL / (throughput(3, r, n) * n) / 60 for r in (64, 4096)]
        host = ROWS_TOTAL / (constants()["host"]["rows_of"]["64 rows, scattered"] * n) / 60
        reads = ROWS_TOTAL / nodes / H100_ASSUMED["random_reads_per_second"].value / 60
        rows.append((str(n), *cells, host, reads))
    head = (
        "GPUs", "GPU, micro 64", "GPU, micro 4,096", "`rows_of`, a thread a rank (measured here)",
        "random reads, nothing cached (assumed rate)",
    )  # fmt: skip
    return table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "assumed": assumed, "measured": measured, "check-memory": check_memory, "check-bytes": check_bytes,
    "check-seconds": check_seconds, "memory": memory, "activations": activations, "wire": wire,
    "seconds-64": lambda: seconds(64), "seconds-4096": lambda: seconds(4096), "limits": limits,
    "cache-size": cache_size, "build-time": build_time, "epoch": epoch_minutes,
    "mixing": mixing, "reading": reading, "storage": storage,
}  # fmt: skip


def filled(document: str) -> str:
    """The document with every table made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", fill, document, flags=re.DOTALL)


# --------------------------------------------------------------------------------------------------------------- plots


def plot_steps(path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(11, 6), sharex=True, sharey="row", constrained_layout=True)
    for across, stage in enumerate((0, 1, 3)):
        for down, rows in enumerate((64, 4096)):
            axis, x = axes[down][across], range(len(RANKS))
            made = [step_seconds(bert(3), rows, LENGTH, stage, "autocast", n, h100(), counts()) for n in RANKS]
            bottom = [0.0] * len(RANKS)
            for name, colour in (("compute", "#4c72b0"), ("optimizer", "#dd8452"), ("communication", "#c44e52")):
                height = [getattr(step, name) * 1e3 for step in made]
                label = "optimizer, DeepSpeed's copies" if name == "optimizer" else name
                axis.bar(x, height, bottom=bottom, label=label, color=colour)
                bottom = [b + h for b, h in zip(bottom, height, strict=True)]
            axis.set_xticks(list(x), [str(n) for n in RANKS])
            bound = "host" if made[0].host > made[0].products + made[0].traffic else "GPU"
            axis.set_title(f"ZeRO {stage}, {rows:,} rows per GPU ({bound}-bound)", fontsize=9)
    axes[0][0].legend(fontsize=8, loc="upper left")
    for axis in axes[:, 0]:
        axis.set_ylabel("ms per step")
    for axis in axes[1]:
        axis.set_xlabel("GPUs")
    figure.suptitle(
        "3-layer student of BERT-base's width, 32 tokens a row; H100 constants assumed, not measured", fontsize=10
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_scaling(path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.5), constrained_layout=True)
    for batch, colour in ((512, "#8172b3"), (4096, "#4c72b0"), (32768, "#55a868"), (262144, "#c44e52")):
        ranks = [n for n in RANKS if n <= batch]
        for most, style in ((64, ":"), (4096, "-")):
            share = [efficiency(bert(3), batch, LENGTH, 0, n, h100(), counts(), most) * 100 for n in ranks]
            left.plot(
                ranks, share, style, color=colour, label=f"batch {batch:,}, micro-batch {most:,} at most", marker="."
            )
    left.set(xscale="log", xlabel="GPUs", ylabel="% of linear speed-up", ylim=(0, 105))
    left.set_title("3-layer student, ZeRO 0 (assumed H100)", fontsize=10)
    left.set_xticks(RANKS, [str(n) for n in RANKS])
    left.minorticks_off()
    left.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    for stage, colour in enumerate(("#4c72b0", "#dd8452", "#55a868", "#c44e52")):
        kept = [zero_memory(bert(3).parameters, stage, "autocast", n) for n in RANKS]
        right.plot(RANKS, [(m.total - m.bucket) / 1e9 for m in kept], color=colour, label=f"ZeRO {stage}", marker=".")
        if stage > 1:
            right.plot(RANKS, [m.total / 1e9 for m in kept], "--", color=colour, label=f"ZeRO {stage} and its bucket")
    right.set(xscale="log", xlabel="GPUs", ylabel="GB per GPU, activations left out", ylim=(0, 3.2))
    right.set_title("3-layer student: weights, gradients, optimizer", fontsize=10)
    right.set_xticks(RANKS, [str(n) for n in RANKS])
    right.minorticks_off()
    right.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a table is out of date")
    before = DOCUMENT.read_text()
    after = filled(before)
    if parser.parse_args().check:
        return int(before != after)
    import matplotlib

    matplotlib.use("Agg")
    plot_steps(DOCUMENT.with_name("scaling-steps.png"))
    plot_scaling(DOCUMENT.with_name("scaling-limits.png"))
    DOCUMENT.write_text(after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
