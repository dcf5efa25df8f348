"""The reference for the engines: one process and torch's AdamW, without any of the package's training code."""

import math
import sys

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from pkd_dist.data.batches import epoch_order
from pkd_dist.data.tokens import TokenSet

BATCH, STEPS, EXAMPLES = 12, 20, 101
SETTINGS = {
    "batch_size": BATCH, "learning_rate": 5e-3, "weight_decay": 0.1, "warmup_ratio": 0.25, "max_grad_norm": 0.5,
    "adam_epsilon": 1e-6,
}  # fmt: skip


def unload_deepspeed() -> None:
    """Undo what `forked` has loaded, so that `sys.modules` shows whether this process needs DeepSpeed."""
    for name in list(sys.modules):
        if name.partition(".")[0] == "deepspeed" or name == "pkd_dist.training.deepspeed_engine":
            del sys.modules[name]


def make_model(layers: int = 2, seed: int = 0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=60, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def make_tokens() -> TokenSet:
    rng = np.random.default_rng(3)
    lengths = rng.integers(2, 20, size=EXAMPLES)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(1, 60, size=offsets[-1]).astype(np.int32)
    return TokenSet(ids, None, offsets, np.arange(EXAMPLES), rng.integers(2, size=EXAMPLES), "", "", 0)


def train(total: int = STEPS, peak: float = SETTINGS["learning_rate"]) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Return the losses, gradient norms before clipping, and final weights of a plain loop of `total` steps; `peak` is the highest rate."""
    model, tokens = make_model().train(), make_tokens()
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in named if p.ndim >= 2], "weight_decay": SETTINGS["weight_decay"]},
            {"params": [p for n, p in named if p.ndim < 2], "weight_decay": 0.0},
        ],
        eps=SETTINGS["adam_epsilon"],
    )
    warmup = int(total * SETTINGS["warmup_ratio"])
    losses, norms = [], []
    steps = math.ceil(EXAMPLES / BATCH)
    for step in range(total):
        epoch, within = divmod(step, steps)
        rows = epoch_order(tokens.lengths_N, BATCH, 7, epoch)[within * BATCH : (within + 1) * BATCH]
        loss = 0
        for row in rows:  # one example at a time: no padding, no collation
            ids = torch.from_numpy(
                tokens.input_ids_T[tokens.offsets_N1[row] : tokens.offsets_N1[row + 1]].astype(np.int64)
            )
            logits = model(input_ids=ids[None]).logits
            loss = loss - torch.log_softmax(logits, -1)[0, int(tokens.labels_N[row])] / len(rows)
        rate = (step + 1) / warmup if step < warmup else (total - step) / (total - warmup)
        for group in optimizer.param_groups:
            group["lr"] = peak * rate
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS["max_grad_norm"])))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, {f"model.{n}": p.detach() for n, p in named}
