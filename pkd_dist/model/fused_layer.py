"""A BERT or DistilBERT encoder layer for a CPU, with fewer and cheaper passes over memory than operation by operation.

Under autocast, more than half of a small student's training step is not arithmetic: every weight and state is cast several
times, and dropout draws its random numbers one after the other. A `FusedLayer` casts each tensor once, has one matrix
multiplication for query, key and value, an attention with a backward pass of its own, and the masks of `dropout.py`. The last
layer may compute the first token alone; its attention then reads the hidden states as the keys and values of every head.

Precision is autocast's: matrix multiplications in its dtype, softmax in float32, residual sums and LayerNorm in the dtype of
the states (float32 under autocast). Below, the first is the compute dtype and the last the state dtype.

Shapes: B examples, L tokens, Q queries, H hidden size, F inner size, A heads, d head size, T = B * L (B for the first token).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pkd_dist.model.dropout import CpuDropout, drop, dropout_mask
from pkd_dist.model.families import is_bert_like
from pkd_dist.model.specialize import specialize

_MIN_KEYS = 16  # PyTorch does not vectorize a softmax over fewer


def padded_keys(length: int) -> int:
    """Return for how many keys the attention weights of `length` tokens, and their dropout mask, are computed."""
    return max(length, _MIN_KEYS)


def fuse_layers(model: PreTrainedModel, layers: nn.ModuleList | None, first_token_only: bool = False) -> bool:
    """Fuse the encoder layers and speed up all dropouts on a CPU, in place; on other devices, nothing changes.

    Args:
        model: A classifier.
        layers: From `encoder_layers`.
        first_token_only: The last layer computes the first token alone.

    Returns:
        Whether the layers are fused: only BERT's and DistilBERT's layers with GELU are.
    """
    for module in model.modules():
        if type(module) is nn.Dropout:
            specialize(module, CpuDropout)
    if layers is None or not is_bert_like(model.config):
        return False
    if {getattr(model.config, name, "gelu") for name in ("hidden_act", "activation")} != {"gelu"}:
        return False
    mixin: type[FusedLayer] = FusedDistilBertLayer if model.config.model_type == "distilbert" else FusedBertLayer
    for layer in layers:
        specialize(layer, mixin).first_token_only = first_token_only and layer is layers[-1]
    return True


class LayerModules(NamedTuple):
    """The modules and settings of an encoder layer, whatever its attribute names."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_output: nn.Linear
    attention_norm: nn.LayerNorm
    inner: nn.Linear
    outer: nn.Linear
    output_norm: nn.LayerNorm
    heads: int
    dropouts: tuple[float, float, float]
    """Of the attention weights, of the attention output, of the layer's output."""


class FusedLayer(nn.Module):
    """Mixin, placed before a transformers layer class: its own forward pass on a CPU, the class's elsewhere."""

    first_token_only = False
    """Output (B, 1, H), the first token alone, instead of (B, L, H)."""

    def layer_modules(self) -> LayerModules:
        """Return the layer's modules and settings."""
        raise NotImplementedError

    def forward(
        self, hidden_BLH: torch.Tensor, attention_mask: torch.Tensor | None = None, *args: object, **kwargs: object
    ) -> torch.Tensor:
        if hidden_BLH.device.type != "cpu":
            return super().forward(hidden_BLH, attention_mask, *args, **kwargs)
        compute_dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_BLH.dtype
        modules, mask_B1L = self.layer_modules(), _additive(attention_mask, compute_dtype)
        p_weights, p_attended, p_output = modules.dropouts if self.training else (0.0, 0.0, 0.0)
        with torch.autocast("cpu", enabled=False):
            if self.first_token_only:
                residual_TH = hidden_BLH[:, 0]
                context_TH = _attend_first(modules, hidden_BLH, residual_TH, mask_B1L, p_weights, compute_dtype)
            else:
                residual_TH = hidden_BLH.flatten(0, 1)
                context_TH = _attend_all(modules, hidden_BLH.to(compute_dtype), mask_B1L, p_weights)
            attended_TH = drop(_linear(modules.attention_output, context_TH), p_attended)
            norm_TH = _norm(modules.attention_norm, residual_TH + attended_TH)
            active_TF = F.gelu(_linear(modules.inner, norm_TH.to(compute_dtype)))
            output_TH = drop(_linear(modules.outer, active_TF), p_output)
            return _norm(modules.output_norm, norm_TH + output_TH).view(len(hidden_BLH), -1, hidden_BLH.shape[-1])


class FusedBertLayer(FusedLayer):
    """For layers of the families that copy BERT's."""

    attention: Any
    intermediate: Any
    output: Any

    def layer_modules(self) -> LayerModules:
        inner, after, last = self.attention.self, self.attention.output, self.output
        return LayerModules(
            inner.query, inner.key, inner.value, after.dense, after.LayerNorm, self.intermediate.dense, last.dense,
            last.LayerNorm, inner.num_attention_heads, (inner.dropout.p, after.dropout.p, last.dropout.p),
        )  # fmt: skip


class FusedDistilBertLayer(FusedLayer):
    """For DistilBERT's layers."""

    attention: Any
    ffn: Any
    sa_layer_norm: nn.LayerNorm
    output_layer_norm: nn.LayerNorm

    def layer_modules(self) -> LayerModules:
        inner, ffn = self.attention, self.ffn
        return LayerModules(
            inner.q_lin, inner.k_lin, inner.v_lin, inner.out_lin, self.sa_layer_norm, ffn.lin1, ffn.lin2,
            self.output_layer_norm, inner.n_heads, (inner.dropout.p, 0.0, ffn.dropout.p),
        )  # fmt: skip


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


def _linear(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, module.weight.to(x.dtype), module.bias.to(x.dtype))


def _norm(module: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)


def _attend_all(
    modules: LayerModules, hidden_BLH: torch.Tensor, mask_B1L: torch.Tensor | None, p: float
) -> torch.Tensor:
    """Return the context of every token, (T, H), with one matrix multiplication for query, key and value.

    Args:
        hidden_BLH: Compute dtype.
        mask_B1L: From `_additive`.
        p: Dropout probability of the attention weights.
    """
    (B, L, H), dtype, projections = hidden_BLH.shape, hidden_BLH.dtype, (modules.query, modules.key, modules.value)
    weight = torch.cat([linear.weight.to(dtype) for linear in projections])
    bias = torch.cat([linear.bias.to(dtype) for linear in projections])
    qkv = F.linear(hidden_BLH.reshape(-1, H), weight, bias)
    q, k, v = qkv.view(B, L, 3, modules.heads, -1).unbind(2)
    context_BLAd, _ = _Attention.apply(q, k, v, mask_B1L, (H // modules.heads) ** -0.5, p, False)
    return context_BLAd.reshape(-1, H)


def _attend_first(
    modules: LayerModules,
    hidden_BLH: torch.Tensor,
    first_BH: torch.Tensor,
    mask_B1L: torch.Tensor | None,
    p: float,
    compute_dtype: torch.dtype,
) -> torch.Tensor:
    """Return the context of the first token, (B, H), compute dtype, without any token's key or value.

    `first_token.py` has the formula. The key's bias adds the same number to all scores of a head.

    Args:
        hidden_BLH: State dtype.
        first_BH: The states of the first token, state dtype, so that the gradients of all their uses are summed in it.
        mask_B1L: From `_additive`.
        p: Dropout probability of the attention weights.
    """
    B, H = first_BH.shape
    states_BL1H, heads = hidden_BLH.to(compute_dtype)[:, :, None], modules.heads
    wk_AdH, wv_AdH = (linear.weight.to(compute_dtype).view(heads, -1, H) for linear in (modules.key, modules.value))
    q_ABd = _linear(modules.query, first_BH.to(compute_dtype)).view(B, heads, -1).transpose(0, 1)
    q_BA1H = (q_ABd @ wk_AdH).transpose(0, 1)[:, :, None]  # as A queries of a single head of size H
    mean_BA1H, sums_B1A = _Attention.apply(q_BA1H, states_BL1H, states_BL1H, mask_B1L, (H // heads) ** -0.5, p, True)
    mean_ABH, sums_AB1 = mean_BA1H[:, :, 0].transpose(0, 1), sums_B1A[:, 0].t()[..., None]
    bias_H = modules.value.bias + 0 * modules.key.bias  # not in the compute dtype; the key's gets a gradient of zero
    shift_ABd = sums_AB1 * bias_H.view(heads, 1, -1)
    context_ABd = (_HeadLinear.apply(mean_ABH, wv_AdH) + shift_ABd).to(compute_dtype)
    return context_ABd.transpose(0, 1).reshape(B, H)


class _HeadLinear(torch.autograd.Function):
    """Apply a weight for each head, (A, B, H) to (A, B, d), and compute its gradient in the weight's own layout."""

    @staticmethod
    def forward(ctx: Any, x_ABH: torch.Tensor, weight_AdH: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_ABH, weight_AdH)
        return x_ABH @ weight_AdH.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ABd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_ABH, weight_AdH = ctx.saved_tensors
        return grad_ABd @ weight_AdH, grad_ABd.transpose(1, 2) @ x_ABH


class _Attention(torch.autograd.Function):
    """Attention whose softmax is in float32, or wider, and that saves its weights in the compute dtype."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BQAd: torch.Tensor,
        k_BLAd: torch.Tensor,
        v_BLAd: torch.Tensor,
        mask_B1L: torch.Tensor | None,
        scale: float,
        p: float,
        with_sums: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the context and, if asked for, the sums of the attention weights.

        Args:
            q_BQAd, k_BLAd, v_BLAd: Queries, keys, values, compute dtype.
            mask_B1L: Added to the scores, compute dtype.
            scale: Factor of the scores.
            p: Dropout probability of the attention weights.

        Returns:
            Context (B, Q, A, d), compute dtype, and the sums (B, A, Q) of the weights after dropout, 1 without it, in the
            dtype of the softmax.
        """
        (B, Q, A, _), L, dtype = q_BQAd.shape, k_BLAd.shape[1], q_BQAd.dtype
        softmax_dtype, keys = torch.promote_types(dtype, torch.float32), padded_keys(L)
        q, k, v = _by_head(q_BQAd, Q), _by_head(k_BLAd, keys), _by_head(v_BLAd, keys)
        if keys > L:
            mask_B1L = q_BQAd.new_zeros(B, 1, L) if mask_B1L is None else mask_B1L
            mask_B1L = F.pad(mask_B1L, (0, keys - L), value=torch.finfo(dtype).min)
        if mask_B1L is None:
            scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
        else:
            added = mask_B1L[:, None].expand(B, A, 1, keys).reshape(-1, 1, keys).expand(-1, Q, keys)
            scores = torch.baddbmm(added, q, k.transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores.to(softmax_dtype), -1).to(dtype)
        kept = dropout_mask(tuple(weights.shape), p, dtype) if p else None
        dropped = weights if kept is None else weights * kept
        ctx.save_for_backward(q, k, v, weights, kept)
        ctx.scale, ctx.heads, ctx.length = scale, A, L
        ctx.set_materialize_grads(False)
        context_BQAd = torch.bmm(dropped, v).view(B, A, Q, -1).transpose(1, 2)
        return context_BQAd, dropped.sum(-1, dtype=softmax_dtype).view(B, A, Q) if with_sums else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_BQAd: torch.Tensor, grad_sums_BAQ: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        q, k, v, weights, kept = ctx.saved_tensors
        grad_context = _by_head(grad_BQAd, grad_BQAd.shape[1])
        grad_weights = torch.bmm(grad_context, v.transpose(1, 2))
        if grad_sums_BAQ is not None:
            grad_weights += grad_sums_BAQ.reshape(len(weights), -1, 1).to(weights.dtype)
        if kept is not None:
            grad_weights *= kept
        dropped, wide = weights if kept is None else weights * kept, torch.promote_types(weights.dtype, torch.float32)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights.to(wide), weights.to(wide), -1, wide)
        grad_scores = grad_scores.mul_(ctx.scale).to(weights.dtype)
        grads = (
            torch.bmm(grad_scores, k),
            torch.bmm(grad_scores.transpose(1, 2), q)[:, : ctx.length],
            torch.bmm(dropped.transpose(1, 2), grad_context)[:, : ctx.length],
        )
        return *(grad.unflatten(0, (-1, ctx.heads)).transpose(1, 2) for grad in grads), None, None, None, None


def _by_head(x_BLAd: torch.Tensor, rows: int) -> torch.Tensor:
    """Return (B * A, rows, d), padded with zeros to `rows`."""
    B, L, A, d = x_BLAd.shape
    if rows == L:
        return x_BLAd.transpose(1, 2).reshape(B * A, L, d)
    out = x_BLAd.new_zeros(B, A, rows, d)
    out[:, :, :L] = x_BLAd.transpose(1, 2)
    return out.view(B * A, rows, d)
