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
    """An activation for linears. value: what is quantized, float32, or taken as it is, in the body's dtype.
    token_amax: to multiply the linears' outputs by, if any."""

    value: str
    token_amax: str | None = None

    def rows(self, graph: Graph, indices: str) -> Input:
        """Some of the tokens of an activation (tokens, in). indices: (n,) int64."""
        amax = self.token_amax and graph.op("Gather", self.token_amax, indices, axis=0)
        return Input(graph.op("Gather", self.value, indices, axis=0), amax)


class FloatLinears:
    """Weights and arithmetic in the body's dtype."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def normalize(self, x: str) -> Input:
        """x: (..., tokens, in) in the body's dtype."""
        return Input(x)

    def linear(self, x: Input, name: str, shape: tuple[int, int], bias: bool) -> str:
        """name: of the linear's module; shape: (out, in). Returns (..., tokens, out) in the body's dtype."""
        out, columns = shape
        y = self.graph.op("MatMul", x.value, self.graph.weight(f"{name}.weight", (columns, out), self.graph.body))
        return _add_bias(self.graph, y, name, out) if bias else y


class PerTokenLinears:
    """INT8 weights, one dynamic activation scale per token."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def normalize(self, x: str) -> Input:
        graph = self.graph
        x = graph.wide(x)
        largest = graph.reduce("ReduceMax", graph.op("Abs", x))
        amax = graph.op("Max", largest, graph.constant(EPS, torch.float32))
        return Input(graph.op("Div", x, amax), amax)

    def linear(self, x: Input, name: str, shape: tuple[int, int], bias: bool) -> str:
        assert x.token_amax is not None
        graph = self.graph
        integers = _quantize_dequantize(graph, x.value, graph.constant(1 / QMAX, torch.float32))
        y = graph.op("Mul", graph.op("MatMul", integers, _int8_weight(graph, name, shape)), x.token_amax)
        y = graph.narrow(y)
        return _add_bias(graph, y, name, shape[0]) if bias else y


class PerTensorLinears:
    """INT8 weights, one static activation scale per distinct input."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def normalize(self, x: str) -> Input:
        return Input(self.graph.wide(x))

    def linear(self, x: Input, name: str, shape: tuple[int, int], bias: bool) -> str:
        graph = self.graph
        scale = graph.weight(f"{name}.input_scale", (), torch.float32)
        y = graph.op("MatMul", _quantize_dequantize(graph, x.value, scale), _int8_weight(graph, name, shape))
        y = graph.narrow(y)
        return _add_bias(graph, y, name, shape[0]) if bias else y


Linears = FloatLinears | PerTokenLinears | PerTensorLinears
FORMS: Mapping[str, type[Linears]] = {
    "float": FloatLinears,
    "per-token": PerTokenLinears,
    "per-tensor": PerTensorLinears,
}


def _quantize_dequantize(graph: Graph, x: str, scale: str) -> str:
    zero = graph.constant(0, torch.int8)
    return graph.op("DequantizeLinear", graph.op("QuantizeLinear", x, scale, zero), scale, zero)


def _int8_weight(graph: Graph, name: str, shape: tuple[int, int]) -> str:
    out, columns = shape
    weight = graph.weight(f"{name}.weight_int8", (columns, out), torch.int8)
    scale = graph.weight(f"{name}.weight_scale", (out,), torch.float32)
    return graph.op("DequantizeLinear", weight, scale, axis=1)


def _add_bias(graph: Graph, y: str, name: str, out: int) -> str:
    return graph.op("Add", y, graph.weight(f"{name}.bias", (out,), graph.body))
