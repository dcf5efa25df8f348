"""An encoder layer of BERT as one operation on a CPU: the same computation in fewer and cheaper passes over memory.

Run operation by operation, under autocast, more than half of a small student's training step is not arithmetic: each
weight and each state is cast several times, dropout draws a random number per element one after the other, and every
small operation leaves a node in the autograd graph. `fuse` gives a layer a forward and a backward pass of its own: query,
key and value by one product, each weight cast once, dropout from 15 random bits per element.

Precision is that of autocast: products in its dtype, softmax in float32, residual sums and LayerNorm in that of the
states (float32 under autocast). The layer's parameters keep their names. What is not known to fit is left as it is.

Shapes: B rows, L tokens, H hidden size, F inner size, T = B * L.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from pkd_dist.model.lean import is_bert_like

_BITS = 15
_FEWEST_KEYS = 16  # softmax over fewer is done number by number


def dropout_mask(shape: tuple[int, ...], p: float, dtype: torch.dtype) -> torch.Tensor:
    """What dropout multiplies by: 0 with probability `p` (in steps of 2**-15), else 1 / (1 - p), on the CPU.

    Drawn from torch's default generator, so `torch.manual_seed` decides it.
    """
    count = math.prod(shape)
    seed = int(torch.randint(2**62, ()))
    bits = torch.from_numpy(np.random.SFC64(seed).random_raw(-(-count // 4)).view(np.int16))[:count].view(shape)
    bits &= 2**_BITS - 1
    keep = torch.rsub(bits, round(p * 2**_BITS) - 1)  # below 0 where kept
    keep >>= _BITS  # all bits, or none
    if dtype != torch.bfloat16:
        return keep.to(dtype).mul_(-1 / (1 - p))
    keep &= _bits_of(1 / (1 - p))
    return keep.view(dtype)


@functools.cache
def _bits_of(number: float) -> int:
    return int(torch.tensor(number, dtype=torch.bfloat16).view(torch.int16))


class Dropout(nn.Dropout):
    """nn.Dropout with cheap random numbers on a CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.device.type != "cpu" or not self.training or not self.p:
            return super().forward(input)
        return input * dropout_mask(tuple(input.shape), self.p, input.dtype)


def fuse(model: nn.Module, layers: nn.ModuleList | None) -> bool:
    """Makes every encoder layer one operation, and all dropouts cheap; in place, for the CPU.

    A layer whose forward pass was replaced before keeps it.

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
        if "forward" not in vars(layer):
            layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]
    return True


def _forward(
    layer: Any, hidden_BLH: torch.Tensor, attention_mask: torch.Tensor | None = None, *rest: Any, **named: Any
) -> torch.Tensor:
    if hidden_BLH.device.type != "cpu":
        return type(layer).forward(layer, hidden_BLH, attention_mask, *rest, **named)
    weights, heads, dropouts, epsilon = _bert(layer) if hasattr(layer.attention, "self") else _distilbert(layer)
    settings = heads, dropouts if layer.training else (0.0, 0.0, 0.0), epsilon
    low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_BLH.dtype
    mask_B1L = _additive(attention_mask, low)
    with torch.autocast("cpu", enabled=False):
        if torch.is_grad_enabled():
            return _Layer.apply(hidden_BLH, mask_B1L, low, settings, *weights)
        return _layer(hidden_BLH, mask_B1L, low, settings, weights)[0]


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


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _by_head(qkv_BL3Ad: torch.Tensor, keys: int) -> Sequence[torch.Tensor]:
    """Query (B * A, L, d), key and value (B * A, keys, d), zeros where there are more keys than tokens. A: heads."""
    B, L, _, A, d = qkv_BL3Ad.shape
    qkv_3BALd = qkv_BL3Ad.permute(2, 0, 3, 1, 4)
    if keys == L:
        return qkv_3BALd.reshape(3, B * A, L, d).unbind()
    kv = qkv_BL3Ad.new_zeros(2, B, A, keys, d)
    kv[..., :L, :] = qkv_3BALd[1:]
    return qkv_3BALd[0].reshape(B * A, L, d), *kv.view(2, B * A, keys, d).unbind()


def _layer(
    hidden_BLH: torch.Tensor, mask_B1L: torch.Tensor | None, low: torch.dtype, settings: Any, weights: Any
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The layer's output, and what its backward pass needs.

    Args:
        low: the dtype of products.
        settings: heads; dropout of attention, of its output, of the layer's output; LayerNorm's epsilon.
        weights: weight and bias of query, key, value, output, LayerNorm, inner, outer, LayerNorm.
    """
    heads, (p_attention, p_attended, p_output), epsilon = settings
    wq, bq, wk, bk, wv, bv, wo, bo, g1, b1, wi, bi, wu, bu, g2, b2 = weights
    B, L, H = hidden_BLH.shape
    size, keys = H // heads, max(L, _FEWEST_KEYS)
    in_TH = hidden_BLH.reshape(-1, H)
    low_TH = in_TH.to(low)
    w_qkv = torch.empty(3 * H, H, dtype=low)
    for i, w in enumerate((wq, wk, wv)):
        w_qkv[i * H : (i + 1) * H] = w
    qkv = torch.addmm(torch.cat([bq, bk, bv]).to(low), low_TH, w_qkv.t())
    q, k, v = _by_head(qkv.view(B, L, 3, heads, size), keys)
    if keys > L:
        mask_B1L = low_TH.new_zeros(B, 1, L) if mask_B1L is None else mask_B1L
        mask_B1L = F.pad(mask_B1L, (0, keys - L), value=torch.finfo(low).min)
    if mask_B1L is None:
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(size**-0.5)
    else:
        added = mask_B1L[:, None].expand(B, heads, 1, keys).reshape(-1, 1, keys).expand(-1, L, keys)
        scores = torch.baddbmm(added, q, k.transpose(1, 2), alpha=size**-0.5)
    p = torch.softmax(scores.to(_exact(low)), -1).to(low)
    kept_p = dropout_mask(tuple(p.shape), p_attention, low) if p_attention else None
    context = torch.bmm(p if kept_p is None else p * kept_p, v)
    context_TH = context.view(B, heads, L, size).transpose(1, 2).reshape(-1, H)
    wo, wi, wu = wo.to(low), wi.to(low), wu.to(low)

    attended_TH = torch.addmm(bo.to(low), context_TH, wo.t())
    kept_1 = dropout_mask((B * L, H), p_attended, low) if p_attended else None
    sum_1 = in_TH + (attended_TH if kept_1 is None else attended_TH.mul_(kept_1))
    norm_1, mean_1, rstd_1 = torch.native_layer_norm(sum_1, [H], g1, b1, epsilon)
    low_1 = norm_1.to(low)

    inner_TF = torch.addmm(bi.to(low), low_1, wi.t())
    active_TF = F.gelu(inner_TF)
    output_TH = torch.addmm(bu.to(low), active_TF, wu.t())
    kept_2 = dropout_mask((B * L, H), p_output, low) if p_output else None
    sum_2 = norm_1 + (output_TH if kept_2 is None else output_TH.mul_(kept_2))
    norm_2, mean_2, rstd_2 = torch.native_layer_norm(sum_2, [H], g2, b2, epsilon)
    kept = [low_TH, w_qkv, wo, wi, wu, q, k, v, p, kept_p, context_TH, kept_1, sum_1, mean_1, rstd_1, g1, b1, low_1,
            inner_TF, active_TF, kept_2, sum_2, mean_2, rstd_2, g2, b2]  # fmt: skip
    return norm_2.view(B, L, H), kept


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BLH: torch.Tensor, mask: Any, low: torch.dtype, settings: Any, *weights: Any) -> Any:
        out, kept = _layer(hidden_BLH, mask, low, settings, weights)
        ctx.save_for_backward(*kept)
        ctx.heads, ctx.low, ctx.shape = settings[0], low, hidden_BLH.shape
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BLH: torch.Tensor) -> Any:
        (low_TH, w_qkv, wo, wi, wu, q, k, v, p, kept_p, context_TH, kept_1, sum_1, mean_1, rstd_1, g1, b1, low_1,
         inner_TF, active_TF, kept_2, sum_2, mean_2, rstd_2, g2, b2) = ctx.saved_tensors  # fmt: skip
        low, heads, (B, L, H) = ctx.low, ctx.heads, ctx.shape
        size, wide = H // heads, g1.dtype

        def normed(grad: Any, total: Any, mean: Any, rstd: Any, gain: Any, bias: Any) -> Any:
            return torch.ops.aten.native_layer_norm_backward(
                grad, total, [H], mean, rstd, gain, bias, [True, True, True]
            )

        def lowered(grad: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
            grad = grad.to(low)
            return grad if mask is None else grad * mask

        def into(grad: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Of a product's weight and bias."""
            return (grad.t() @ states).to(wide), grad.sum(0).to(wide)

        residual_2, grad_g2, grad_b2 = normed(grad_BLH.reshape(-1, H), sum_2, mean_2, rstd_2, g2, b2)
        output = lowered(residual_2, kept_2)
        inner = torch.ops.aten.gelu_backward(output @ wu, inner_TF)
        grad_u, grad_i = into(output, active_TF), into(inner, low_1)
        residual_2 += inner @ wi  # not before: without dropout, in one precision, `output` is the same tensor
        residual_1, grad_g1, grad_b1 = normed(residual_2, sum_1, mean_1, rstd_1, g1, b1)
        attended = lowered(residual_1, kept_1)
        grad_o = into(attended, context_TH)

        context = (attended @ wo).view(B, L, heads, size).transpose(1, 2).reshape(-1, L, size)
        grad_qkv = context.new_empty(B, L, 3, heads, size)
        into_heads = grad_qkv.permute(2, 0, 3, 1, 4)
        grad_p = torch.bmm(context, v.transpose(1, 2))
        dropped = p
        if kept_p is not None:
            grad_p.mul_(kept_p)
            dropped = p * kept_p
        exact = _exact(low)
        scores = torch.ops.aten._softmax_backward_data(grad_p.to(exact), p.to(exact), -1, exact)
        scores = scores.mul_(size**-0.5).to(low)
        for i, grad in enumerate(
            (torch.bmm(scores, k), torch.bmm(scores.transpose(1, 2), q), torch.bmm(dropped.transpose(1, 2), context))
        ):
            into_heads[i] = grad.view(B, heads, -1, size)[:, :, :L]
        qkv_T3H = grad_qkv.view(B * L, 3 * H)
        residual_1 += qkv_T3H @ w_qkv
        grad_w, grad_b = into(qkv_T3H, low_TH)
        projections = [part for i in range(3) for part in (grad_w[i * H : (i + 1) * H], grad_b[i * H : (i + 1) * H])]
        return (residual_1.view(B, L, H), None, None, None, *projections, *grad_o, grad_g1, grad_b1, *grad_i, *grad_u,
                grad_g2, grad_b2)  # fmt: skip
