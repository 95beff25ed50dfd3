"""Rules about the file: it is valid, its data are whole, TensorRT knows its opset, and it is quantized as exported."""

from __future__ import annotations

from collections.abc import Iterator

from builders.check.lint.products import DEQUANTIZE, missing_products, quantized_products
from builders.check.lint.rule import Book, Effect, Version
from builders.onnx_graph import OnnxGraph, name_of

BOOK = Book()
OPSETS: tuple[tuple[Version, int], ...] = (  # a TensorRT version, and the newest opset that it knows
    ((8, 6), 17),
    ((10, 0), 20),
    ((10, 13), 24),
    ((11, 0), 25),
)
PER_CHANNEL = 13  # the first opset with an axis for scales


@BOOK.rule("valid-onnx", "the graph is valid ONNX", "TensorRT and every other engine demand it", Effect.REFUSED)
def valid_onnx(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for reason in _invalid(graph):
        yield graph.path.name, f"it is not valid ONNX ({reason})", "mend the tool that wrote it, or export again"


def _invalid(graph: OnnxGraph) -> Iterator[str]:
    """The faults that onnx's checker finds, and those that it overlooks."""
    kinds = graph.onnx.TensorProto.DataType.values()
    for tensor in graph.stored.values():
        if tensor.data_type not in kinds:
            yield f"tensor {tensor.name} has the type {tensor.data_type}, which ONNX does not have"
            return
    for node in graph.nodes:
        if any(isinstance(name, bytes) for name in (node.name, node.op_type, node.domain, *node.input, *node.output)):
            yield "a name is not UTF-8"
            return
    for node in graph.standard("Constant"):
        if not node.attribute:
            yield f"Constant {name_of(node)} has no value"
            return
    try:
        graph.onnx.checker.check_model(graph.without_data())
    except (graph.onnx.checker.ValidationError, UnicodeDecodeError) as error:
        yield " ".join(str(error).split("\n")[0].split())


@BOOK.rule(
    "external-data",
    "the files of weights lie beside the graph and are whole",
    "the parser of every version opens them by the names in the graph",
    Effect.REFUSED,
)
def external_data(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for location, fault in graph.external_faults():
        yield location, f"the file of weights {location} {fault}", f"put the whole file into {graph.path.parent}"


@BOOK.rule(
    "opset",
    "this TensorRT knows the opset: at most 17 for 8.6, 20 for 10.0, 24 for 10.13, 25 for 11",
    "release notes: TensorRT reads a newer opset as the newest one that it knows, with a warning",
    Effect.WORSE,
)
def opset(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    newest = max((limit for since, limit in OPSETS if since <= tensorrt), default=OPSETS[0][1])
    if graph.opset > newest:
        version = ".".join(map(str, tensorrt))
        what = f"opset {graph.opset} is newer than TensorRT {version} knows ({newest})"
        yield graph.path.name, what, f"export with opset {newest} or lower, or use a newer TensorRT"
    if graph.opset < PER_CHANNEL and any(True for _ in graph.standard(DEQUANTIZE)):
        what = f"opset {graph.opset} has no scales per channel"
        yield graph.path.name, what, "export with opset 17 or 21", {"effect": Effect.REFUSED}


@BOOK.rule(
    "no-quantization",
    "some matrix product has an INT8 weight",
    "TensorRT computes a graph without QuantizeLinear and DequantizeLinear in floating point; 11 has no other way",
    Effect.LOST,
)
def no_quantization(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    if not quantized_products(graph):
        what = "no matrix product is quantized (no int8 weight behind DequantizeLinear)"
        yield graph.path.name, what, "make it with smoothquant export onnx, without --float"


@BOOK.rule(
    "missing-product",
    "every linear that the exporter quantized is a quantized product",
    "the file lists the quantized linears; one that lost its Q or DQ runs in floating point, and no count of INT8 "
    "kernels shows it",
    Effect.LOST,
)
def missing_product(graph: OnnxGraph, tensorrt: Version) -> Iterator[tuple]:
    for module in missing_products(graph):
        yield f"{module}/MatMul", "it was quantized, but is not any more", "export again, and change nothing afterwards"
