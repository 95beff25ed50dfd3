"""Rules about whole quantized products: faults that make TensorRT or ONNX Runtime compute them in floating point."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from builders.check.lint.products import LAYOUT, MOVES, Product, Side, quantized_products
from builders.check.lint.rule import Book, Effect, Version
from builders.onnx_graph import OnnxGraph, attribute, name_of

if TYPE_CHECKING:
    from onnx import NodeProto

BOOK = Book()
HALVES = ("FLOAT16", "BFLOAT16")


def entry(product: Product, what: str, do: str, node: NodeProto | None = None, **more: Any) -> tuple:
    return name_of(node or product.node), what, do, {"product": product.name, **more}


@BOOK.rule(
    "float-activation",
    "both operands of a product are quantized",
    "with an int8 weight alone TensorRT multiplies floats: the weight is smaller, but the product is no quicker",
    Effect.LOST,
)
def float_activation(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    """x -> MatMul <- DQ."""
    for product in quantized_products(graph):
        if product.activation is None:
            what = "its weight is int8, but its input is not quantized"
            yield entry(product, what, "put QuantizeLinear and DequantizeLinear before it")


@BOOK.rule(
    "between",
    "no node between DequantizeLinear and the product computes anything",
    "TensorRT moves DQ behind the product through Reshape, Transpose, Cast and the like, and through a scale per "
    "output channel; anything else ends the search",
    Effect.LOST,
)
def between(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    """DQ -> Mul by a vector of input channels (a smoothing scale on the wrong side), Add, Relu ... -> MatMul."""
    for product in quantized_products(graph):
        for side in product.sides:
            weight = side is product.weight
            for node in side.between:
                if _harmless(graph, product, node, weight):
                    continue
                where = "its int8 weight" if weight else "its quantized input"
                what = f"{node.op_type} stands between DequantizeLinear and the product, on {where}"
                refused = {"effect": Effect.REFUSED} if weight and node.op_type == "Concat" else {}
                yield entry(product, what, _remedy(node, weight), node, **refused)


def _harmless(graph: OnnxGraph, product: Product, node: NodeProto, weight: bool) -> bool:
    if node.op_type in (LAYOUT if weight else MOVES):
        return True
    if node.op_type not in ("Mul", "Div"):
        return False
    others = [name for name in node.input if graph.is_constant(name) and graph.array(name) is not None]
    tensor = graph.stored[graph.source(others[0])] if len(others) == 1 else None
    if tensor is None:
        return False
    if all(size == 1 for size in tensor.dims):
        return True
    return weight and all(size == 1 for size in list(tensor.dims)[:-1]) and product.weight.axis == 1


def _remedy(node: NodeProto, weight: bool) -> str:
    if node.op_type in ("Mul", "Div") and not weight:
        return "multiply before QuantizeLinear: there it costs nothing (a smoothing scale belongs into the norm)"
    if weight:
        return "apply it to the weight before it is quantized"
    return "put it before QuantizeLinear"


@BOOK.rule(
    "scale-along-k",
    "a weight's scales run along its output channels",
    "the sum over input channels cannot take their scales afterwards: TensorRT accepts the graph and multiplies floats",
    Effect.LOST,
)
def scale_along_k(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for product in quantized_products(graph):
        node, wanted = product.weight.dequantize, product.weight.axis
        tensor = graph.stored.get(graph.source(node.input[0]))
        if wanted is None or (graph.size(node.input[1]) or 1) == 1:
            continue
        rank = len(tensor.dims) if tensor is not None else 2
        found = attribute(node, "axis", 1) % max(rank, 1)
        if found != wanted:
            what = f"its weight has a scale for every input channel (axis {found}), not for every output channel"
            yield entry(product, what, f"quantize along axis {wanted}", node)


@BOOK.rule(
    "scale-per-channel",
    "an activation has one scale",
    "a scale per channel cannot be taken out of the sum: TensorRT accepts the graph and multiplies floats",
    Effect.LOST,
)
def scale_per_channel(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for product, side in _activations(graph):
        if (graph.size(side.dequantize.input[1]) or 1) > 1:
            what = "its input has a scale for every channel"
            do = "smooth the channels into the weight (smoothquant export does), then use one scale per tensor or token"
            yield entry(product, what, do, side.dequantize)


@BOOK.rule(
    "scale-constant",
    "scales are constants",
    "TensorRT accepts a scale that is computed at run time, but the product multiplies floats",
    Effect.LOST,
)
def scale_constant(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for product in quantized_products(graph):
        for side in product.sides:
            if not graph.is_constant(side.dequantize.input[1]):
                what = "the scale of its input is computed at run time"
                do = "divide each token by its largest magnitude first, and use the constant scale 1/127"
                yield entry(product, what, do, side.dequantize)


@BOOK.rule(
    "scale-dtype",
    "scales are FLOAT, even where the other tensors are FLOAT16 or BFLOAT16",
    "the product of two scales is subnormal in FLOAT16 (wrong by some per cent), and the sum may overflow",
    Effect.WORSE,
)
def scale_dtype(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for product in quantized_products(graph):
        for side in product.sides:
            kind = graph.dtype(side.dequantize.input[1])
            if kind in HALVES:
                what = f"the scale {side.dequantize.input[1]} is {kind}"
                do = "keep scales and DequantizeLinear in FLOAT, and cast behind the product: the kernel is the same"
                yield entry(product, what, do, side.dequantize)


@BOOK.rule(
    "shared-weight",
    "a weight's DequantizeLinear feeds one product",
    "ONNX Runtime makes no integer kernel of a product if other nodes read its DequantizeLinear; TensorRT does",
    Effect.WORSE,
)
def shared_weight(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for product in quantized_products(graph):
        readers = [name_of(node) for node in graph.readers[product.weight.dequantize.output[0]]]
        if len(readers) > 1:
            what = f"the DequantizeLinear of its weight is read by {len(readers)} nodes"
            yield entry(product, what, "give each product a DequantizeLinear of its own, of the same constant")


def _activations(graph: OnnxGraph) -> Iterator[tuple[Product, Side]]:
    for product in quantized_products(graph):
        if product.activation:
            yield product, product.activation
