"""Arithmetic of a training step: parameters, matrix multiplications, memory of a rank, bytes sent. No time is predicted.

The ZeRO formulas describe what DeepSpeed 0.19 was counted to do under this project's engine, which differs from the
ZeRO paper (Rajbhandari et al. 2020) as `zero_messages` explains. GB = 1e9 bytes.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A BERT classifier."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    vocabulary: int = 30522
    positions: int = 512
    token_types: int = 2
    classes: int = 2

    @property
    def parameters(self) -> int:
        h, i = self.hidden, self.intermediate
        layer = 4 * (h * h + h) + 2 * h * i + i + h + 4 * h
        embeddings = (self.vocabulary + self.positions + self.token_types) * h + 2 * h
        return embeddings + self.layers * layer + h * h + h + h * self.classes + self.classes

    def forward_flops(self, rows: int, length: int, cls_only: bool = True) -> float:
        """Return the FLOPs of a forward pass's matrix multiplications; with `cls_only` the last layer computes [CLS] alone."""
        h, i = self.hidden, self.intermediate
        full = rows * length * (8 * h * h + 4 * h * i + 4 * length * h)
        last = rows * (8 * h * h + 4 * h * i + 4 * self.heads * length * h) if cls_only else full
        return (self.layers - 1) * full + last + rows * 2 * h * (h + self.classes)


def bert(layers: int) -> Shape:
    """Return the shape of BERT-base with another number of layers."""
    return Shape(layers, 768, 3072, 12)


PRECISIONS = {"autocast": (4, 4), "bf16": (2, 2)}
"""Bytes of a weight and of a gradient. autocast: zeroN.json, float32 weights; bf16: zeroN_bf16.json."""
BUCKET_ELEMENTS = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`; no file in ds_configs/ sets it."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. kept: weights, gradients, optimizer. gathered: weights of other ranks. bucket: to reduce in."""

    kept: float
    gathered: float
    bucket: float

    @property
    def model(self) -> float:
        return self.kept + self.gathered


def zero_memory(parameters: int, stage: int, precision: str, ranks: int, bucket: int = BUCKET_ELEMENTS) -> Memory:
    """Return the memory of a rank at the end of backward, without activations.

    The optimizer holds 8 bytes of Adam's moments and, except for stage 0 under autocast, a float32 copy of its share
    of the weights. A model smaller than the bucket is reduced once, at the end of backward: until then stage 1 holds
    all gradients, and stages 2 and 3 hold them in the bucket, which is reserved in full. Stage 3 keeps a gathered
    weight until its last use because a small model is below `stage3_max_live_parameters`.
    """
    weight, gradient = PRECISIONS[precision]
    shard = parameters / ranks
    optimizer = 8 if stage == 0 and precision == "autocast" else 12
    kept = weight * (shard if stage == 3 else parameters) + gradient * (parameters if stage < 2 else shard)
    kept += optimizer * (parameters if stage == 0 else shard)
    gathered = weight * parameters if stage == 3 and ranks > 1 else 0
    return Memory(kept, gathered, gradient * bucket if stage >= 2 else 0)


def zero_messages(stage: int, layers: int, micro_batches: int) -> list[tuple[str, float, int]]:
    """Return the collectives of a step: kind, bytes as a multiple of the bytes of all weights, number of calls.

    Differences from the paper, as counted: stages 1 and 2 all-reduce all gradients and then gather the weights, 3 times
    (n-1)/n of the model instead of 2. Stage 3 gathers the model once per micro-batch, in one call, instead of twice,
    and after the step gathers each parameter below `stage3_param_persistence_threshold` (biases, LayerNorms) alone.
    """
    if stage == 0:
        return [("all_reduce", 1, 1)]
    if stage < 3:
        times = micro_batches if stage == 2 else 1
        return [("all_reduce", times, times), ("all_gather", 1, 2)]
    passes = [(kind, float(micro_batches), micro_batches) for kind in ("all_gather", "reduce_scatter")]
    return [*passes, ("all_gather", 0, 10 * layers + 6)]


def wire_bytes(kind: str, payload_bytes: float, ranks: int) -> float:
    """Return the bytes that one rank sends in a bandwidth-optimal collective over a tensor of `payload_bytes`."""
    share = (ranks - 1) / ranks * payload_bytes
    return 2 * share if kind == "all_reduce" else share


def step_wire_bytes(shape: Shape, stage: int, precision: str, ranks: int, micro_batches: int = 1) -> float:
    """Return the bytes that one rank sends in one optimizer step."""
    model = PRECISIONS[precision][1] * shape.parameters
    messages = zero_messages(stage, shape.layers, micro_batches)
    return sum(wire_bytes(kind, times * model, ranks) for kind, times, _ in messages)


def cache_row_bytes(pairs: int, hidden: int, classes: int, value_bytes: int = 2, tokens: float | None = None) -> float:
    """Return the bytes of a row of the teacher cache: id, logits, states. `tokens`: mean length, if all are kept."""
    states = pairs * hidden * value_bytes
    return 8 + classes * value_bytes + (states if tokens is None else tokens * states + 8)
