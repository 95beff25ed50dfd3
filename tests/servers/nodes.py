"""What the nodes of a decoder's graph are, in words, so that two graphs can be compared node by node.

What is told of products is read from the graph's first layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property

import onnx
from onnx import NodeProto, TensorProto, helper

PASSED = ("Cast", "Transpose", "Reshape")  # between a DequantizeLinear and a product
NORMS = {"Pow": "Pow, ReduceMean, Sqrt, Div, Mul", "RMSNormalization": "RMSNormalization"}


class Nodes:
    """A graph of so many layers."""

    def __init__(self, model: onnx.ModelProto, layers: int) -> None:
        self._model, self._layers, graph = model, layers, model.graph
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._maker = {name: node for node in graph.node for name in node.output}

    def facts(self) -> Mapping[str, str]:
        """What is told of a graph, by what it is about."""
        return {
            "opset and domains": self._opsets(),
            "products of a layer": self._products_of_a_layer(),
            "input of a product": self._input(),
            "Q/DQ of inputs": self._shared(),
            "matrix of a product": self._matrix(),
            "behind a product": self._behind(),
            "smoothing at run time": self._smoothing(),
            "attention": self._attention(),
            "cache": self._cache(),
            "other inputs": self._others(),
            "norms": self._norms(),
            "embedding": self._embedding(),
            "head": self._head(),
        }

    def _opsets(self) -> str:
        found = {one.domain or "ai.onnx": one.version for one in self._model.opset_import}
        used = {node.domain or "ai.onnx" for node in self._model.graph.node}
        return ", ".join(f"{domain} {found[domain]}" for domain in sorted(used))

    @cached_property
    def _quantized(self) -> list[NodeProto]:
        """The products with an INT8 matrix, in the graph's order."""
        products = [node for node in self._model.graph.node if node.op_type in ("MatMul", "Gemm")]
        return [node for node in products if self._weight(node)]

    def _products_of_a_layer(self) -> str:
        shapes = (self._initializers[self._weight(node).input[0]].dims for node in self._first)
        return f"{len(self._first)}: " + ", ".join(f"{dims[0]}x{dims[1]}" for dims in shapes)

    @property
    def _first(self) -> list[NodeProto]:
        return self._quantized[: len(self._quantized) // self._layers]

    def _input(self) -> str:
        """From what is quantized to the product."""
        found = Counter()
        for node in self._first:
            path, dequantize = self._path(node.input[0])
            quantize = self._maker[dequantize.input[0]]
            before = self._maker.get(quantize.input[0])
            cast = [_described(before)] if before is not None and before.op_type == "Cast" else []
            found[", ".join([*cast, self._scaled(quantize), self._scaled(dequantize), *path])] += 1
        return _only(found)

    def _shared(self) -> str:
        return f"{len({self._path(node.input[0])[1].output[0] for node in self._first})} of {len(self._first)} products"

    def _matrix(self) -> str:
        """From the INT8 matrix to the product."""
        found = Counter()
        for node in self._first:
            path, dequantize = self._path(node.input[1])
            found[", ".join([self._scaled(dequantize), *path])] += 1
        return _only(found)

    def _behind(self) -> str:
        found = Counter()
        for node in self._first:
            [after, *_] = [other for other in self._model.graph.node if node.output[0] in other.input]
            found[_described(after)] += 1
        return _only(found)

    def _smoothing(self) -> str:
        found = [
            node for node in self._model.graph.node if any(name.endswith(".pre_quant_scale") for name in node.input)
        ]
        return f"{len(found) // self._layers} Mul a layer, before Q" if found else "none"

    def _attention(self) -> str:
        plugins = {node.op_type for node in self._model.graph.node if "Attention" in node.op_type}
        count = sum(node.op_type == "Softmax" for node in self._model.graph.node)
        return ", ".join(sorted(plugins)) or f"MatMul, Add, Softmax, MatMul ({count // self._layers} Softmax a layer)"

    def _cache(self) -> str:
        given = [value for value in self._model.graph.input if value.name.startswith("past_key_values")]
        kinds = {(_dtype(value.type.tensor_type.elem_type), _shape(value)) for value in given}
        concats = sum(node.op_type == "Concat" and "past_key" in "".join(node.input) for node in self._model.graph.node)
        each = "; ".join(f"{dtype} ({shape})" for dtype, shape in sorted(kinds))
        written = f"{concats // self._layers} Concat" if concats else "written by the attention"
        return f"{len(given) // self._layers} a layer, {each}; {written}"

    def _others(self) -> str:
        names = [value.name for value in self._model.graph.input]
        return ", ".join(name for name in names if not name.startswith("past_key_values"))

    def _norms(self) -> str:
        kinds = {node.op_type for node in self._model.graph.node}
        return ", ".join(name for kind, name in NORMS.items() if kind in kinds)

    def _embedding(self) -> str:
        gathers = (node.input[0] for node in self._model.graph.node if node.op_type == "Gather")
        inside = any(name in self._initializers and len(self._initializers[name].dims) == 2 for name in gathers)
        return "Gather in the graph" if inside else "outside"

    def _head(self) -> str:
        node, path = self._maker["logits"], []
        while node.op_type not in ("MatMul", "Gemm"):
            path.append(_described(node))
            node = self._maker[node.input[0]]
        return ", ".join([node.op_type, *reversed(path)])

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _weight(self, node: NodeProto) -> NodeProto | None:
        """The DequantizeLinear of a product's matrix; None if that is not in INT8."""
        dequantize = self._path(node.input[1])[1]
        stored = self._initializers.get(dequantize.input[0]) if dequantize is not None else None
        return dequantize if stored is not None and stored.data_type == TensorProto.INT8 else None

    def _path(self, name: str) -> tuple[list[str], NodeProto | None]:
        """The nodes before a value back to its DequantizeLinear, first to last, and that one."""
        path: list[str] = []
        node = self._maker.get(name)
        while node is not None and node.op_type in PASSED:
            path.insert(0, _described(node))
            node = self._maker.get(node.input[0])
        return path, node if node is not None and node.op_type == "DequantizeLinear" else None

    def _scaled(self, node: NodeProto) -> str:
        """A QuantizeLinear or DequantizeLinear, with its scale and its zero point."""
        scale = self._initializers[node.input[1]]
        zero = (
            f"zero point {_dtype(self._initializers[node.input[2]].data_type)}" if node.input[2:] else "no zero point"
        )
        details = [f"{_dtype(scale.data_type)} scale", zero]
        if scale.dims and scale.dims[0] > 1:
            axis = next((helper.get_attribute_value(one) for one in node.attribute if one.name == "axis"), 1)
            details.insert(0, f"axis {axis}")
        return f"{node.op_type} ({', '.join(details)})"


def _described(node: NodeProto) -> str:
    if node.op_type == "Cast":
        return f"Cast to {_dtype(helper.get_attribute_value(node.attribute[0]))}"
    return node.op_type


def _dtype(number: int) -> str:
    return TensorProto.DataType.Name(number).lower()


def _shape(value: onnx.ValueInfoProto) -> str:
    return ", ".join(dim.dim_param or str(dim.dim_value) for dim in value.type.tensor_type.shape.dim)


def _only(found: Counter[str]) -> str:
    """The one answer of all products, or each with how often it was given."""
    if len(found) == 1:
        return next(iter(found))
    return "; ".join(f"{count} of {found.total()}: {what}" for what, count in found.most_common())
