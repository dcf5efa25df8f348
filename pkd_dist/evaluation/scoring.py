"""Scoring: logits of exactly n examples whatever the ranks and batches, task metrics, size and speed, and teacher
against student."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from pkd_dist.data.batches import collate, scoring_batches
from pkd_dist.data.tokens import TokenSet
from pkd_dist.distributed.world import World

Forward = Callable[[dict[str, torch.Tensor]], torch.Tensor]


@contextmanager
def evaluating(module: nn.Module) -> Any:
    """Evaluation mode without gradients; the mode of before is put back."""
    mode = module.training
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        module.train(mode)


def predict(
    forward: Forward,
    tokens: TokenSet,
    world: World,
    batch_size: int,
    pad_id: int,
    tick: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """Logits of every example, on every rank; collective.

    Args:
        forward: a Hugging Face model's inputs -> logits_BC.
        tick: told of the examples done.

    Returns:
        (N, C) float32 in the order of the token set.

    Raises:
        Preempted: a rank has got a stop signal; nothing is kept.
    """
    mine = scoring_batches(tokens, batch_size, world.rank, world.size)
    logits: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    # Where a forward pass is collective (ZeRO 3), all ranks must do the same number, and stop at the same one.
    for i in range(-(-len(tokens) // (world.size * batch_size)) if len(tokens) else 0):
        world.stop_here("in an evaluation")
        rows_B = mine[i] if i < len(mine) else np.zeros(1, np.int64)
        batch = collate(tokens, rows_B, np.ones(len(rows_B)), pad_id).to(world.device)
        out = forward(batch.inputs).float().cpu().numpy()
        if i < len(mine):
            logits.append(out)
            positions.append(rows_B)
            tick(len(rows_B))
    width = max(world.gather(logits[0].shape[1] if logits else 0))
    rows = np.concatenate(logits) if logits else np.empty((0, width), np.float32)
    return world.gather_rows(rows, np.concatenate(positions) if positions else np.empty(0, np.int64), len(tokens))


def answers(forward: Callable[[Any], Any], tokens: TokenSet, batch_size: int, pad_id: int) -> np.ndarray:
    """`predict` without other ranks, of any function that gives logits on the CPU: (N, C) float32."""
    out: list[np.ndarray] = []
    batches = scoring_batches(tokens, batch_size, 0, 1)
    for rows_B in batches:
        out.append(np.asarray(forward(collate(tokens, rows_B, np.ones(len(rows_B)), pad_id).inputs), np.float32))
    order_N = np.concatenate(batches)
    return np.concatenate(out)[np.argsort(order_N)]
