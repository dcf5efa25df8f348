"""An encoder layer of BERT as one operation on a CPU: the same computation in fewer and cheaper passes over memory.

Run operation by operation, under autocast, more than half of a small student's training step is not arithmetic: each
weight and each state is cast several times, dropout draws a random number per element one after the other, and every
small operation leaves a node in the autograd graph. `fuse` gives a layer a forward and a backward pass of its own: query,
key and value by one product, each weight cast once, what lies between products in one pass where it is compiled (`parts`).

Precision is that of autocast: products in its dtype, softmax in float32, residual sums and LayerNorm in that of the
states (float32 under autocast). The layer's parameters keep their names. What is not known to fit is left as it is.

Shapes: B rows, L tokens, H hidden size, F inner size, T = B * L.
"""

from __future__ import annotations

import types
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pkd_dist.model.lean import is_bert_like
from pkd_dist.model.parts import Kept, Parts, dropout_mask, parts_for


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
    low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_BLH.dtype
    settings = low, heads, dropouts if layer.training else (0.0, 0.0, 0.0), epsilon
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
            epsilon.
        learns: a backward pass follows.
        weights: weight and bias of query, key, value, output, LayerNorm, inner, outer, LayerNorm.
    """
    low, heads, (p_attention, p_attended, p_output), epsilon = settings
    wq, bq, wk, bk, wv, bv, wo, bo, g1, b1, wi, bi, wu, bu, g2, b2 = weights
    B, L, H = hidden_BLH.shape
    in_TH = hidden_BLH.reshape(-1, H)
    low_TH = in_TH.to(low)
    w_qkv = torch.empty(3 * H, H, dtype=low)
    for i, w in enumerate((wq, wk, wv)):
        w_qkv[i * H : (i + 1) * H] = w
    wo, wi, wu = wo.to(low), wi.to(low), wu.to(low)
    qkv = torch.addmm(torch.cat([bq, bk, bv]).to(low), low_TH, w_qkv.t())
    context_TH, attention = parts.attend(qkv.view(B, L, 3, heads, -1), mask_B1L, p_attention)
    attended_TH = torch.addmm(bo.to(low), context_TH, wo.t())
    norm_1, low_1, first = parts.add_norm(in_TH, attended_TH, p_attended, g1, b1, epsilon, learns)
    inner_TF = torch.addmm(bi.to(low), low_1, wi.t())
    active_TF = F.gelu(inner_TF)
    output_TH = torch.addmm(bu.to(low), active_TF, wu.t())
    norm_2, _, second = parts.add_norm(norm_1, output_TH, p_output, g2, b2, epsilon, learns)
    products = [low_TH, w_qkv, wo, wi, wu, context_TH, low_1, inner_TF, active_TF]
    return norm_2.view(B, L, H), products, [attention, first, second]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BLH: torch.Tensor, mask: Any, parts: Parts, settings: Any, *weights: Any) -> Any:
        out, products, kept = _layer(hidden_BLH, mask, parts, settings, True, weights)
        ctx.save_for_backward(*products, *(tensor for part in kept for tensor in part.tensors))
        ctx.parts, ctx.shape = parts, hidden_BLH.shape
        ctx.kept = [(len(part.tensors), part.numbers) for part in kept]
        ctx.wide = weights[0].dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BLH: torch.Tensor) -> Any:
        low_TH, w_qkv, wo, wi, wu, context_TH, low_1, inner_TF, active_TF, *rest = ctx.saved_tensors
        tensors = iter(rest)
        attention, first, second = (Kept(list(islice(tensors, count)), numbers) for count, numbers in ctx.kept)
        H, parts, wide = grad_BLH.shape[-1], ctx.parts, ctx.wide

        def into(grad: torch.Tensor, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            """Of a product's weight and bias."""
            return (grad.t() @ states).to(wide), grad.sum(0).to(wide)

        residual, output, grad_g2, grad_b2 = parts.add_norm_backward(second, grad_BLH.reshape(-1, H).contiguous())
        inner = torch.ops.aten.gelu_backward(output @ wu, inner_TF)
        grad_u, grad_i = into(output, active_TF), into(inner, low_1)
        residual, attended, grad_g1, grad_b1 = parts.add_norm_backward(first, residual, inner @ wi)
        grad_o = into(attended, context_TH)
        qkv_T3H = parts.attend_backward(attention, attended @ wo)
        grad_w, grad_b = into(qkv_T3H, low_TH)
        projections = [part for i in range(3) for part in (grad_w[i * H : (i + 1) * H], grad_b[i * H : (i + 1) * H])]
        grad_in = (residual + qkv_T3H @ w_qkv).view(ctx.shape)
        return (grad_in, None, None, None, *projections, *grad_o, grad_g1, grad_b1, *grad_i, *grad_u,
                grad_g2, grad_b2)  # fmt: skip
