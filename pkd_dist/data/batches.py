"""(seed, epoch, step, rank) -> batch, as pure functions: nothing to save, nothing to fast-forward on a resume.

An epoch is a permutation of all examples, drawn anew from (seed, epoch). Runs of `_POOL` batches are sorted by length and
cut into global batches, whose order is shuffled again; the one short batch comes last. Nothing here depends on the number
of ranks: a rank takes every world-size-th row of the global batch and pads its share with rows of weight 0, so that all
ranks do the same number of equal micro-batches.

Shapes: N examples, B rows of one micro-batch, L its longest length rounded up to `MULTIPLE`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pkd_dist.data.tokens import TokenSet

_POOL = 50
# A GPU's kernels like multiples of 8; a CPU computes what is there (a batch's lengths are near each other).
MULTIPLE = 8 if torch.cuda.is_available() else 2


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        rows_B: int64 positions in the token set; empty where the batch was made on the device.
        ids_B: int64 example ids, the key of the teacher's cache; likewise.
        input_ids_BL, attention_mask_BL, type_ids_BL: int64; type_ids_BL is None where the tokenizer makes none.
        labels_B: int64 or float32.
        weight_B: float32: 1 / size of the global batch, 0 for padding rows; sums to 1 over micro-batches and ranks.
        tokens: real tokens in it, padding left out.
        teacher_logits_BC, teacher_states: the teacher's answers, states (B, M, H) or (B, L, M, H); None where there are none.
    """

    rows_B: np.ndarray
    ids_B: np.ndarray
    input_ids_BL: torch.Tensor
    attention_mask_BL: torch.Tensor
    type_ids_BL: torch.Tensor | None
    labels_B: torch.Tensor
    weight_B: torch.Tensor
    tokens: int
    teacher_logits_BC: torch.Tensor | None = None
    teacher_states: torch.Tensor | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of a Hugging Face model."""
        out = {"input_ids": self.input_ids_BL, "attention_mask": self.attention_mask_BL}
        return out if self.type_ids_BL is None else out | {"token_type_ids": self.type_ids_BL}

    def to(self, device: torch.device) -> Batch:
        return Batch(**{**vars(self), **{name: pinned(tensor, device) for name, tensor in self.tensors.items()}})

    @property
    def key(self) -> tuple[int, ...]:
        """Equal for batches whose tensors have equal shapes."""
        return sum((tuple(tensor.shape) for tensor in self.tensors.values()), ())

    def fill(self, other: Batch) -> None:
        """Takes over the tensors of another batch of the same key, into the memory of its own."""
        for name, tensor in other.tensors.items():
            on_host = tensor.device.type == "cpu" != self.weight_B.device.type
            self.tensors[name].copy_(tensor.pin_memory() if on_host else tensor, non_blocking=True)

    def batch(self) -> Batch:
        """Itself."""
        return self


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, of a GPU by a copy that the host does not wait for."""
    return tensor if tensor.device.type == device.type else tensor.pin_memory().to(device, non_blocking=True)


def padded_length(lengths_B: np.ndarray) -> int:
    """Of the rows of a batch: their longest, rounded up to `MULTIPLE`."""
    return -(-int(lengths_B.max()) // MULTIPLE) * MULTIPLE


def steps_per_epoch(examples: int, batch_size: int) -> int:
    return -(-examples // batch_size)


def epoch_order(lengths_N: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch: global batch `step` is `order[step * batch_size : (step + 1) * batch_size]`."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths_N))
    pool = _POOL * batch_size
    for start in range(0, len(order), pool):
        part = order[start : start + pool]
        order[start : start + pool] = part[np.argsort(lengths_N[part], kind="stable")]
    full = len(order) // batch_size
    batches = order[: full * batch_size].reshape(full, batch_size)
    return np.concatenate([batches[rng.permutation(full)].reshape(-1), order[full * batch_size :]])


def micro_batches(batch_size: int, world_size: int, micro_batch_size: int | str) -> tuple[int, int]:
    """(rows of one micro-batch, micro-batches per step) of every rank, the same on all."""
    share = -(-batch_size // world_size)
    size = min(share, 64) if micro_batch_size == "auto" else min(share, int(micro_batch_size))
    return size, -(-share // size)


def collate(tokens: TokenSet, rows_B: np.ndarray, weight_B: np.ndarray, pad_id: int) -> Batch:
    """Gathers rows of the flat arrays into one padded batch, without Python per example or token."""
    starts_B, stops_B = tokens.offsets_N1[rows_B], tokens.offsets_N1[rows_B + 1]
    lengths_B = stops_B - starts_B
    within_L = np.arange(padded_length(lengths_B))
    mask_BL = within_L < lengths_B[:, None]
    index_BL = np.where(mask_BL, starts_B[:, None] + within_L, 0)
    ids_BL = np.where(mask_BL, tokens.input_ids_T[index_BL], pad_id)
    types_BL = None if tokens.type_ids_T is None else np.where(mask_BL, tokens.type_ids_T[index_BL], 0)
    return Batch(
        rows_B=rows_B,
        ids_B=np.asarray(tokens.ids_N[rows_B]),
        input_ids_BL=torch.from_numpy(ids_BL.astype(np.int64)),
        attention_mask_BL=torch.from_numpy(mask_BL.astype(np.int64)),
        type_ids_BL=None if types_BL is None else torch.from_numpy(types_BL.astype(np.int64)),
        labels_B=torch.from_numpy(np.asarray(tokens.labels_N[rows_B])),
        weight_B=torch.from_numpy(weight_B.astype(np.float32)),
        tokens=int(lengths_B[weight_B > 0].sum()),
    )


@dataclass(frozen=True)
class TrainingBatches:
    """The batches of one rank in training.

    Args:
        batch_size: global.
        micro_batch_size: rows of one forward pass of one rank, or "auto".
    """

    tokens: TokenSet
    batch_size: int
    micro_batch_size: int | str
    seed: int
    rank: int
    world_size: int
    pad_id: int

    @property
    def steps(self) -> int:
        return steps_per_epoch(len(self.tokens), self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        return epoch_order(self.tokens.lengths_N, self.batch_size, self.seed, epoch)

    def step(self, order: np.ndarray, step: int) -> list[Batch]:
        """The micro-batches of this rank in one step: always the same number, each of the same number of rows."""
        return [collate(self.tokens, rows, weight, self.pad_id) for rows, weight in self.rows(order, step)]

    def rows(self, order: np.ndarray, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rows and weights of the same micro-batches."""
        batch = order[step * self.batch_size : (step + 1) * self.batch_size]
        size, count = micro_batches(self.batch_size, self.world_size, self.micro_batch_size)
        mine = batch[self.rank :: self.world_size]
        # a rank without rows in the last, short batch computes one of the batch's at weight 0
        shown = np.resize(mine if len(mine) else batch, size * count) if len(mine) < size * count else mine
        weight = np.where(np.arange(size * count) < len(mine), 1.0 / len(batch), 0.0)
        return [(shown[i : i + size], weight[i : i + size]) for i in range(0, size * count, size)]


def scoring_batches(tokens: TokenSet, batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """This rank's rows of a pass over all examples, each exactly once over the ranks, in batches of similar length."""
    order = np.argsort(tokens.lengths_N, kind="stable")[::-1][rank::world_size]
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
