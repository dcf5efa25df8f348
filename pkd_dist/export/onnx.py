"""A student as an ONNX graph: written, fused, and made smaller.

    live model -> savings of `lean.py` and fused attention -> torch.onnx -> ONNX Runtime's fusions -> float16 | int8

The graph takes what the tokenizer gives (`input_ids`, `attention_mask`, ... int64, (B, L), both axes free) and returns
`logits` (B, C) in float32. Attention is written as ONNX Runtime's own operators, with query, key and value in one
product; the last layer of a family that reads [CLS] alone computes that one row.

Shapes: B rows, L tokens, H hidden size, C classes.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from pkd_dist.errors import UserError
from pkd_dist.files import is_full
from pkd_dist.model.encoder import accepted, encoder_layers
from pkd_dist.model.first_token import only_first_token

OPSET = 20
_SELF_ATTENTION = {"distilbert": ("q_lin", "k_lin", "v_lin"), "": ("query", "key", "value")}
_FUSED = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert")
"""Families whose attention is that of ONNX Runtime's operator; others are written as they are."""


class _Function(nn.Module):
    """A model as a function of what tokenizers of encoders give, (B, L) each -> logits_BC. The model is changed in place."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        only_first_token(model, encoder_layers(model)[1])

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        types_BL = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types_BL).logits


class _Graph(_Function):
    """The same in ONNX Runtime's attention operators, which find the padding mask here."""

    def __init__(self, model: PreTrainedModel):
        super().__init__(model)
        self.padding: dict[str, torch.Tensor] = {}
        config = model.config
        if config.model_type not in _FUSED or getattr(config, "position_embedding_type", "absolute") != "absolute":
            return
        parts = _SELF_ATTENTION.get(config.model_type, _SELF_ATTENTION[""])
        for module in list(model.modules()):
            if all(isinstance(getattr(module, part, None), nn.Linear) for part in parts):
                self._fuse(module, [getattr(module, part) for part in parts])
        only_first_token(model, encoder_layers(model)[1], self._first_token)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        self.padding["BL"] = attention_mask.to(torch.int32)
        return super().forward(input_ids, attention_mask, token_type_ids)

    def _fuse(self, attention: Any, parts: list[nn.Linear]) -> None:
        weight_HQ = torch.cat([part.weight.detach().T for part in parts], dim=1)
        bias_Q = torch.cat([part.bias.detach() for part in parts])
        heads = parts[0].out_features // attention.attention_head_size

        def forward(_: Any, hidden_BLH: torch.Tensor, *__: Any, **___: Any) -> tuple[torch.Tensor, None]:
            context_BLH = torch.onnx.ops.symbolic(
                "com.microsoft::Attention", (hidden_BLH, weight_HQ, bias_Q, self.padding["BL"]), {"num_heads": heads},
                dtype=hidden_BLH.dtype, shape=hidden_BLH.shape, version=1,
            )  # fmt: skip
            if hasattr(attention, "out_lin"):  # DistilBERT
                return attention.out_lin(context_BLH), None
            if hasattr(attention, "dense"):  # ALBERT
                return attention.LayerNorm(hidden_BLH + attention.dense(context_BLH)), None
            return context_BLH, None

        attention.forward = types.MethodType(forward, attention)

    def _first_token(self, parts: Sequence[Any], head_size: int, hidden_BLH: torch.Tensor, *_: Any) -> torch.Tensor:
        """`lean.attend_first` in few and small operations. A: heads; d: head size."""
        query, key, value = parts
        into_AdH, out_AdH = (part.weight.detach().unflatten(0, (-1, head_size)) for part in (key, value))
        query_ABd = query(hidden_BLH[:, 0]).unflatten(-1, (-1, head_size)).transpose(0, 1)
        sought_ABH = query_ABd @ (into_AdH * head_size**-0.5)
        scores_BAL = (hidden_BLH @ sought_ABH.permute(1, 2, 0)).transpose(1, 2)
        padding_B1L = (1 - self.padding["BL"].to(scores_BAL.dtype))[:, None] * torch.finfo(scores_BAL.dtype).min
        mean_ABH = ((scores_BAL + padding_B1L).softmax(-1) @ hidden_BLH).transpose(0, 1)
        context_BH = (mean_ABH @ out_AdH.transpose(1, 2)).transpose(0, 1).flatten(1) + value.bias
        return context_BH[:, None]


def _traced(
    kind: type[_Function], model: PreTrainedModel, tokenizer: Any, batch: Any, length: Any
) -> tuple[_Function, dict[str, Any]]:
    """A copy of the model as a function, and the arguments of an exporter that let both axes free."""
    example = tokenizer(["one text", "another one, of more words"], padding=True, return_tensors="pt")
    inputs = accepted(model, example)
    function = kind(copy.deepcopy(model).cpu().eval()).requires_grad_(False)
    return function, {"args": (), "kwargs": inputs, "dynamic_shapes": dict.fromkeys(inputs, {0: batch, 1: length})}


@contextlib.contextmanager
def _writing(source: str, what: str) -> Iterator[None]:
    """What exporters raise, of which there are many kinds, told in one line."""
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
            f"export.formats: {source} cannot be written as {what} ({first}); leave {what} out of it"
        ) from error


def write(model: PreTrainedModel, tokenizer: Any, path: Path) -> None:
    """Writes the fused float32 graph.

    Raises:
        UserError: the model's family cannot be written.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    config, fusions = model.config, FusionOptions("bert")
    fusions.enable_skip_layer_norm = config.model_type in _FUSED  # it trips over norms without bias
    with _writing(f"a {model.config.model_type}", "onnx"):
        graph, arguments = _traced(_Graph, model, tokenizer, "batch", "length")
        program = torch.onnx.export(
            graph, **arguments, dynamo=True, opset_version=OPSET, input_names=list(arguments["kwargs"]), output_names=["logits"],
            external_data=False, verbose=False,
        )  # fmt: skip
        assert program is not None
        fused = optimize_model(
            program.model_proto, "bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size, opt_level=0,
            optimization_options=fusions,
        )  # fmt: skip
        fused.save_model_to_file(str(path))


def split_norms(path: Path) -> None:
    """Makes two nodes of every skip layer norm, in place: on a CPU one of ONNX Runtime's takes twice as long as its sum
    and its norm do, and a Sum (not an Add) is not fused again when the graph is loaded."""
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


def write_program(model: PreTrainedModel, tokenizer: Any, path: Path) -> None:
    """Writes the model as `torch.export` has it; `torch.export.load(path).module()(**inputs)`
    answers without `transformers`.

    Raises:
        UserError: the model's family cannot be written.
    """
    with _writing(f"a {model.config.model_type}", "torch-export"):
        free = torch.export.Dim.DYNAMIC
        function, arguments = _traced(_Function, model, tokenizer, free, free)
        torch.export.save(torch.export.export(function, **arguments), path)


def write_half(source: Path, path: Path) -> None:
    """Writes a float32 graph in float16, for GPUs; its logits stay float32. Raises UserError where it cannot be."""
    import onnx
    from onnxruntime.transformers.onnx_model import OnnxModel

    with _writing("this graph", "onnx-fp16"):
        model = OnnxModel(onnx.load(source))
        model.convert_float_to_float16(keep_io_types=True, use_symbolic_shape_infer=False)
        model.save_model_to_file(str(path))


QUANTISATIONS = ("dynamic", "dynamic, 7-bit weights", "static")
"""Ways to int8, of which the one whose answers agree best with float32 on dev is kept."""


def write_int8(source: Path, path: Path, how: str, calibration: Iterator[dict[str, np.ndarray]]) -> None:
    """Writes a float32 graph with int8 weights, a scale per column (per token in the embedding).

    Args:
        how: one of `QUANTISATIONS`: what activations are rounded to is measured in each request, or once.
        calibration: the model's inputs of batches of training text, for `static`.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    class Reader(CalibrationDataReader):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(calibration, None)

    common: dict[str, Any] = {"per_channel": True, "weight_type": QuantType.QInt8}
    common["op_types_to_quantize"] = ["MatMul", "Attention"]  # what is left is a few rows of [CLS]
    graph = onnx.load(source).graph
    tables = {i.name for i in graph.initializer if len(i.dims) == 2}
    common["nodes_to_exclude"] = [n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] not in tables]
    with _writing("this graph", "onnx-int8"):
        if how == "static":
            quantize_static(
                source, path, Reader(), quant_format=QuantFormat.QOperator, activation_type=QuantType.QUInt8,
                extra_options={"MatMulConstBOnly": True}, **common,
            )  # fmt: skip
        else:
            quantize_dynamic(source, path, reduce_range=how != "dynamic", **common)
        model = onnx.load(path)
        _round_embedding(model)
        onnx.save(model, path)


def _round_embedding(model: Any) -> None:
    """Replaces the word embedding, the largest table of all, by int8 rows with a scale each: Gather, Cast, Mul."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    tables = {i.name: i for i in graph.initializer if len(i.dims) == 2 and i.data_type == TensorProto.FLOAT}
    lookups = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]
    if not lookups:
        return
    lookup = max(lookups, key=lambda node: tables[node.input[0]].dims[0])
    table = tables[lookup.input[0]]
    if sum(table.name in node.input for node in graph.node) > 1:
        return
    table_VH = numpy_helper.to_array(table)
    scale_V1 = np.maximum(np.abs(table_VH).max(axis=1, keepdims=True), np.finfo(np.float32).tiny) / 127
    rows, scales = f"{table.name}_int8", f"{table.name}_scale"
    graph.initializer.remove(table)
    graph.initializer.append(numpy_helper.from_array(np.rint(table_VH / scale_V1).astype(np.int8), rows))
    graph.initializer.append(numpy_helper.from_array(scale_V1.astype(np.float32), scales))
    out, ids = lookup.output[0], lookup.input[1]
    place = list(graph.node).index(lookup)
    graph.node.remove(lookup)
    for node in reversed(
        [
            helper.make_node("Gather", [rows, ids], [f"{out}_int8"]),
            helper.make_node("Gather", [scales, ids], [f"{out}_scale"]),
            helper.make_node("Cast", [f"{out}_int8"], [f"{out}_float"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{out}_float", f"{out}_scale"], [out]),
        ]
    ):
        graph.node.insert(place, node)


@contextlib.contextmanager
def _quiet() -> Any:
    """Exporter and optimizer tell their steps to whoever listens; a failure is told by its exception."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
