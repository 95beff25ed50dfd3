"""What an exported graph says before TensorRT sees it: its quantized products, and what TensorRT would refuse.

A quantized product is a MatMul or Gemm both of whose operands come out of a DequantizeLinear, one of an int8 constant.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoothquant.errors import UserError
from smoothquant.packages import require

PASSES = ("Cast", "Reshape", "Transpose")  # what a dequantized operand may go through
STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class GraphFacts:
    """products: names of the quantized products, in order."""

    products: tuple[str, ...]


def read_graph(path: Path) -> GraphFacts:
    """Read an ONNX file, without its weights.

    Raises UserError for a file that is no ONNX, for operators that are not ONNX's own, which TensorRT's parser does
    not know, and for external data that is missing or too short.
    """
    onnx = require("onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's, of many kinds
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: not an ONNX file ({reason})", do="make the export again") from error
    foreign = [node for node in _nodes(model.graph) if node.domain not in STANDARD]
    if foreign:
        kinds = ", ".join(sorted({f"{node.domain}.{node.op_type}" for node in foreign}))
        raise UserError(
            f"{path}: {len(foreign)} operators that are not standard ONNX ({kinds}; first {foreign[0].name!r})",
            expected="a graph of standard operators: TensorRT parses no others",
            do="export it again with smoothquant export onnx, not through a tool that writes an optimized graph",
        )
    _check_external_data(path, model.graph)
    return GraphFacts(tuple(_products(model.graph)))


def _products(graph: Any) -> Iterator[str]:
    made_by = {output: node for node in graph.node for output in node.output}
    constants = {constant.name for constant in graph.initializer if constant.data_type == 3}  # TensorProto.INT8

    def dequantized(value: str) -> Any:
        node = made_by.get(value)
        while node is not None and node.op_type in PASSES:
            node = made_by.get(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    for node in graph.node:
        if node.op_type in ("MatMul", "Gemm"):
            left, right = dequantized(node.input[0]), dequantized(node.input[1])
            if left is not None and right is not None and right.input[0] in constants:
                yield node.name
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _products(attribute.g)


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)


def _check_external_data(path: Path, graph: Any) -> None:
    ends: dict[str, int] = {}
    for constant in graph.initializer:
        place = {entry.key: entry.value for entry in constant.external_data}
        if "location" in place:
            end = int(place.get("offset", 0)) + int(place.get("length", 0))
            ends[place["location"]] = max(end, ends.get(place["location"], 0))
    for name, end in ends.items():
        file = path.parent / name
        found = file.stat().st_size if file.is_file() else None
        if found is None or found < end:
            raise UserError(
                f"{file}: {'missing' if found is None else f'has {found} bytes'}",
                expected=f"{end} bytes of weights beside {path.name}",
                do="copy both files, or make the export again",
            )
