"""Rules about QuantizeLinear (Q) and DequantizeLinear (DQ) alone: zero points, scales, axes, int8 constants."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy

from builders.check.lint.products import DEQUANTIZE, QUANTIZE
from builders.check.lint.rule import Book, Effect, Version
from builders.onnx_graph import OnnxGraph, attribute, name_of

if TYPE_CHECKING:
    from onnx import NodeProto

BOOK = Book()
INT8 = 3  # onnx.TensorProto.INT8
EXACT = "QuantizeLinear without a zero point makes uint8 in ONNX, but int8 in TensorRT"


def pairs(graph: OnnxGraph) -> Iterator[NodeProto]:
    yield from graph.standard(QUANTIZE, DEQUANTIZE)


@BOOK.rule(
    "zero-point",
    "zero points are 0",
    "the parser of every version asserts that the shift is zero",
    Effect.REFUSED,
)
def zero_point(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for node in pairs(graph):
        values = graph.array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if values is not None and numpy.any(values.astype(numpy.float32) != 0):
            what = f"the zero point of {node.op_type} is {values.flat[numpy.argmax(values != 0)]}, not 0"
            yield name_of(node), what, "quantize symmetrically: int8, zero point 0, scale = largest magnitude / 127"


@BOOK.rule(
    "uint8",
    "nothing is quantized to uint8",
    "TensorRT has no uint8 arithmetic: it refuses uint8 weights, and reads uint8 activations as int8",
    Effect.WRONG,
)
def uint8(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    """Q with a uint8 zero point, or without a zero point (which means uint8); DQ of uint8 constants."""
    do = "quantize symmetrically to int8, with a zero point of int8 0"
    for node in graph.standard(QUANTIZE):
        typed = len(node.input) > 2 and node.input[2]
        if typed and graph.dtype(node.input[2]) == "UINT8":
            yield name_of(node), "it quantizes to uint8; TensorRT computes with int8", do
        elif not typed and attribute(node, "output_dtype", 0) != INT8:
            yield name_of(node), EXACT, do
    for node in graph.standard(DEQUANTIZE):
        if graph.dtype(node.input[0]) == "UINT8":
            yield name_of(node), "its constant is uint8", do, {"effect": Effect.REFUSED}


@BOOK.rule(
    "scale-positive",
    "every scale is a positive number",
    "the parser of every version asserts that all are positive (a channel of zeros has the scale 0 unless clamped)",
    Effect.REFUSED,
)
def scale_positive(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for node in pairs(graph):
        stored = graph.array(node.input[1])
        if stored is None:
            continue
        scale = stored.astype(numpy.float32)
        wrong = ~(scale > 0)
        if wrong.any():
            what = (
                f"the scale {node.input[1]} holds {scale[wrong].flat[0]:g}, in {wrong.sum()} of {scale.size} channels"
            )
            yield name_of(node), what, "clamp scales to a small positive number, such as 1e-12"
        elif not numpy.isfinite(scale).all():
            what = f"the scale {node.input[1]} holds infinity"
            yield (
                name_of(node),
                what,
                "look for infinities in the weights and act scales",
                {"effect": Effect.WRONG},
            )


@BOOK.rule(
    "axis",
    "a node with a scale per channel has the attribute axis",
    "without it the parsers of 8.5 to 10.1 take axis 0, where ONNX says 1",
    Effect.WORSE,
)
def axis(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for node in pairs(graph):
        if (graph.size(node.input[1]) or 1) > 1 and attribute(node, "axis") is None:
            worse = {"effect": Effect.WRONG} if tensorrt < (10, 2) else {}
            what = f"{node.op_type} has a scale per channel but no axis: TensorRT before 10.2 takes 0, ONNX says 1"
            yield name_of(node), what, "write the attribute axis", worse


@BOOK.rule(
    "block-scale",
    "INT8 scales are per tensor or per channel, not per block",
    "TensorRT has scales per block for 4 bits and FP8 alone, and the build fails",
    Effect.REFUSED,
)
def block_scale(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for node in pairs(graph):
        if attribute(node, "block_size", 0) and graph.dtype(node.input[0]) in ("INT8", ""):
            what = f"{node.op_type} has a scale for every {attribute(node, 'block_size')} values"
            yield name_of(node), what, "use one scale per output channel for weights, one per tensor for activations"


@BOOK.rule(
    "int8-constant",
    "an int8 constant feeds DequantizeLinear directly",
    "the builder refuses a quantized constant that any other operator reads, even Identity",
    Effect.REFUSED,
)
def int8_constant(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    """int8 initializer -> Transpose, Gather, Reshape, Cast ..."""
    for name, tensor in graph.stored.items():
        if tensor.data_type != INT8:
            continue
        for node in graph.readers[name]:
            if node.op_type not in (DEQUANTIZE, QUANTIZE) and node.op_type != "Constant":
                what = f"the int8 constant {name} goes into {node.op_type}; only DequantizeLinear may read it"
                do = f"store the result of {node.op_type}, or put {node.op_type} behind DequantizeLinear"
                if node.op_type == "Gather":
                    do = "look up rows of a float table (smoothquant export onnx --embedding float)"
                yield name_of(node), what, do


@BOOK.rule(
    "float-weight",
    "weights are stored as int8",
    "the engine is the same, but the file is four times as large and builds more slowly",
    Effect.WORSE,
)
def float_weight(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    """float initializer -> Q -> DQ."""
    for node in graph.standard(QUANTIZE):
        if graph.is_constant(node.input[0]) and graph.size(node.input[0]) != 1:
            what = f"the weight {node.input[0]} is stored as floats and quantized when the engine is built"
            yield name_of(node), what, "store the integers: int8 constant -> DequantizeLinear"
