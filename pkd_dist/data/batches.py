"""Batches as pure functions of (seed, epoch, step, rank): no state to save, nothing to fast-forward on a resume.

Each epoch is a permutation of all examples drawn from (seed, epoch). Pools of `_POOL_BATCHES` batches are sorted by length
and cut into global batches, whose order is shuffled again; the short last batch stays last. The global batches do not
depend on the number of ranks. Rank r of R takes rows r, r + R, ... of the global batch and pads its share with rows of
weight 0, so that all ranks compute the same number of micro-batches of the same size.

Shapes (suffixes of names, see docs/architecture.md): N examples, B examples of one micro-batch, L its longest length rounded up
to `MULTIPLE`, C classes, M layers, H hidden size. Of multiple choice, (B, L) stands for (B, O, L) with the O options of each
example, which are its C classes; (B, M, H) for (B, O, M, H).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from pkd_dist.data.tokens import TokenSet

_POOL_BATCHES = 50
# GPU kernels are fastest at multiples of 8. A CPU pays for padding, so it rounds less.
MULTIPLE = 8 if torch.cuda.is_available() else 2


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    Attributes:
        rows_B: int64 positions in the token set; empty if the batch was gathered on the device.
        ids_B: int64 example ids, the keys of the teacher cache; empty if the batch was gathered on the device.
        input_ids_BL, attention_mask_BL, type_ids_BL: int64; type_ids_BL is None if the tokenizer has no token types.
        labels_B: int64 or float32; (B, C) float32 for multi-label.
        weight_B: float32, 1 / size of the global batch, or 0 for padding rows; sums to 1 over micro-batches and ranks.
        tokens: number of tokens without padding.
        teacher_logits_BC: the teacher's logits, or None.
        teacher_states: the teacher's hidden states, (B, M, H) for [CLS] or (B, L, M, H) for all tokens, or None.
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
        """The tensors by attribute name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments for a Hugging Face model."""
        out = {"input_ids": self.input_ids_BL, "attention_mask": self.attention_mask_BL}
        return out if self.type_ids_BL is None else out | {"token_type_ids": self.type_ids_BL}

    def to(self, device: torch.device) -> Batch:
        """Return a copy on a device."""
        return Batch(**{**vars(self), **{name: pinned(tensor, device) for name, tensor in self.tensors.items()}})

    @property
    def key(self) -> tuple[int, ...]:
        """The shapes of all tensors: batches with equal keys can share memory and a CUDA graph."""
        return sum((tuple(tensor.shape) for tensor in self.tensors.values()), ())

    def fill(self, other: Batch) -> None:
        """Copy the tensors of another batch with the same key into this batch's memory."""
        for name, tensor in other.tensors.items():
            on_host = tensor.device.type == "cpu" != self.weight_B.device.type
            self.tensors[name].copy_(tensor.pin_memory() if on_host else tensor, non_blocking=True)

    def batch(self) -> Batch:
        """Return itself; see `PendingBatch.batch`."""
        return self


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on a device. Copies to a GPU are asynchronous, from pinned memory."""
    return tensor if tensor.device.type == device.type else tensor.pin_memory().to(device, non_blocking=True)


def padded_length(lengths_B: np.ndarray) -> int:
    """Return the longest length of a batch, rounded up to `MULTIPLE`."""
    return -(-int(lengths_B.max()) // MULTIPLE) * MULTIPLE


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Return the number of global batches of an epoch."""
    return -(-examples // batch_size)


def epoch_order(lengths_N: np.ndarray, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation of an epoch, int64 (N,): `order[step * batch_size : (step + 1) * batch_size]` is one batch."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths_N))
    pool = _POOL_BATCHES * batch_size
    for start in range(0, len(order), pool):
        part = order[start : start + pool]
        order[start : start + pool] = part[np.argsort(lengths_N[part], kind="stable")]
    full = len(order) // batch_size
    batches = order[: full * batch_size].reshape(full, batch_size)
    return np.concatenate([batches[rng.permutation(full)].reshape(-1), order[full * batch_size :]])


def micro_batches(batch_size: int, world_size: int, micro_batch_size: int | str) -> tuple[int, int]:
    """Return (examples per micro-batch, micro-batches per step) of each rank.

    Args:
        batch_size: global.
        world_size: number of ranks.
        micro_batch_size: examples, or "auto": the rank's whole share, at most 64.
    """
    share = -(-batch_size // world_size)
    size = min(share, 64) if micro_batch_size == "auto" else min(share, int(micro_batch_size))
    return size, -(-share // size)


def collate(tokens: TokenSet, rows_B: np.ndarray, weight_B: np.ndarray, pad_id: int) -> Batch:
    """Return rows of the flat arrays as one padded batch. Vectorized: no Python code per example or token."""
    starts_B, lengths_B = tokens.spans_of(rows_B)
    within_L = np.arange(padded_length(lengths_B))
    mask_BL = within_L < lengths_B[..., None]
    index_BL = np.where(mask_BL, starts_B[..., None] + within_L, 0)
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
    """The training batches of one rank.

    Args:
        tokens: the training set.
        batch_size: global.
        micro_batch_size: examples of one forward pass on one rank, or "auto".
        seed: of the order.
        rank, world_size: of this process and of the job.
        pad_id: token id of padding.
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
        """Steps per epoch."""
        return steps_per_epoch(len(self.tokens), self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """Return the permutation of an epoch; see `epoch_order`."""
        return epoch_order(self.tokens.lengths_N, self.batch_size, self.seed, epoch)

    def step(self, order: np.ndarray, step: int) -> list[Batch]:
        """Return this rank's micro-batches of one step. Their number and size are the same for every step and rank."""
        return [collate(self.tokens, rows, weight, self.pad_id) for rows, weight in self.rows(order, step)]

    def rows(self, order: np.ndarray, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the rows and weights of the micro-batches of one step."""
        batch = order[step * self.batch_size : (step + 1) * self.batch_size]
        size, count = micro_batches(self.batch_size, self.world_size, self.micro_batch_size)
        share = batch[self.rank :: self.world_size]
        # Padding repeats the rank's own rows. A rank without rows in the short last batch uses rows of others.
        padded = np.resize(share if len(share) else batch, size * count) if len(share) < size * count else share
        weight = np.where(np.arange(size * count) < len(share), 1.0 / len(batch), 0.0)
        return [(padded[i : i + size], weight[i : i + size]) for i in range(0, size * count, size)]


def scoring_batches(tokens: TokenSet, batch_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """Return this rank's rows for one pass over all examples, in batches of similar length.

    The ranks together cover each example exactly once.
    """
    order = np.argsort(tokens.lengths_N, kind="stable")[::-1][rank::world_size]
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
