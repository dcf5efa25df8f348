"""An encoder layer of BERT as one operation on a CPU: the same computation in fewer and cheaper passes over memory.

Run operation by operation, under autocast, more than half of a small student's training step is not arithmetic: each
weight and each state is cast several times, dropout draws a random number per element one after the other, and every
small operation leaves a node in the autograd graph. `fuse` gives a layer a forward and a backward pass of its own: query,
key and value by one product, each weight cast once, what lies between products in one pass where it is compiled (`parts`).
The last layer of the first token alone (`lean`) is such a layer, too; there the states are keys and values of every head.

Precision is that of autocast: products in its dtype, softmax in float32, residual sums and LayerNorm in that of the
states (float32 under autocast). The layer's parameters keep their names. What is not known to fit is left as it is.

Shapes: B rows, L tokens, H hidden size, F inner size, A heads, d head size, T = B * L.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

from pkd_dist.kernels.operations import Kept, Parts, dropout_mask, parts_for
from pkd_dist.model.families import is_bert_like


class Dropout(nn.Dropout):
    """nn.Dropout with cheap random numbers on a CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.device.type != "cpu" or not self.training or not self.p:
            return super().forward(input)
        return input * dropout_mask(tuple(input.shape), self.p, input.dtype)


def fuse(model: nn.Module, layers: nn.ModuleList | None, first_token: bool = False) -> bool:
    """Makes every encoder layer one operation, and all dropouts cheap; in place, for the CPU.

    Args:
        first_token: the last layer computes the first token alone (see `lean.only_first_token`).

    Returns:
        False where the model's family is not known to have such layers: then its dropouts alone are changed.
    """
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = Dropout
    if layers is None or not is_bert_like(model.config):
        return False
    activations = {getattr(model.config, name, "gelu") for name in ("hidden_act", "activation")}
    if activations != {"gelu"}:
        return False
    for layer in layers:
        first = first_token and layer is layers[-1]
        layer.forward = functools.partial(_forward, layer, layer.forward, first)  # type: ignore[method-assign]
    return True


def _forward(
    layer: Any, otherwise: Callable[..., Any], first: bool, hidden_BLH: torch.Tensor,
    attention_mask: torch.Tensor | None = None, *rest: Any, **named: Any,
) -> torch.Tensor:  # fmt: skip
    if hidden_BLH.device.type != "cpu":
        return otherwise(hidden_BLH, attention_mask, *rest, **named)
    weights, heads, dropouts, epsilon = _bert(layer) if hasattr(layer.attention, "self") else _distilbert(layer)
    low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_BLH.dtype
    settings = low, heads, dropouts if layer.training else (0.0, 0.0, 0.0), epsilon, first
    mask_B1L = _additive(attention_mask, low)
    learns, hidden = torch.is_grad_enabled(), hidden_BLH.shape[-1]
    parts = parts_for(low, hidden_BLH.dtype, hidden, hidden // heads, learns)
    with torch.autocast("cpu", enabled=False):
        if learns:
            return _Layer.apply(hidden_BLH.contiguous(), mask_B1L, parts, settings, *weights)
        return _layer(hidden_BLH.contiguous(), mask_B1L, parts, settings, False, weights)[0]


def _bert(layer: Any) -> tuple[list[torch.Tensor], int, tuple[float, float, float], float]:
    inner, after, last = layer.attention.self, layer.attention.output, layer.output
    parts = (inner.query, inner.key, inner.value, after.dense, after.LayerNorm, layer.intermediate.dense, last.dense,
             last.LayerNorm)  # fmt: skip
    dropouts = inner.dropout.p, after.dropout.p, last.dropout.p
    return (
        [w for part in parts for w in (part.weight, part.bias)],
        inner.num_attention_heads,
        dropouts,
        last.LayerNorm.eps,
    )


def _distilbert(layer: Any) -> tuple[list[torch.Tensor], int, tuple[float, float, float], float]:
    inner, ffn = layer.attention, layer.ffn
    parts = (inner.q_lin, inner.k_lin, inner.v_lin, inner.out_lin, layer.sa_layer_norm, ffn.lin1, ffn.lin2,
             layer.output_layer_norm)  # fmt: skip
    dropouts = inner.dropout.p, 0.0, ffn.dropout.p
    return [w for part in parts for w in (part.weight, part.bias)], inner.n_heads, dropouts, layer.sa_layer_norm.eps


def _additive(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """(B, 1, L, L) or (B, 1, 1, L), of booleans or numbers to add -> (B, 1, L), to add to the scores of every head."""
    if mask is None:
        return None
    mask = mask[:, 0, :1]
    if mask.dtype != torch.bool:
        return mask.clamp(min=torch.finfo(dtype).min).to(dtype)  # not -inf: a row of padding alone stays a number
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def _layer(
    hidden_BLH: torch.Tensor, mask_B1L: torch.Tensor | None, parts: Parts, settings: Any, learns: bool, weights: Any
) -> tuple[torch.Tensor, list[torch.Tensor], list[Kept]]:
    """The layer's output, and what its backward pass needs of products and of the parts between them.

    Args:
        settings: the dtype of products; heads; dropout of attention, of its output, of the layer's output; LayerNorm's
            epsilon; whether the output is of the first token alone.
        learns: a backward pass follows.
        weights: weight and bias of query, key, value, output, LayerNorm, inner, outer, LayerNorm.
    """
    low, heads, (p_attention, p_attended, p_output), epsilon, first = settings
    *projections, wo, bo, g1, b1, wi, bi, wu, bu, g2, b2 = weights
    H = hidden_BLH.shape[-1]
    low_BLH, wo, wi, wu = (x.to(low) for x in (hidden_BLH, wo, wi, wu))
    attend, residual = (_attend_first, hidden_BLH[:, 0]) if first else (_attend_all, hidden_BLH.reshape(-1, H))
    context_TH, attention = attend(low_BLH, mask_B1L, parts, heads, p_attention, projections)
    attended_TH = torch.addmm(bo.to(low), context_TH, wo.t())
    norm_1, low_1, before = parts.add_norm(residual.contiguous(), attended_TH, p_attended, g1, b1, epsilon, learns)
    inner_TF = torch.addmm(bi.to(low), low_1, wi.t())
    active_TF, activation = parts.gelu(inner_TF, learns)
    output_TH = torch.addmm(bu.to(low), active_TF, wu.t())
    norm_2, _, after = parts.add_norm(norm_1, output_TH, p_output, g2, b2, epsilon, learns)
    products = [wo, wi, wu, context_TH, low_1, active_TF]
    return norm_2.view(len(hidden_BLH), -1, H), products, [attention, before, activation, after]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BLH: torch.Tensor, mask: Any, parts: Parts, settings: Any, *weights: Any) -> Any:
        out, products, kept = _layer(hidden_BLH, mask, parts, settings, True, weights)
        ctx.save_for_backward(*products, *(tensor for part in kept for tensor in part.tensors))
        ctx.parts, ctx.shape, ctx.first = parts, hidden_BLH.shape, settings[-1]
        ctx.kept = [(len(part.tensors), part.numbers) for part in kept]
        ctx.wide = weights[0].dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BLH: torch.Tensor) -> Any:
        wo, wi, wu, context_TH, low_1, active_TF, *rest = ctx.saved_tensors
        tensors = iter(rest)
        attention, before, activation, after = (
            Kept(list(islice(tensors, count)), numbers) for count, numbers in ctx.kept
        )
        parts = ctx.parts
        residual, output, grad_g2, grad_b2 = parts.add_norm_backward(after, grad_BLH.flatten(0, 1).contiguous())
        inner = parts.gelu_backward(activation, output @ wu)
        grad_u, grad_i = _of_product(output, active_TF), _of_product(inner, low_1)
        residual, attended, grad_g1, grad_b1 = parts.add_norm_backward(before, residual, inner @ wi)
        grad_o = _of_product(attended, context_TH)
        into_attention = _attend_first_backward if ctx.first else _attend_all_backward
        grad_in, projections = into_attention(attention, parts, ctx.shape, attended @ wo, residual)
        of_attention = (grad.to(ctx.wide) for pair in (*projections, grad_o) for grad in pair)
        return (grad_in, None, None, None, *of_attention, grad_g1, grad_b1, *(x.to(ctx.wide) for x in (*grad_i, *grad_u)),
                grad_g2, grad_b2)  # fmt: skip


def _of_product(grad: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of a product's weight and bias."""
    return grad.t() @ states, grad.sum(0)


_Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Of the weights and biases of the projections to query, key and value."""


def _attend_all(
    low_BLH: torch.Tensor, mask_B1L: torch.Tensor | None, parts: Parts, heads: int, p: float, weights: Any
) -> tuple[torch.Tensor, Kept]:
    """The context of every token, (T, H); query, key and value by one product."""
    wq, bq, wk, bk, wv, bv = weights
    B, L, H = low_BLH.shape
    low_TH, w_qkv = low_BLH.view(-1, H), low_BLH.new_empty(3 * H, H)
    for i, w in enumerate((wq, wk, wv)):
        w_qkv[i * H : (i + 1) * H] = w
    qkv = torch.addmm(torch.cat([bq, bk, bv]).to(low_TH.dtype), low_TH, w_qkv.t())
    q, k, v = qkv.view(B, L, 3, heads, -1).unbind(2)
    context, _, kept = parts.attend(q, k, v, mask_B1L, (H // heads) ** -0.5, p)
    return context.reshape(-1, H), Kept([low_TH, w_qkv, *kept.tensors], (heads, *kept.numbers))


def _attend_all_backward(
    kept: Kept, parts: Parts, shape: tuple[int, int, int], grad_TH: torch.Tensor, residual_TH: torch.Tensor
) -> tuple[torch.Tensor, _Pairs]:
    (low_TH, w_qkv, *tensors), (heads, *numbers) = kept
    B, L, H = shape
    qkv_T3H = grad_TH.new_empty(B * L, 3 * H)
    into = qkv_T3H.view(B, L, 3, heads, -1).unbind(2)
    parts.attend_backward(Kept(tensors, tuple(numbers)), grad_TH.view(B, L, heads, -1), None, into)
    weight, bias = _of_product(qkv_T3H, low_TH)
    grad_in = residual_TH + qkv_T3H @ w_qkv
    return grad_in.view(shape), list(zip(weight.split(H), bias.split(H), strict=True))


def _attend_first(
    low_BLH: torch.Tensor, mask_B1L: torch.Tensor | None, parts: Parts, heads: int, p: float, weights: Any
) -> tuple[torch.Tensor, Kept]:
    """The context of the first token, (B, H), without any token's key or value: see `lean.attend_first`. The part of the
    scores that is the same for all keys is left out, as it changes nothing."""
    wq, bq, wk, _, wv, bv = weights
    (B, _, H), low = low_BLH.shape, low_BLH.dtype
    wq, wk, wv = (w.to(low) for w in (wq, wk, wv))
    first_BH = low_BLH[:, 0].contiguous()
    q_ABd = torch.addmm(bq.to(low), first_BH, wq.t()).view(B, heads, -1).transpose(0, 1)
    sought_ABH = q_ABd @ wk.view(heads, -1, H)
    states = low_BLH[:, :, None]
    mean, sums_B1A, kept = parts.attend(_queries(sought_ABH), states, states, mask_B1L, (H // heads) ** -0.5, p)
    mean_ABH = mean[:, :, 0].transpose(0, 1)
    sums_AB1 = sums_B1A[:, 0].t()[..., None]
    shift_ABd = sums_AB1 * bv.view(heads, 1, -1)  # wide
    context_ABd = (mean_ABH @ wv.view(heads, -1, H).transpose(1, 2) + shift_ABd).to(low)
    context_BH = context_ABd.transpose(0, 1).reshape(B, H)
    return context_BH, Kept([first_BH, q_ABd, wq, wk, wv, bv, mean_ABH, sums_AB1, *kept.tensors], kept.numbers)


def _attend_first_backward(
    kept: Kept, parts: Parts, shape: tuple[int, int, int], grad_BH: torch.Tensor, residual_BH: torch.Tensor
) -> tuple[torch.Tensor, _Pairs]:
    first_BH, q_ABd, wq, wk, wv, bv, mean_ABH, sums_AB1, *tensors = kept.tensors
    B, L, H = shape
    heads = len(q_ABd)
    grad_ABd = grad_BH.view(B, heads, -1).transpose(0, 1)
    wide_ABd = grad_ABd.to(sums_AB1.dtype)
    grad_v = (grad_ABd.transpose(1, 2) @ mean_ABH).view(H, H), (wide_ABd * sums_AB1).sum(1).flatten()
    grad_sums_B1A = (wide_ABd * bv.view(heads, 1, -1)).sum(-1).t()[:, None].contiguous()
    grad_mean_ABH = grad_ABd @ wv.view(heads, -1, H)
    sought_ABH, states = grad_BH.new_empty(heads, B, H), grad_BH.new_empty(B, L, 1, H)
    parts.attend_backward(
        Kept(tensors, kept.numbers), _queries(grad_mean_ABH), grad_sums_B1A, (_queries(sought_ABH), states, states)
    )
    grad_k = (q_ABd.transpose(1, 2) @ sought_ABH).view(H, H), torch.zeros_like(bv)
    q_BH = (sought_ABH @ wk.view(heads, -1, H).transpose(1, 2)).transpose(0, 1).reshape(B, H)
    grad_in = states.view(shape).to(residual_BH.dtype)
    grad_in[:, 0] += residual_BH + q_BH @ wq
    return grad_in, [_of_product(q_BH, first_BH), grad_k, grad_v]


def _queries(x_ABH: torch.Tensor) -> torch.Tensor:
    """What each head seeks of the states, as queries of one head: (B, A, 1, H)."""
    return x_ABH.transpose(0, 1)[:, :, None]
