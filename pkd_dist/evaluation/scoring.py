"""Logits of exactly n examples, each computed once, whatever the number of ranks and the batch size.

Shapes: B examples of a batch, N examples, C classes (1 for a regression).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from pkd_dist.data.batches import collate, scoring_batches
from pkd_dist.data.tokens import TokenSet
from pkd_dist.distributed.world import World
from pkd_dist.model.encoder import accepted

Inputs = dict[str, torch.Tensor]
Forward = Callable[[Inputs], torch.Tensor]
"""A tokenizer's outputs -> logits_BC."""


def forward_of(model: PreTrainedModel) -> Forward:
    """Return a classifier as a function of a tokenizer's outputs."""

    def forward(inputs: Inputs) -> torch.Tensor:
        logits_BC: torch.Tensor = model(**accepted(model, inputs)).logits
        return logits_BC

    return forward


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients, and restore the previous mode afterwards."""
    mode = module.training
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        module.train(mode)


def predict_logits(
    forward: Forward,
    tokens: TokenSet,
    world: World,
    batch_size: int,
    pad_id: int,
    tick: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """Return the logits of every example, on every rank. Collective.

    Args:
        batch_size: Examples per forward pass on one rank.
        tick: Called with the number of examples after each batch of this rank.

    Returns:
        (N, C) float32, in the order of the token set.

    Raises:
        Preempted: A rank received a stop signal; the logits so far are discarded.
    """
    own = scoring_batches(tokens, batch_size, world.rank, world.size)
    logits: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    # Under ZeRO 3 a forward pass is collective: all ranks must run the same number, and stop at the same one.
    for i in range(-(-len(tokens) // (world.size * batch_size)) if len(tokens) else 0):
        world.stop_here("in an evaluation")
        rows_B = own[i] if i < len(own) else np.zeros(1, np.int64)
        batch = collate(tokens, rows_B, np.ones(len(rows_B)), pad_id).to(world.device)
        logits_BC = forward(batch.inputs).float().cpu().numpy()
        if i < len(own):
            logits.append(logits_BC)
            positions.append(rows_B)
            tick(len(rows_B))
    classes = max(world.gather(logits[0].shape[1] if logits else 0))
    rows = np.concatenate(logits) if logits else np.empty((0, classes), np.float32)
    return world.gather_rows(rows, np.concatenate(positions) if positions else np.empty(0, np.int64), len(tokens))


def predict_logits_single(
    forward: Callable[[Inputs], torch.Tensor | np.ndarray], tokens: TokenSet, batch_size: int, pad_id: int
) -> np.ndarray:
    """Return what `predict_logits` does, in a single process and for any function that computes logits on the CPU."""
    logits: list[np.ndarray] = []
    batches = scoring_batches(tokens, batch_size, 0, 1)
    for rows_B in batches:
        inputs = collate(tokens, rows_B, np.ones(len(rows_B)), pad_id).inputs
        logits.append(np.asarray(forward(inputs), np.float32))
    order_N = np.concatenate(batches)
    return np.concatenate(logits)[np.argsort(order_N)]
