"""What a training step costs: memory per rank, bytes on the wire, seconds. Pure functions of a few constants.

    seconds of a step = max(host, products + traffic) * micro-batches + optimizer + communication      on a GPU
                        (host + products + traffic) * micro-batches + optimizer + communication        on a CPU

host: kernels started one after the other; products: matrix products at a share of the peak; traffic: bytes that all
other operations read and write. Messages are not overlapped with backward: DeepSpeed does so by default at stage 3
alone, and there the model stays on the safe side. Collectives follow the alpha-beta model (Thakur, Rabenseifner and
Gropp 2005), over nodes in two levels: reduce-scatter inside a node, all-reduce of each rank's share between nodes,
all-gather inside.

What a ZeRO stage keeps and sends is what DeepSpeed 0.19 was counted to do under this project's engine, not what the
ZeRO paper (Rajbhandari et al. 2020) has it do; where they differ stands at `zero_messages`.

Symbols: P parameters, n ranks, L tokens of a row, w bytes of a weight. Units stand in the names; GB = 1e9 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A BERT classifier; by default its last layer computes its output for the first token alone
    (`pkd_dist/model/first_token.py`)."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int = 30522
    positions: int = 512
    token_types: int = 2
    classes: int = 2

    @property
    def layer_parameters(self) -> int:
        h, i = self.hidden, self.intermediate
        return 4 * (h * h + h) + 2 * h * i + i + h + 4 * h

    @property
    def parameters(self) -> int:
        h = self.hidden
        embeddings = (self.vocabulary + self.positions + self.token_types) * h + 2 * h
        return embeddings + self.layers * self.layer_parameters + h * h + h + h * self.classes + self.classes

    def forward_flops(self, rows: int, length: int, lean: bool = True) -> float:
        """Matrix products of a forward pass: 2 per multiply-add.

        Args:
            lean: the last layer for the first token alone; else every layer for all tokens.
        """
        h, i = self.hidden, self.intermediate
        full = rows * length * (8 * h * h + 4 * h * i + 4 * length * h)
        if not lean:
            return self.layers * full + rows * 2 * h * (h + self.classes)
        first_token_alone = rows * (8 * h * h + 4 * h * i + 4 * self.heads * length * h)
        return (self.layers - 1) * full + first_token_alone + rows * 2 * h * (h + self.classes)


def bert(layers: int) -> Shape:
    """BERT-base's width."""
    return Shape(layers, 768, 3072, 12)


def minilm(layers: int) -> Shape:
    return Shape(layers, 384, 1536, 12)


# ------------------------------------------------------------------------------------------------------------ machines


@dataclass(frozen=True)
class Link:
    """latency_seconds: of one hop; bytes_per_second: that one rank sends, the other direction being used as well."""

    latency_seconds: float
    bytes_per_second: float


Links = Mapping[str, Link]
"""By kind of collective: `all_reduce`, `all_gather`, `reduce_scatter`."""

KINDS = ("all_reduce", "all_gather", "reduce_scatter")


@dataclass(frozen=True)
class Machine:
    """Constants of one kind of rank and of the links between them; achieved values, not peaks.

    Attributes:
        flops_per_second: of the matrix products of one rank.
        memory_bytes_per_second: reads and writes together.
        operation_seconds: the host's time to start one operation.
        call_seconds: of a collective, beside its hops.
        asynchronous: whether the host runs ahead of the device.
    """

    name: str
    flops_per_second: float
    memory_bytes_per_second: float
    operation_seconds: float
    call_seconds: float
    asynchronous: bool
    ranks_per_node: int
    inside: Links
    between: Links


@dataclass(frozen=True)
class Assumed:
    """A constant that nothing here could measure."""

    value: float
    unit: str
    source: str


H100_ASSUMED = {
    "peak_flops_per_second": Assumed(989e12, "FLOP/s", "H100 SXM data sheet, bfloat16, dense"),
    "product_share": Assumed(0.5, "of peak", "our guess for products this small; large ones reach 0.6 to 0.7"),
    "memory_bytes_per_second": Assumed(3.35e12, "B/s", "H100 SXM data sheet, HBM3"),
    "memory_share": Assumed(0.8, "of peak", "our guess"),
    "operation_seconds": Assumed(7e-6, "s", "our guess for eager PyTorch with autograd and autocast: 5 to 10 us"),
    "inside_bytes_per_second": Assumed(450e9, "B/s", "H100 SXM data sheet: NVLink 900 GB/s, both directions together"),
    "between_bytes_per_second": Assumed(50e9, "B/s", "one ConnectX-7 at 400 Gb/s for each GPU (DGX H100 user guide)"),
    "link_share": Assumed(0.8, "of peak", "our guess for large NCCL messages"),
    "call_seconds": Assumed(8.4e-6, "s", "a call in NCCL's tuning table (ring, Simple)"),
    "inside_latency_seconds": Assumed(3.4e-6, "s", "a hop in NCCL's tuning table (ring, Simple, NVLink)"),
    "between_latency_seconds": Assumed(14e-6, "s", "a hop in NCCL's tuning table (ring, Simple, network)"),
    "ranks_per_node": Assumed(8, "GPUs", "DGX H100"),
    "device_bytes": Assumed(80e9, "B", "H100 SXM data sheet"),
    "storage_bytes_per_second": Assumed(
        5e9, "B/s per node", "our guess for whole shards from NVMe or a parallel file system"
    ),
    "random_reads_per_second": Assumed(
        50e3, "1/s per node", "our guess for a parallel file system; local NVMe has 10 times"
    ),
}
"""Every constant of a GPU cluster. None was measured here."""


def h100(overrides: dict[str, float] | None = None) -> Machine:
    """The assumed cluster: nodes of 8 H100."""
    a = {name: constant.value for name, constant in H100_ASSUMED.items()} | (overrides or {})
    return Machine(
        "H100 (assumed)",
        a["peak_flops_per_second"] * a["product_share"],
        a["memory_bytes_per_second"] * a["memory_share"],
        a["operation_seconds"],
        a["call_seconds"],
        True,
        int(a["ranks_per_node"]),
        dict.fromkeys(KINDS, Link(a["inside_latency_seconds"], a["inside_bytes_per_second"] * a["link_share"])),
        dict.fromkeys(KINDS, Link(a["between_latency_seconds"], a["between_bytes_per_second"] * a["link_share"])),
    )


# --------------------------------------------------------------------------------------------------------- collectives


def wire_bytes(kind: str, payload_bytes: float, ranks: int) -> float:
    """Bytes that one rank sends in a bandwidth-optimal collective of a whole tensor of `payload_bytes`."""
    share = (ranks - 1) / ranks * payload_bytes
    return 2 * share if kind == "all_reduce" else share


def flat_seconds(kind: str, payload_bytes: float, ranks: int, link: Link) -> float:
    """One collective over one kind of link: ring, or for an all-reduce a tree where that is faster."""
    if ranks == 1:
        return 0.0
    hops = (2 if kind == "all_reduce" else 1) * (ranks - 1)
    ring = hops * link.latency_seconds + wire_bytes(kind, payload_bytes, ranks) / link.bytes_per_second
    if kind != "all_reduce":
        return ring
    tree = 2 * math.ceil(math.log2(ranks)) * link.latency_seconds + 2 * payload_bytes / link.bytes_per_second
    return min(ring, tree)


def collective_seconds(kind: str, payload_bytes: float, ranks: int, machine: Machine) -> float:
    """One collective over all ranks; `payload_bytes` of the whole tensor."""
    if ranks == 1:
        return 0.0
    inside, nodes = min(ranks, machine.ranks_per_node), math.ceil(ranks / machine.ranks_per_node)
    if nodes == 1:
        return machine.call_seconds + flat_seconds(kind, payload_bytes, ranks, machine.inside[kind])
    within = flat_seconds(
        "all_gather", payload_bytes, inside, machine.inside["all_gather"]
    )  # as long as a reduce-scatter
    across = flat_seconds(kind, payload_bytes / inside, nodes, machine.between[kind])
    return machine.call_seconds + (2 * within if kind == "all_reduce" else within) + across


# ---------------------------------------------------------------------------------------------------------- ZeRO stages

PRECISIONS = {"autocast": (4, 4), "bf16": (2, 2)}
"""Bytes of a weight, of a gradient. autocast: float32 weights, 16-bit products (zeroN.json); bf16: zeroN_bf16.json."""

BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`; no file of ds_configs/ sets it."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `gradients` at the end of backward; `bucket`: what DeepSpeed reserves to reduce them in."""

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    bucket: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.gathered + self.bucket


def zero_memory(parameters: int, stage: int, precision: str, ranks: int, bucket: int = BUCKET_ELEMENTS) -> Memory:
    """Memory of a rank at the end of backward, activations left out.

    The optimizer holds 8 bytes of Adam's moments and, but for stage 0 under autocast, a float32 copy of its share of
    the weights. A model below the bucket's size is reduced once, at the end of backward: until then stage 1 holds whole
    gradients, and stages 2 and 3 hold them in the bucket, which is reserved whole. Stage 3 keeps a gathered weight
    until its last use, since a small model is below `stage3_max_live_parameters`.
    """
    weight, gradient = PRECISIONS[precision]
    shard = parameters / ranks
    optimizer = 8 if stage == 0 and precision == "autocast" else 12
    return Memory(
        weights=weight * (shard if stage == 3 else parameters),
        gradients=gradient * (parameters if stage < 2 else shard),
        optimizer=optimizer * (parameters if stage == 0 else shard),
        gathered=weight * parameters if stage == 3 and ranks > 1 else 0,
        bucket=gradient * bucket if stage >= 2 else 0,
    )


@dataclass(frozen=True)
class Messages:
    """Collectives of a step: `calls` of `kind`, together of `whole_models` times the bytes of all weights."""

    kind: str
    whole_models: float
    calls: int


def zero_messages(stage: int, layers: int, micro_batches: int) -> list[Messages]:
    """What a step sends.

    Counted where the paper has other: stages 1 and 2 all-reduce whole gradients and then gather the weights, 3 times
    (n-1)/n of the model where the paper has 2; stage 3 gathers the model once in a micro-batch, in one call, not twice,
    and after the step, one by one, each parameter below `stage3_param_persistence_threshold`: biases, LayerNorms.
    """
    if stage == 0:
        return [Messages("all_reduce", 1, 1)]
    if stage < 3:
        times = micro_batches if stage == 2 else 1
        return [Messages("all_reduce", times, times), Messages("all_gather", 1, 2)]
    return [
        Messages("all_gather", micro_batches, micro_batches),
        Messages("all_gather", 0, 10 * layers + 6),
        Messages("reduce_scatter", micro_batches, micro_batches),
    ]


def step_wire_bytes(shape: Shape, stage: int, precision: str, ranks: int, micro_batches: int = 1) -> float:
    """Bytes that one rank sends in one optimizer step."""
    whole = PRECISIONS[precision][1] * shape.parameters
    return sum(
        wire_bytes(m.kind, m.whole_models * whole, ranks) for m in zero_messages(stage, shape.layers, micro_batches)
    )


def communication_seconds(
    shape: Shape, stage: int, precision: str, ranks: int, machine: Machine, micro_batches: int = 1
) -> float:
    whole = PRECISIONS[precision][1] * shape.parameters
    return sum(
        m.calls * collective_seconds(m.kind, m.whole_models * whole / m.calls, ranks, machine)
        for m in zero_messages(stage, shape.layers, micro_batches)
    )


# ----------------------------------------------------------------------------------------------------------- a step


@dataclass(frozen=True)
class Counts:
    """What a micro-batch does beside its products; counted (`counting.py`), not timed.

    Attributes:
        traffic_per_layer: bytes that a full layer's other operations touch, per token and unit of hidden size.
        traffic_rest: the same of everything outside the full layers.
        traffic_per_parameter: bytes per parameter whatever the batch: casts, gradients of embeddings.
        saved_per_layer, saved_rest: bytes kept for backward, per token and unit of hidden size.
        engine_whole, engine_shard: bytes that DeepSpeed's copies, the norm and clipping touch in a step, per parameter
            of the model and of the shard, by ZeRO stage.
        operations: started in a step of a 3-layer model, by ZeRO stage; operations_per_layer: of each further layer.
    """

    traffic_per_layer: float
    traffic_rest: float
    traffic_per_parameter: float
    saved_per_layer: float
    saved_rest: float
    engine_whole: tuple[float, ...]
    engine_shard: tuple[float, ...]
    operations: tuple[float, ...]
    operations_per_layer: float


def activation_bytes(shape: Shape, tokens: int, counts: Counts) -> float:
    return tokens * shape.hidden * (counts.saved_per_layer * (shape.layers - 1) + counts.saved_rest)


@dataclass(frozen=True)
class StepSeconds:
    """Where the time of one optimizer step goes."""

    host: float
    products: float
    traffic: float
    optimizer: float
    communication: float
    asynchronous: bool

    @property
    def compute(self) -> float:
        device = self.products + self.traffic
        return max(self.host, device) if self.asynchronous else self.host + device

    @property
    def total(self) -> float:
        return self.compute + self.optimizer + self.communication

    @property
    def dominant(self) -> str:
        parts = {"communication": self.communication, "optimizer": self.optimizer}
        if self.asynchronous and self.host > self.products + self.traffic:
            parts["host"] = self.host
        else:
            parts |= {"products": self.products, "traffic": self.traffic}
        return max(parts, key=parts.__getitem__)


ADAM_BYTES = 28
"""Per parameter of a shard: AdamW reads 4 values and writes 3 of them."""


def step_seconds(
    shape: Shape,
    rows: int,
    length: int,
    stage: int,
    precision: str,
    ranks: int,
    machine: Machine,
    counts: Counts,
    micro_batches: int = 1,
) -> StepSeconds:
    """One optimizer step of `micro_batches` forward and backward passes of `rows` rows on each rank."""
    tokens, p = rows * length, shape.parameters
    traffic = tokens * shape.hidden * (counts.traffic_per_layer * (shape.layers - 1) + counts.traffic_rest)
    traffic += counts.traffic_per_parameter * p
    operations = counts.operations[stage] + counts.operations_per_layer * (shape.layers - 3)
    shard = p if stage == 0 else p / ranks
    return StepSeconds(
        host=micro_batches * operations * machine.operation_seconds,
        products=micro_batches * 3 * shape.forward_flops(rows, length) / machine.flops_per_second,
        traffic=micro_batches * traffic / machine.memory_bytes_per_second,
        optimizer=(counts.engine_whole[stage] * p + (counts.engine_shard[stage] + ADAM_BYTES) * shard)
        / machine.memory_bytes_per_second,
        communication=communication_seconds(shape, stage, precision, ranks, machine, micro_batches),
        asynchronous=machine.asynchronous,
    )


def efficiency(
    shape: Shape, global_rows: int, length: int, stage: int, ranks: int, machine: Machine, counts: Counts, most: int
) -> float:
    """Rows per second of `ranks` ranks, over `ranks` times those of one rank at the same global batch.

    Args:
        most: rows of one micro-batch at most.
    """

    def rows_per_second(n: int) -> float:
        share = math.ceil(global_rows / n)
        rows = min(share, most)
        step = step_seconds(shape, rows, length, stage, "autocast", n, machine, counts, math.ceil(share / rows))
        return global_rows / step.total

    return rows_per_second(ranks) / (ranks * rows_per_second(1))


# ----------------------------------------------------------------------------------------------------- teacher cache


def cache_row_bytes(pairs: int, hidden: int, classes: int, value_bytes: int = 2, tokens: float | None = None) -> float:
    """Bytes of one row: id, logits, states (`pkd_dist/teacher/cache.py`); `tokens`: mean length, if all are kept."""
    states = pairs * hidden * value_bytes
    return 8 + classes * value_bytes + (states if tokens is None else tokens * states + 8)


def teacher_seconds_per_row(shape: Shape, length: float, machine: Machine) -> float:
    """Products of the teacher's forward pass alone."""
    return shape.forward_flops(64, round(length)) / 64 / machine.flops_per_second
