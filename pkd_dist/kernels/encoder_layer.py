"""A BERT or DistilBERT encoder layer as one autograd operation on a CPU, with fewer and cheaper passes over memory.

Operation by operation under autocast, more than half of a small student's training step is not arithmetic: every weight
and state is cast several times, dropout draws its random numbers one after the other, and each small operation adds a node
to the autograd graph. A `FusedLayer` has its own forward and backward pass: one matrix multiplication for query, key and
value, one cast for each weight, and `operations.py` between the matrix multiplications. The last layer may compute the first
token alone; its attention then reads the hidden states as the keys and values of every head.

Precision is autocast's: matrix multiplications in its dtype, softmax in float32, residual sums and LayerNorm in the dtype of
the states (float32 under autocast).

Shapes: B examples, L tokens, H hidden size, F inner size, A heads, d head size, T = B * L.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

from pkd_dist.kernels.operations import LayerOperations, SavedForBackward, dropout_mask, select_operations


class CpuDropout(nn.Dropout):
    """nn.Dropout with a faster random number generator on a CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.device.type != "cpu" or not self.training or not self.p:
            return super().forward(input)
        return input * dropout_mask(tuple(input.shape), self.p, input.dtype)


class LayerParameters(NamedTuple):
    """The parameters and settings of an encoder layer, whatever its attribute names."""

    weights: list[torch.Tensor]
    """Weight and bias of query, key, value, attention output, LayerNorm, inner, outer, LayerNorm."""
    heads: int
    dropouts: tuple[float, float, float]
    """Of the attention weights, of the attention output, of the layer's output."""
    epsilon: float
    """Of LayerNorm."""


class FusedLayer(nn.Module):
    """Mixin, placed before a transformers layer class: one operation on a CPU, the class's own forward pass elsewhere."""

    first_token_only = False
    """Output (B, 1, H), the first token alone, instead of (B, L, H)."""

    def layer_parameters(self) -> LayerParameters:
        raise NotImplementedError

    def forward(
        self, hidden_BLH: torch.Tensor, attention_mask: torch.Tensor | None = None, *args: object, **kwargs: object
    ) -> torch.Tensor:
        if hidden_BLH.device.type != "cpu":
            return super().forward(hidden_BLH, attention_mask, *args, **kwargs)
        weights, heads, dropouts, epsilon = self.layer_parameters()
        compute_dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_BLH.dtype
        dropouts = dropouts if self.training else (0.0, 0.0, 0.0)
        settings = _Settings(compute_dtype, heads, dropouts, epsilon, self.first_token_only)
        mask_B1L = _additive(attention_mask, compute_dtype)
        needs_grad, H = torch.is_grad_enabled(), hidden_BLH.shape[-1]
        operations = select_operations(compute_dtype, hidden_BLH.dtype, H, H // heads, needs_grad)
        with torch.autocast("cpu", enabled=False):
            if needs_grad:
                return _FusedFunction.apply(hidden_BLH.contiguous(), mask_B1L, operations, settings, *weights)
            return _forward(hidden_BLH.contiguous(), mask_B1L, operations, settings, False, weights)[0]


class FusedBertLayer(FusedLayer):
    """For layers of the families that copy BERT's."""

    attention: Any
    intermediate: Any
    output: Any

    def layer_parameters(self) -> LayerParameters:
        inner, after, last = self.attention.self, self.attention.output, self.output
        modules = (
            inner.query, inner.key, inner.value, after.dense, after.LayerNorm, self.intermediate.dense, last.dense,
            last.LayerNorm,
        )  # fmt: skip
        dropouts = inner.dropout.p, after.dropout.p, last.dropout.p
        return LayerParameters(_weights(modules), inner.num_attention_heads, dropouts, last.LayerNorm.eps)


class FusedDistilBertLayer(FusedLayer):
    """For DistilBERT's layers."""

    attention: Any
    ffn: Any
    sa_layer_norm: nn.LayerNorm
    output_layer_norm: nn.LayerNorm

    def layer_parameters(self) -> LayerParameters:
        inner, ffn = self.attention, self.ffn
        modules = (
            inner.q_lin, inner.k_lin, inner.v_lin, inner.out_lin, self.sa_layer_norm, ffn.lin1, ffn.lin2,
            self.output_layer_norm,
        )  # fmt: skip
        dropouts = inner.dropout.p, 0.0, ffn.dropout.p
        return LayerParameters(_weights(modules), inner.n_heads, dropouts, self.sa_layer_norm.eps)


def _weights(modules: Sequence[Any]) -> list[torch.Tensor]:
    return [parameter for module in modules for parameter in (module.weight, module.bias)]


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return a (B, 1, L) mask to add to the scores of every head.

    Args:
        mask: (B, 1, L, L) or (B, 1, 1, L), booleans or numbers to add.
        dtype: Of the result.
    """
    if mask is None:
        return None
    mask = mask[:, 0, :1]
    if mask.dtype != torch.bool:
        return mask.clamp(min=torch.finfo(dtype).min).to(dtype)  # no -inf: a row of padding alone must stay finite
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


class _Settings(NamedTuple):
    compute_dtype: torch.dtype
    heads: int
    dropouts: tuple[float, float, float]
    epsilon: float
    first_token_only: bool


def _forward(
    hidden_BLH: torch.Tensor,
    mask_B1L: torch.Tensor | None,
    operations: LayerOperations,
    settings: _Settings,
    needs_grad: bool,
    weights: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, list[torch.Tensor], list[SavedForBackward]]:
    """Return the layer's output, the tensors its matrix multiplications save for backward, and what the rest saves.

    Args:
        needs_grad: A backward pass follows.
        weights: See `LayerParameters`.
    """
    low, heads, (p_weights, p_attended, p_output), epsilon, first_token_only = settings
    *projections, wo, bo, g1, b1, wi, bi, wu, bu, g2, b2 = weights
    H = hidden_BLH.shape[-1]
    low_BLH, wo, wi, wu = (x.to(low) for x in (hidden_BLH, wo, wi, wu))
    if first_token_only:
        attend, residual = _attend_first, hidden_BLH[:, 0]
    else:
        attend, residual = _attend_all, hidden_BLH.reshape(-1, H)
    context_TH, attention = attend(low_BLH, mask_B1L, operations, heads, p_weights, projections)
    attended_TH = torch.addmm(bo.to(low), context_TH, wo.t())
    norm_1, low_1, add_norm_1 = operations.add_norm(
        residual.contiguous(), attended_TH, p_attended, g1, b1, epsilon, needs_grad
    )
    inner_TF = torch.addmm(bi.to(low), low_1, wi.t())
    active_TF, activation = operations.gelu(inner_TF, needs_grad)
    output_TH = torch.addmm(bu.to(low), active_TF, wu.t())
    norm_2, _, add_norm_2 = operations.add_norm(norm_1, output_TH, p_output, g2, b2, epsilon, needs_grad)
    operands = [wo, wi, wu, context_TH, low_1, active_TF]
    return norm_2.view(len(hidden_BLH), -1, H), operands, [attention, add_norm_1, activation, add_norm_2]


class _FusedFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_BLH: torch.Tensor,
        mask_B1L: torch.Tensor | None,
        operations: LayerOperations,
        settings: _Settings,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        out, operands, saved = _forward(hidden_BLH, mask_B1L, operations, settings, True, weights)
        ctx.save_for_backward(*operands, *(tensor for of_one in saved for tensor in of_one.tensors))
        ctx.operations, ctx.shape, ctx.first_token_only = operations, hidden_BLH.shape, settings.first_token_only
        ctx.saved_layout = [(len(of_one.tensors), of_one.numbers) for of_one in saved]
        ctx.weight_dtype = weights[0].dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BLH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        wo, wi, wu, context_TH, low_1, active_TF, *rest = ctx.saved_tensors
        tensors = iter(rest)
        attention, add_norm_1, activation, add_norm_2 = (
            SavedForBackward(list(islice(tensors, count)), numbers) for count, numbers in ctx.saved_layout
        )
        operations: LayerOperations = ctx.operations
        residual, output, grad_g2, grad_b2 = operations.add_norm_backward(
            add_norm_2, grad_BLH.flatten(0, 1).contiguous()
        )
        inner = operations.gelu_backward(activation, output @ wu)
        grad_u, grad_i = _linear_grads(output, active_TF), _linear_grads(inner, low_1)
        residual, attended, grad_g1, grad_b1 = operations.add_norm_backward(add_norm_1, residual, inner @ wi)
        grad_o = _linear_grads(attended, context_TH)
        attend_backward = _attend_first_backward if ctx.first_token_only else _attend_all_backward
        grad_in, projections = attend_backward(attention, operations, ctx.shape, attended @ wo, residual)
        attention_grads = (grad.to(ctx.weight_dtype) for pair in (*projections, grad_o) for grad in pair)
        feed_forward_grads = (grad.to(ctx.weight_dtype) for grad in (*grad_i, *grad_u))
        return (
            grad_in, None, None, None, *attention_grads, grad_g1, grad_b1, *feed_forward_grads, grad_g2, grad_b2,
        )  # fmt: skip


def _linear_grads(grad: torch.Tensor, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of a linear layer's weight and bias."""
    return grad.t() @ inputs, grad.sum(0)


_ProjectionGrads = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Gradients of the weight and bias of query, key and value."""


def _attend_all(
    low_BLH: torch.Tensor,
    mask_B1L: torch.Tensor | None,
    operations: LayerOperations,
    heads: int,
    p: float,
    projections: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, SavedForBackward]:
    """Return the context of every token, (T, H), with one matrix multiplication for query, key and value."""
    wq, bq, wk, bk, wv, bv = projections
    B, L, H = low_BLH.shape
    low_TH, w_qkv = low_BLH.view(-1, H), low_BLH.new_empty(3 * H, H)
    for i, w in enumerate((wq, wk, wv)):
        w_qkv[i * H : (i + 1) * H] = w
    qkv = torch.addmm(torch.cat([bq, bk, bv]).to(low_TH.dtype), low_TH, w_qkv.t())
    q, k, v = qkv.view(B, L, 3, heads, -1).unbind(2)
    context, _, saved = operations.attend(q, k, v, mask_B1L, (H // heads) ** -0.5, p)
    return context.reshape(-1, H), SavedForBackward([low_TH, w_qkv, *saved.tensors], (heads, *saved.numbers))


def _attend_all_backward(
    saved: SavedForBackward,
    operations: LayerOperations,
    shape: tuple[int, int, int],
    grad_TH: torch.Tensor,
    residual_TH: torch.Tensor,
) -> tuple[torch.Tensor, _ProjectionGrads]:
    (low_TH, w_qkv, *tensors), (heads, *numbers) = saved
    B, L, H = shape
    qkv_T3H = grad_TH.new_empty(B * L, 3 * H)
    out = qkv_T3H.view(B, L, 3, heads, -1).unbind(2)
    operations.attend_backward(SavedForBackward(tensors, tuple(numbers)), grad_TH.view(B, L, heads, -1), None, out)
    weight, bias = _linear_grads(qkv_T3H, low_TH)
    grad_in = residual_TH + qkv_T3H @ w_qkv
    return grad_in.view(shape), list(zip(weight.split(H), bias.split(H), strict=True))


def _attend_first(
    low_BLH: torch.Tensor,
    mask_B1L: torch.Tensor | None,
    operations: LayerOperations,
    heads: int,
    p: float,
    projections: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, SavedForBackward]:
    """Return the context of the first token, (B, H), without any token's key or value.

    `model/first_token.py` has the formula. The key's bias adds the same number to all scores of a head and is left out.
    """
    wq, bq, wk, _, wv, bv = projections
    (B, _, H), low = low_BLH.shape, low_BLH.dtype
    wq, wk, wv = (w.to(low) for w in (wq, wk, wv))
    first_BH = low_BLH[:, 0].contiguous()
    q_ABd = torch.addmm(bq.to(low), first_BH, wq.t()).view(B, heads, -1).transpose(0, 1)
    q_ABH = q_ABd @ wk.view(heads, -1, H)
    states = low_BLH[:, :, None]
    mean, sums_B1A, saved = operations.attend(_as_queries(q_ABH), states, states, mask_B1L, (H // heads) ** -0.5, p)
    mean_ABH = mean[:, :, 0].transpose(0, 1)
    sums_AB1 = sums_B1A[:, 0].t()[..., None]
    shift_ABd = sums_AB1 * bv.view(heads, 1, -1)  # not in the compute dtype
    context_ABd = (mean_ABH @ wv.view(heads, -1, H).transpose(1, 2) + shift_ABd).to(low)
    context_BH = context_ABd.transpose(0, 1).reshape(B, H)
    tensors = [first_BH, q_ABd, wq, wk, wv, bv, mean_ABH, sums_AB1, *saved.tensors]
    return context_BH, SavedForBackward(tensors, saved.numbers)


def _attend_first_backward(
    saved: SavedForBackward,
    operations: LayerOperations,
    shape: tuple[int, int, int],
    grad_BH: torch.Tensor,
    residual_BH: torch.Tensor,
) -> tuple[torch.Tensor, _ProjectionGrads]:
    first_BH, q_ABd, wq, wk, wv, bv, mean_ABH, sums_AB1, *tensors = saved.tensors
    B, L, H = shape
    heads = len(q_ABd)
    grad_ABd = grad_BH.view(B, heads, -1).transpose(0, 1)
    wide_ABd = grad_ABd.to(sums_AB1.dtype)
    grad_v = (grad_ABd.transpose(1, 2) @ mean_ABH).view(H, H), (wide_ABd * sums_AB1).sum(1).flatten()
    grad_sums_B1A = (wide_ABd * bv.view(heads, 1, -1)).sum(-1).t()[:, None].contiguous()
    grad_mean_ABH = grad_ABd @ wv.view(heads, -1, H)
    grad_q_ABH, grad_states = grad_BH.new_empty(heads, B, H), grad_BH.new_empty(B, L, 1, H)
    operations.attend_backward(
        SavedForBackward(tensors, saved.numbers),
        _as_queries(grad_mean_ABH),
        grad_sums_B1A,
        (_as_queries(grad_q_ABH), grad_states, grad_states),
    )
    grad_k = (q_ABd.transpose(1, 2) @ grad_q_ABH).view(H, H), torch.zeros_like(bv)
    grad_q_BH = (grad_q_ABH @ wk.view(heads, -1, H).transpose(1, 2)).transpose(0, 1).reshape(B, H)
    grad_in = grad_states.view(shape).to(residual_BH.dtype)
    grad_in[:, 0] += residual_BH + grad_q_BH @ wq
    return grad_in, [_linear_grads(grad_q_BH, first_BH), grad_k, grad_v]


def _as_queries(x_ABH: torch.Tensor) -> torch.Tensor:
    """Return one row for each head, (B, A, 1, H): A queries of a single head of size H."""
    return x_ABH.transpose(0, 1)[:, :, None]
