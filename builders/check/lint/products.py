"""The quantized products of a graph: matrix products that have a weight of 8 bits, and so should run in INT8.

x ── Q ── DQ ──(between)──┐
                          ├── MatMul or Gemm ── y
int8 weight ── DQ ─(between)─┘
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from builders.onnx_graph import OnnxGraph, attribute, module_of, name_of
from smoothquant.errors import UserError

if TYPE_CHECKING:
    from onnx import NodeProto

PRODUCTS = ("MatMul", "Gemm")
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Cast", "Identity")
MOVES = (*LAYOUT, "Gather", "Concat", "Expand", "Split")  # operators that move values and change none
PLAIN = ("Mul", "Div", "Add", "Sub", "Pow", "Max", "Min", "Relu", "Neg", "Abs", "Sigmoid", "Tanh", "Clip", "Where")


@dataclass(frozen=True)
class Side:
    """One quantized operand of a product.

    dequantize: its DQ node. between: the nodes between DQ and the product, from the DQ on. axis: the axis of DQ's
    output that becomes the product's output channel; None if it cannot be followed.
    """

    dequantize: NodeProto
    between: tuple[NodeProto, ...]
    axis: int | None = None


@dataclass(frozen=True)
class Product:
    """A quantized product. activation: its other operand; None if that one is not quantized."""

    node: NodeProto
    weight: Side
    activation: Side | None

    @property
    def name(self) -> str:
        return name_of(self.node)

    @property
    def module(self) -> str:
        return module_of(self.name)

    @property
    def sides(self) -> tuple[Side, ...]:
        return (self.weight, self.activation) if self.activation else (self.weight,)


def quantized_products(graph: OnnxGraph) -> list[Product]:
    """The quantized products of a graph, in the graph's order."""
    return [product for node in graph.standard(*PRODUCTS) if (product := _product(graph, node))]


def missing_products(graph: OnnxGraph) -> list[str]:
    """Modules that our exporter quantized and that this graph has no quantized product of."""
    found = {product.module for product in quantized_products(graph)}
    return [module for module in graph.quantized if module not in found]


def products_to_run(folder: Path) -> list[Product]:
    """The quantized products of the graph in `folder`. Raises UserError if one that was exported is not there."""
    graph = OnnxGraph(folder)
    if lost := missing_products(graph):
        raise UserError(
            f"{graph.path}: {lost[0]} is not quantized",
            expected="an INT8 product, as the exporter wrote into the file",
            do="make the export again, and change nothing afterwards",
        )
    return quantized_products(graph)


def float_products(graph: OnnxGraph) -> list[str]:
    """Modules of the other products that have a weight, in the graph's order: the output head, routers, and linears
    that were left in float."""
    quantized = {product.name for product in quantized_products(graph)}
    found = [
        module_of(name_of(node))
        for node in graph.standard(*PRODUCTS)
        if name_of(node) not in quantized and any(map(graph.is_constant, node.input[:2]))
    ]
    return list(dict.fromkeys(found))


def _product(graph: OnnxGraph, node: NodeProto) -> Product | None:
    for place in (1, 0):
        if not graph.is_constant(node.input[place]):
            continue
        path = _back(graph, node.input[place], set())
        if path and _is_integer(graph, path[0]):
            weight = Side(path[0], tuple(path[1:]), _output_axis(graph, node, place, path))
            other = _back(graph, node.input[1 - place], set())
            return Product(node, weight, Side(other[0], tuple(other[1:])) if other else None)
    return None


def _is_integer(graph: OnnxGraph, dequantize: NodeProto) -> bool:
    """Whether DQ reads integers of 8 bits: not of 4 bits, and not FP8."""
    quantize = graph.producer.get(graph.source(dequantize.input[0]))
    kind = graph.dtype(dequantize.input[0])
    if quantize is not None and quantize.op_type == QUANTIZE:
        kind = graph.dtype(quantize.input[2]) if len(quantize.input) > 2 else "INT8"
    return kind in ("INT8", "UINT8", "")


def _back(graph: OnnxGraph, name: str, seen: set[str]) -> list[NodeProto]:
    """The DQ node that a value comes from, and the nodes behind it up to the value; empty if there is no DQ."""
    node = graph.producer.get(name)
    if node is None or name in seen:
        return []
    seen.add(name)
    if node.op_type == DEQUANTIZE:
        return [node]
    for source in _sources(graph, node, name):
        path = _back(graph, source, seen)
        if path:
            return [*path, node]
    return []


def _sources(graph: OnnxGraph, node: NodeProto, name: str) -> Iterator[str]:
    """The inputs of a node to follow back: all inputs for a constant value, or else the only one that varies."""
    if node.op_type in ("Gather", *LAYOUT):
        yield node.input[0]
    elif graph.is_constant(name) or node.op_type in MOVES:
        yield from node.input
    elif node.op_type in PLAIN:
        moving = [source for source in node.input if source and not graph.is_constant(source)]
        if len(moving) == 1:
            yield moving[0]


def _output_axis(graph: OnnxGraph, node: NodeProto, place: int, path: list[NodeProto]) -> int | None:
    """The axis of DQ's output that becomes the output channel; None if it cannot be followed.

    A weight (K, N) on the right has it last. A weight on the left, or with transB, has it last but one.
    """
    tensor = graph.stored.get(graph.source(path[0].input[0]))
    rank = len(tensor.dims) if tensor is not None else 2
    transposed = bool(attribute(node, "transB" if place else "transA", 0))
    axis = rank - 1 if (place == 1) != transposed else rank - 2
    for step in reversed(path[1:]):
        if step.op_type == "Transpose":
            axis = attribute(step, "perm", list(range(rank))[::-1])[axis]
        elif step.op_type not in ("Cast", "Identity", "Slice", "Mul", "Div"):
            return None
    return axis
