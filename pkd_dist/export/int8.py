"""A float32 ONNX graph with int8 weights, so that the logits of a text do not depend on the other texts of its batch.

ONNX Runtime's own dynamic quantization takes one scale for all activations of a batch. Here each token has a scale:

    x -> x / max|x| of the token -> uint8, fixed scale -> product with int8 weights, a scale per column -> * max|x|

Attention with weights (com.microsoft) becomes this product followed by MultiHeadAttention.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

QUANTIZATIONS = ("per token", "per token, 7-bit weights")
"""Ways to quantise to int8."""
_DOMAIN = "com.microsoft"
_WORTH_ROUNDING = 4096
"""Values of a table from which its file gets smaller."""
_STEPS = 127
"""Steps from 0 to the largest value of a token."""


def write(source: Path, path: Path, how: str) -> None:
    """Write a float32 graph with int8 weights, with a scale per column (per token id in the embedding).

    Args:
        how: One of `QUANTIZATIONS`. 7-bit weights cannot overflow on CPUs without VNNI.
    """
    import onnx

    model = onnx.load(source)
    _Quantizer(model.graph, levels=127 if how == QUANTIZATIONS[0] else 63).quantize()
    _round_embedding(model)
    _round_other_tables(model.graph)
    onnx.save(model, path)


class _Quantizer:
    """Replaces products with a constant matrix in a graph, in place.

    Args:
        levels: Weights are rounded to -levels ... levels.
    """

    def __init__(self, graph: GraphProto, levels: int):
        from onnx import TensorProto

        self._graph, self._levels = graph, levels
        self._tables = {i.name: i for i in graph.initializer if len(i.dims) == 2 and i.data_type == TensorProto.FLOAT}
        self._quantised: dict[str, tuple[str, str]] = {}
        self._rows: dict[str, tuple[str, str]] = {}
        self._nodes: list[NodeProto] = []

    def quantize(self) -> None:
        """Replace every such product, and drop the tables that nothing reads any more."""
        from onnx import numpy_helper

        constants = {
            "int8_last": np.array([-1]), "int8_step": np.float32(1 / _STEPS), "int8_zero": np.uint8(128),
            "int8_tiny": np.float32(1e-30),
        }  # fmt: skip
        for name, value in constants.items():
            self._graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        for node in self._graph.node:
            if node.op_type == "MatMul" and node.input[1] in self._tables:
                self._multiply(node.input[0], node.input[1], node.output[0])
            elif node.op_type == "Attention" and node.domain == _DOMAIN and node.input[1] in self._tables:
                self._attend(node)
            else:
                self._nodes.append(node)
        del self._graph.node[:]
        self._graph.node.extend(self._nodes)
        used = {name for node in self._nodes for name in node.input}
        kept = [i for i in self._graph.initializer if i.name in used]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)

    def _add(
        self, operator: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: object
    ) -> None:
        from onnx import helper

        node = helper.make_node(operator, inputs, outputs, domain=domain)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        self._nodes.append(node)

    def _round_rows(self, states: str) -> tuple[str, str]:
        """Return the names of the uint8 states and of the largest value of each token; computed once per input."""
        if states not in self._rows:
            size, unit, rounded = f"{states}_size", f"{states}_unit", f"{states}_uint8"
            self._add("Abs", [states], [f"{states}_abs"])
            self._add("ReduceMax", [f"{states}_abs", "int8_last"], [f"{states}_max"], keepdims=1)
            self._add("Max", [f"{states}_max", "int8_tiny"], [size])
            self._add("Div", [states, size], [unit])
            self._add("QuantizeLinear", [unit, "int8_step", "int8_zero"], [rounded])
            self._rows[states] = rounded, size
        return self._rows[states]

    def _round_weight(self, weight: str) -> tuple[str, str]:
        from onnx import numpy_helper

        if weight not in self._quantised:
            weight_IO = numpy_helper.to_array(self._tables[weight])
            scale_O = np.maximum(np.abs(weight_IO).max(axis=0) / self._levels, np.finfo(np.float32).tiny)
            names = f"{weight}_int8", f"{weight}_scale"
            rounded_IO = np.rint(weight_IO / scale_O).astype(np.int8)
            for name, value in zip(names, (rounded_IO, scale_O.astype(np.float32)), strict=True):
                self._graph.initializer.append(numpy_helper.from_array(value, name))
            self._quantised[weight] = names
        return self._quantised[weight]

    def _multiply(self, states: str, weight: str, output: str) -> None:
        (rounded, size), (table, scale) = self._round_rows(states), self._round_weight(weight)
        product = f"{output}_unit"
        self._add("MatMulIntegerToFloat", [rounded, table, "int8_step", scale, "int8_zero"], [product], _DOMAIN)
        self._add("Mul", [product, size], [output])

    def _attend(self, node: NodeProto) -> None:
        from onnx import helper

        states, weight, bias, mask = node.input
        out = node.output[0]
        self._multiply(states, weight, f"{out}_qkv")
        parts = [f"{out}_{part}" for part in "qkv"]
        self._add("Split", [f"{out}_qkv"], parts, axis=-1, num_outputs=3)
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        self._add("MultiHeadAttention", [*parts, bias, mask], [out], _DOMAIN, **attributes)


def _store_as_int8(graph: GraphProto, table: TensorProto) -> tuple[str, str]:
    """Replace a table by int8 rows with a scale each; return the names of rows and scales."""
    from onnx import numpy_helper

    values_NM = numpy_helper.to_array(table)
    scale_N1 = np.maximum(np.abs(values_NM).max(axis=1, keepdims=True) / 127, np.finfo(np.float32).tiny)
    rows, scales = f"{table.name}_int8", f"{table.name}_scale"
    graph.initializer.remove(table)
    graph.initializer.append(numpy_helper.from_array(np.rint(values_NM / scale_N1).astype(np.int8), rows))
    graph.initializer.append(numpy_helper.from_array(scale_N1.astype(np.float32), scales))
    return rows, scales


def _round_embedding(model: ModelProto) -> None:
    """Replace the word embedding by int8 rows with a scale each: Gather, Cast, Mul."""
    from onnx import TensorProto, helper

    graph = model.graph
    tables = {i.name: i for i in graph.initializer if len(i.dims) == 2 and i.data_type == TensorProto.FLOAT}
    lookups = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]
    if not lookups:
        return
    # it is the table of the token ids, not always the largest: a trimmed one may have fewer rows than there are positions
    lookup = max(lookups, key=lambda node: (node.input[1] == "input_ids", tables[node.input[0]].dims[0]))
    table = tables[lookup.input[0]]
    if sum(table.name in node.input for node in graph.node) > 1:
        return
    rows, scales = _store_as_int8(graph, table)
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


def _round_other_tables(graph: GraphProto) -> None:
    """Store the tables that no int8 product reads as int8 rows with a scale each: positions, the pooler, the last layer.

    ONNX Runtime makes them float32 again when it loads the file, so only the file gets smaller.
    """
    from onnx import TensorProto, helper

    tables = [i for i in graph.initializer if len(i.dims) == 2 and i.data_type == TensorProto.FLOAT]
    nodes = []
    for table in (table for table in tables if table.dims[0] * table.dims[1] >= _WORTH_ROUNDING and table.dims[1] > 1):
        (rows, scales), wide = _store_as_int8(graph, table), f"{table.name}_float"
        nodes += [
            helper.make_node("Cast", [rows], [wide], to=TensorProto.FLOAT),
            helper.make_node("Mul", [wide, scales], [table.name]),
        ]
    before = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *before])
