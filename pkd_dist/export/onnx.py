"""A student as an ONNX graph or a `torch.export` program: write it, fuse it, make it smaller.

    live model -> last layer at [CLS] alone, fused attention -> torch.onnx -> ONNX Runtime's fusions -> float16 | int8

A graph takes the tokenizer's outputs (`input_ids`, `attention_mask`, ... int64, (B, L), both axes dynamic) and returns
`logits` (B, C) in float32. Of multiple choice, it takes (B, C, L), all axes dynamic, with the C options of each example. Attention
uses ONNX Runtime's own operators, with query, key and value in one matrix multiplication. The last layer of a family that reads
[CLS] alone computes that row alone.

Shapes: B examples, L tokens, H hidden size, Q = 3H, C classes, A heads, d head size.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import nn
from torch.fx import GraphModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pkd_dist.errors import UserError
from pkd_dist.export import int8
from pkd_dist.files import is_full
from pkd_dist.model.encoder import accepted
from pkd_dist.model.families import encoder_layers
from pkd_dist.model.first_token import Attend, only_first_token
from pkd_dist.model.head import is_multiple_choice

if TYPE_CHECKING:
    from google.protobuf.message import Message

OPSET = 20
_PROJECTIONS = {"distilbert": ("q_lin", "k_lin", "v_lin")}
_DEFAULT_PROJECTIONS = ("query", "key", "value")
"""Names of the linear layers of an attention module, by family."""
_FUSED = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert")
"""Families whose attention is that of ONNX Runtime's operator; others are exported as they are."""


class _Function(nn.Module):
    """A classifier as a function of token ids, (B, L) each -> logits_BC. Changes the model in place.

    Args:
        attend: Attention of the first token in the last layer; None: `first_token.attend_first`.
    """

    def __init__(self, model: PreTrainedModel, attend: Attend | None = None):
        super().__init__()
        self.model = model
        layers = encoder_layers(model)[1]
        lean = only_first_token(model, layers, attend)
        self._lean_modules = set(layers[-1].modules()) if lean and layers is not None else set()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        types_BL = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        logits_BC: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, **types_BL).logits
        return logits_BC


class _Padding:
    """Carries the padding mask of a forward pass to the attention modules.

    ONNX Runtime's operator wants the tokenizer's mask; `transformers` passes its modules an expanded one.
    """

    mask_BL: torch.Tensor


class _FusedFunction(_Function):
    """The same function with ONNX Runtime's attention operator."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model, self._attend_first)
        self._padding = _Padding()
        names = _PROJECTIONS.get(model.config.model_type, _DEFAULT_PROJECTIONS)
        for path, module in list(model.named_modules()):
            is_attention = all(isinstance(getattr(module, name, None), nn.Linear) for name in names)
            if is_attention and module not in self._lean_modules:
                model.set_submodule(path, _FusedAttention(module, names, self._padding))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        self._padding.mask_BL = attention_mask.flatten(0, -2).to(torch.int32)
        return super().forward(input_ids, attention_mask, token_type_ids)

    def _attend_first(
        self, projections: Sequence[nn.Module], head_size: int, hidden_BLH: torch.Tensor, *_: object
    ) -> torch.Tensor:
        """Compute `first_token.attend_first` in few and small operations, without dropout; (B, 1, H)."""
        query, key, value = cast("Sequence[nn.Linear]", projections)
        key_AdH, value_AdH = (part.weight.detach().unflatten(0, (-1, head_size)) for part in (key, value))
        query_ABd = query(hidden_BLH[:, 0]).unflatten(-1, (-1, head_size)).transpose(0, 1)
        sought_ABH = query_ABd @ (key_AdH * head_size**-0.5)
        scores_BAL = (hidden_BLH @ sought_ABH.permute(1, 2, 0)).transpose(1, 2)
        mask_BL = self._padding.mask_BL.to(scores_BAL.dtype)
        padding_B1L = (1 - mask_BL)[:, None] * torch.finfo(scores_BAL.dtype).min
        mean_ABH = ((scores_BAL + padding_B1L).softmax(-1) @ hidden_BLH).transpose(0, 1)
        context_BH = (mean_ABH @ value_AdH.transpose(1, 2)).transpose(0, 1).flatten(1) + value.bias
        return context_BH[:, None]


class _FusedAttention(nn.Module):
    """Takes the place of an attention module of `transformers`: ONNX Runtime's operator, then what follows it there.

    Args:
        attention: The module; its submodules are shared.
        names: Its projections to query, key and value.
    """

    def __init__(self, attention: nn.Module, names: Sequence[str], padding: _Padding):
        super().__init__()
        for name, child in attention.named_children():
            self.add_module(name, child)
        linears = [attention.get_submodule(name) for name in names]
        self._heads = int(linears[0].out_features) // int(attention.attention_head_size)  # type: ignore[arg-type]
        weight_HQ = torch.cat([linear.weight.detach().T for linear in linears], dim=1)  # type: ignore[operator]
        bias_Q = torch.cat([linear.bias.detach() for linear in linears])  # type: ignore[operator]
        self._weight_and_bias = (weight_HQ, bias_Q)  # in a tuple, so that the exporter takes them for constants
        self._padding = padding

    def forward(self, hidden_BLH: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, None]:
        context_BLH = torch.onnx.ops.symbolic(
            "com.microsoft::Attention", (hidden_BLH, *self._weight_and_bias, self._padding.mask_BL),
            {"num_heads": self._heads}, dtype=hidden_BLH.dtype, shape=hidden_BLH.shape, version=1,
        )  # fmt: skip
        children = dict(self.named_children())
        if "out_lin" in children:  # DistilBERT
            return children["out_lin"](context_BLH), None
        if "dense" in children:  # ALBERT
            return children["LayerNorm"](hidden_BLH + children["dense"](context_BLH)), None
        return context_BLH, None


def _is_fused(model: PreTrainedModel) -> bool:
    config = model.config
    return config.model_type in _FUSED and getattr(config, "position_embedding_type", "absolute") == "absolute"


class _Trace(NamedTuple):
    """A copy of a model as a function, an example of its inputs, and their dynamic axes."""

    function: nn.Module
    inputs: dict[str, torch.Tensor]
    dynamic_shapes: dict[str, dict[int, object]]


def _trace(
    kind: Callable[[PreTrainedModel], _Function],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    axes: tuple[object, ...],
) -> _Trace:
    """Prepare a model for an exporter.

    Args:
        axes: The exporter's way to say that an axis is dynamic, for batch, options (of multiple choice alone) and length.
    """
    example = tokenizer(["one text", "another one, of more words"], padding=True, return_tensors="pt")
    inputs = accepted(model, example)
    if is_multiple_choice(model.config):
        inputs = {name: torch.stack([value] * 3, dim=1) for name, value in inputs.items()}
    else:
        axes = axes[::2]
    function = kind(copy.deepcopy(model).cpu().eval()).requires_grad_(False)
    return _Trace(function, inputs, dict.fromkeys(inputs, dict(enumerate(axes))))


@contextlib.contextmanager
def _exporting(source: str, target: str) -> Iterator[None]:
    """Turn the many kinds of exceptions of exporters into a UserError of one line, and silence their output."""
    try:
        with _quiet():
            yield
    except Exception as error:
        if is_full(error):
            raise
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        first = f"{type(cause).__name__}: {cause}".strip().partition("\n")[0]
        raise UserError(
            f"{source} cannot be written as {target} ({first}); leave {target} out of it", "export.formats"
        ) from error


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write the fused float32 graph.

    Raises:
        UserError: Models of this family cannot be exported.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    config, fusions = model.config, FusionOptions("bert")
    fusions.enable_skip_layer_norm = config.model_type in _FUSED  # fails on norms without bias
    kind = _FusedFunction if _is_fused(model) else _Function
    with _exporting(f"a {config.model_type}", "onnx"):
        trace = _trace(kind, model, tokenizer, ("batch", "options", "length"))
        program = torch.onnx.export(
            trace.function, (), kwargs=trace.inputs, dynamic_shapes=trace.dynamic_shapes, dynamo=True, opset_version=OPSET,
            input_names=list(trace.inputs), output_names=["logits"], external_data=False, verbose=False,
        )  # fmt: skip
        assert program is not None
        fused = optimize_model(
            program.model_proto, "bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size, opt_level=0,
            optimization_options=fusions,
        )  # fmt: skip
        _forget_source(fused.model)
        fused.save_model_to_file(str(path))


def _forget_source(message: Message) -> None:
    """Remove what exporters note of each part of a graph: stack traces, which name files of this machine."""
    for name in ("doc_string", "metadata_props"):
        if name in message.DESCRIPTOR.fields_by_name:
            message.ClearField(name)
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                _forget_source(part)


def split_norms(path: Path) -> None:
    """Split every SkipLayerNormalization into a sum and a norm, in place.

    On a CPU the fused operator of ONNX Runtime takes twice as long as the two. A Sum, unlike an Add, is not fused again when
    the graph is loaded.
    """
    import onnx

    model = onnx.load(path)
    nodes = []
    for node in model.graph.node:
        if node.op_type != "SkipLayerNormalization" or any(node.output[1:]):
            nodes.append(node)
            continue
        states, skipped, gain, shift, *bias = node.input
        total, (epsilon,) = f"{node.output[0]}_sum", (a.f for a in node.attribute if a.name == "epsilon")
        nodes += [
            onnx.helper.make_node("Sum", [states, skipped, *bias], [total]),
            onnx.helper.make_node("LayerNormalization", [total, gain, shift], [node.output[0]], epsilon=epsilon),
        ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, path)


def write_program(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write a `torch.export` program; `torch.export.load(path).module()(**inputs)` runs it without `transformers`.

    Raises:
        UserError: Models of this family cannot be exported.
    """
    with _exporting(f"a {model.config.model_type}", "torch-export"):
        dynamic = torch.export.Dim.DYNAMIC
        trace = _trace(_Function, model, tokenizer, (dynamic, dynamic, dynamic))
        program = torch.export.export(trace.function, (), kwargs=trace.inputs, dynamic_shapes=trace.dynamic_shapes)
        for module in program.graph_module.modules():
            for node in module.graph.nodes if isinstance(module, GraphModule) else ():
                node.meta.pop("stack_trace", None)  # names files of this machine
        torch.export.save(program, path)


def write_half(source: Path, path: Path) -> None:
    """Write a float32 graph in float16, for GPUs; its logits stay float32.

    Raises:
        UserError: The graph cannot be converted.
    """
    import onnx
    from onnxruntime.transformers.onnx_model import OnnxModel

    with _exporting("this graph", "onnx-fp16"):
        model = OnnxModel(onnx.load(source))
        model.convert_float_to_float16(keep_io_types=True, use_symbolic_shape_infer=False)
        model.save_model_to_file(str(path))


def write_int8(source: Path, path: Path, how: str) -> None:
    """Do what `int8.write` does.

    Raises:
        UserError: The graph cannot be converted.
    """
    with _exporting("this graph", "onnx-int8"):
        int8.write(source, path, how)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress output of exporters and optimizers; failures raise exceptions."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
