"""The teacher's forward pass.

`LiveTeacher` runs one batch. `run_teacher` runs many rows of a token set in batches of similar length, for the cache.

Shapes: B examples of a batch, R rows of a token set, T tokens of these rows without padding, L padded length of a batch,
C classes, M layers, H hidden size. Of multiple choice, inputs are (B, O, L), and the states of [CLS] of the O options (B, O, M, H).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from pkd_dist.data.batches import MULTIPLE, Batch, collate, pinned
from pkd_dist.data.class_mapping import is_multilabel
from pkd_dist.data.on_device import open_device_tokens
from pkd_dist.data.tokens import TokenSet
from pkd_dist.errors import UserError
from pkd_dist.limits import cpu_has_bfloat16
from pkd_dist.model.encoder import Encoder
from pkd_dist.model.ensemble import mean_logits

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
_MIN_LENGTH_RATIO = 0.75
"""Shortest to longest padded row of a batch; shorter rows start another batch."""
_ROW_MULTIPLE = 32
"""Larger batches are rounded down to a multiple. On a CPU, PyTorch keeps about 1 MB for each shape of a matrix multiplication."""


def resolve_teacher_precision(precision: str, device: torch.device) -> str:
    """Resolve `auto`: float16 on a GPU, on a CPU bfloat16 if it multiplies matrices in it, else float32."""
    if precision != "auto":
        return precision
    return "float16" if device.type == "cuda" else "bfloat16" if cpu_has_bfloat16() else "float32"


class LiveTeacher:
    """Computes teacher outputs in a forward pass, exactly as the cache stores them.

    Args:
        model: fine-tuned classifier.
        layers: teacher layers whose states are returned (from 1; 0: the embeddings).
        precision: key of `DTYPES`, the dtype of the forward pass.
        dtype: key of `DTYPES`, the dtype of the outputs.
        all_tokens: return the states of all tokens, not of [CLS] alone.
        device: where the models run.
        others: more teachers, whose probabilities are averaged with the model's; see `mean_logits`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[int],
        precision: str,
        dtype: str,
        all_tokens: bool,
        device: torch.device,
        others: Sequence[PreTrainedModel] = (),
    ):
        self.encoder = Encoder(model, all_tokens=all_tokens).to(device, DTYPES[precision]).eval()
        self.others = [Encoder(other).to(device, DTYPES[precision]).eval() for other in others]
        self.layers, self.all_tokens, self.dtype, self.device = tuple(layers), all_tokens, DTYPES[dtype], device
        self.hidden_size = int(model.config.hidden_size)
        self._multilabel = is_multilabel(model.config)

    def __call__(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (B, C) and states (B, M, H), or (B, L, M, H) of all tokens.

        Raises:
            UserError: a value is not finite, or overflows the output dtype.
        """
        return require_finite(*self.unchecked(inputs))

    @torch.inference_mode()
    def unchecked(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same without checking the values, which would make the host wait for a GPU."""
        out = self.encoder(inputs, self.layers, self.all_tokens)
        logits, states = out.logits_BC, out.states
        if self.others:
            logits = mean_logits([logits, *(other(inputs)[0] for other in self.others)], self._multilabel)
        if states is None:
            *rows, length = inputs["input_ids"].shape
            states = logits.new_empty((*rows, *([length] if self.all_tokens else []), 0, self.hidden_size))
        return logits.to(self.dtype), states.to(self.dtype)


class GivenAnswers:
    """A teacher that is a file of answers: it has logits alone, and only for the rows of one token set.

    Args:
        logits_NC: float32, of all rows.
        dtype: key of `DTYPES`, of the outputs.
        width: H of the empty states.
    """

    all_tokens = False

    def __init__(self, logits_NC: np.ndarray, dtype: str, width: int):
        self.logits = torch.from_numpy(logits_NC).to(DTYPES[dtype])
        self._no_states = self.logits.new_empty((len(self.logits), 0, width))

    def rows(self, rows_R: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (R, C) and states (R, 0, H), as `run_teacher` does.

        Raises:
            UserError: a value overflows the output dtype.
        """
        return require_finite(self.logits[rows_R], self._no_states[rows_R])


def require_finite(logits: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both tensors. Raise UserError if a value is not finite."""
    if not (torch.isfinite(logits).all() and torch.isfinite(states).all()):
        raise UserError(
            "the teacher outputs are not finite at this precision; set cache.precision and cache.dtype to float32"
        )
    return logits, states


class TeacherBatches:
    """Makes teacher inputs from rows of a token set, on the teacher's device.

    A data set that fits in GPU memory is copied there once, and batches are gathered from it.
    """

    def __init__(self, tokens: TokenSet, pad_id: int, device: torch.device):
        self.tokens, self.pad_id, self.device = tokens, pad_id, device
        self._on_device = open_device_tokens(tokens, None, pad_id, device) if device.type == "cuda" else None

    def of(self, rows_B: np.ndarray) -> Batch:
        weight_B = np.ones(len(rows_B))
        if self._on_device:
            return self._on_device.rows(rows_B, weight_B).to(self.device).batch()
        return collate(self.tokens, rows_B, weight_B, self.pad_id).to(self.device)


def run_teacher(
    rows_R: np.ndarray,
    batches: TeacherBatches,
    teacher: LiveTeacher,
    stop_after: Callable[[int], bool] = lambda rows: False,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Compute the teacher outputs for some rows, in batches of similar length.

    On a GPU the host does not wait for a batch before it queues the next.

    Args:
        rows_R: int64 positions in the token set.
        stop_after: called with the number of rows of each batch; returns whether to stop.

    Returns:
        Logits (R, C) and states (R, M, H), or (T, M, H) of all tokens, on the CPU and in the order of `rows_R`; None if
        stopped early.

    Raises:
        UserError: a value is not finite, or overflows the output dtype.
    """
    lengths_R = batches.tokens.lengths_of(rows_R)
    starts_R = np.cumsum(lengths_R) - lengths_R
    # The states of all tokens are too large to collect on a GPU: they move to the host batch by batch.
    keep_on = torch.device("cpu") if teacher.all_tokens else teacher.device
    outputs: tuple[torch.Tensor, torch.Tensor] | None = None
    done = 0
    for index_B in _batches_by_length(lengths_R, _BATCH_TOKENS[keep_on.type] // batches.tokens.options):
        logits, states = teacher.unchecked(batches.of(rows_R[index_B]).inputs)
        state_index = index_B
        if teacher.all_tokens:
            real_BL = np.arange(states.shape[1]) < lengths_R[index_B][:, None]
            state_index = (starts_R[index_B][:, None] + np.arange(states.shape[1]))[real_BL]
            states = states.flatten(0, 1)[pinned(torch.from_numpy(np.flatnonzero(real_BL)), teacher.device)]
        if outputs is None:
            state_rows = int(lengths_R.sum()) if teacher.all_tokens else len(rows_R)
            outputs = (
                logits.new_empty((len(rows_R), *logits.shape[1:]), device=keep_on),
                states.new_empty((state_rows, *states.shape[1:]), device=keep_on),
            )
        for output, values, index in zip(outputs, (logits, states), (index_B, state_index), strict=True):
            output[pinned(torch.from_numpy(index), keep_on)] = values.to(keep_on)
        done += len(index_B)
        if stop_after(len(index_B)) and done < len(rows_R):
            return None
    assert outputs is not None
    logits, states = require_finite(*outputs)
    return logits.cpu(), states.cpu()


def _batches_by_length(lengths_R: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Yield the indices (B,) of each batch, longest rows first, of about `max_tokens` tokens at most."""
    order_R = np.argsort(-lengths_R, kind="stable")
    padded_R = -(-lengths_R[order_R] // MULTIPLE) * MULTIPLE
    start = 0
    while start < len(order_R):
        similar = int(np.searchsorted(-padded_R, -_MIN_LENGTH_RATIO * padded_R[start], side="right")) - start
        count = min(similar, max(1, max_tokens // int(padded_R[start])))
        count = count // _ROW_MULTIPLE * _ROW_MULTIPLE or count
        yield order_R[start : start + count]
        start += count
