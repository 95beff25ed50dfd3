"""How a linear is spelled: in float, or in one of the Q/DQ forms that engines compile to integer kernels.

per-token:   amax = Max(ReduceMax(Abs(x)), EPS)              once per distinct input, as is the next line
             xq   = QuantizeLinear(x / amax, 1/127)
             y    = MatMul(DequantizeLinear(xq, 1/127), DequantizeLinear(Wq, weight_scale, axis=1)) * amax
per-tensor:  xq   = QuantizeLinear(x, input_scale)
             y    = MatMul(DequantizeLinear(xq, input_scale), DequantizeLinear(Wq, weight_scale, axis=1))

x / amax lies in [-1, 1], so a constant scale quantizes every token by its own maximum: no plugin, no contrib operator,
no operator that TensorRT lacks. Weights are int8 [in, out] and feed DequantizeLinear directly; zero points are 0;
scales are float32 even where the body is float16 (their products are float16-subnormal): the cast follows the MatMul.
The order of operations is that of `smoothquant.quantization`, and so are the integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from exporters.onnx.graph import Graph
from smoothquant.quantization import EPS, QMAX


@dataclass(frozen=True)
class Input:
    """An activation, ready for the linears that read it.

    value: int8, or in the body's dtype for float linears. scale: that `value` was quantized with. token_amax: to
    multiply the linears' outputs by, if any.
    """

    value: str
    scale: str | None = None
    token_amax: str | None = None

    def rows(self, graph: Graph, indices: str) -> Input:
        """Some of the tokens of an activation (tokens, in). indices: (n,) int64."""
        amax = self.token_amax and graph.op("Gather", self.token_amax, indices, axis=0)
        return Input(graph.op("Gather", self.value, indices, axis=0), self.scale, amax)


class FloatLinears:
    """Weights and arithmetic in the body's dtype."""

    def __init__(self, graph: Graph, body: torch.dtype) -> None:
        self.graph, self.body = graph, body

    def input(self, x: str, name: str) -> Input:
        """x: (..., tokens, in) in the body's dtype; name: module of a linear that reads it."""
        return Input(x)

    def linear(self, x: Input, name: str, shape: tuple[int, int], bias: bool) -> str:
        """shape: (out, in). Returns (..., tokens, out) in the body's dtype."""
        out, columns = shape
        y = self.graph.op("MatMul", x.value, self.graph.weight(f"{name}.weight", (columns, out), self.body))
        return _add_bias(self.graph, y, name, out, self.body) if bias else y


class PerTokenLinears:
    """INT8 weights, one dynamic activation scale per token."""

    def __init__(self, graph: Graph, body: torch.dtype) -> None:
        self.graph, self.body = graph, body

    def input(self, x: str, name: str) -> Input:
        graph = self.graph
        x = graph.cast(x, self.body, torch.float32)
        largest = graph.op("ReduceMax", graph.op("Abs", x), graph.constant([-1]), keepdims=1)
        amax = graph.op("Max", largest, graph.constant(EPS, torch.float32))
        step = graph.constant(1 / QMAX, torch.float32)
        return Input(_quantize(graph, graph.op("Div", x, amax), step), step, amax)

    def linear(self, x: Input, name: str, shape: tuple[int, int], bias: bool) -> str:
        assert x.token_amax is not None
        graph = self.graph
        y = graph.op("Mul", graph.op("MatMul", _dequantize(graph, x), _int8_weight(graph, name, shape)), x.token_amax)
        y = graph.cast(y, torch.float32, self.body)
        return _add_bias(graph, y, name, shape[0], self.body) if bias else y


class PerTensorLinears:
    """INT8 weights, one static activation scale per distinct input."""

    def __init__(self, graph: Graph, body: torch.dtype) -> None:
        self.graph, self.body = graph, body

    def input(self, x: str, name: str) -> Input:
        graph = self.graph
        scale = graph.weight(f"{name}.input_scale", (), torch.float32)
        return Input(_quantize(graph, graph.cast(x, self.body, torch.float32), scale), scale)

    def linear(self, x: Input, name: str, shape: tuple[int, int], bias: bool) -> str:
        graph = self.graph
        y = graph.op("MatMul", _dequantize(graph, x), _int8_weight(graph, name, shape))
        y = graph.cast(y, torch.float32, self.body)
        return _add_bias(graph, y, name, shape[0], self.body) if bias else y


Linears = FloatLinears | PerTokenLinears | PerTensorLinears
FORMS: Mapping[str, type[Linears]] = {
    "float": FloatLinears,
    "per-token": PerTokenLinears,
    "per-tensor": PerTensorLinears,
}


def _quantize(graph: Graph, x: str, scale: str) -> str:
    return graph.op("QuantizeLinear", x, scale, graph.constant(0, torch.int8))


def _dequantize(graph: Graph, x: Input) -> str:
    """One for each product: ONNX Runtime does not fuse one that several products share."""
    assert x.scale is not None
    return graph.op("DequantizeLinear", x.value, x.scale, graph.constant(0, torch.int8))


def _int8_weight(graph: Graph, name: str, shape: tuple[int, int]) -> str:
    out, columns = shape
    weight = graph.weight(f"{name}.weight_int8", (columns, out), torch.int8)
    scale = graph.weight(f"{name}.weight_scale", (out,), torch.float32)
    return graph.op("DequantizeLinear", weight, scale, axis=1)


def _add_bias(graph: Graph, y: str, name: str, out: int, body: torch.dtype) -> str:
    return graph.op("Add", y, graph.weight(f"{name}.bias", (out,), body))
