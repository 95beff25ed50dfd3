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

from exporters.onnx.contents import Contents
from exporters.onnx.graph import Graph
from smoothquant.quantization import EPS, QMAX
from smoothquant.scheme import ACTIVATIONS, FLOAT, Precision


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


@dataclass(frozen=True)
class Stored:
    """A linear's tensors. name: of its module; shape: (out, in); contents: with a bias if the linear has one."""

    name: str
    shape: tuple[int, int]
    contents: Contents

    def tensor(self, graph: Graph, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> str:
        """One of them, in external data."""
        return graph.weight(f"{self.name}.{kind}", shape, dtype, self.contents[kind])

    def int8_weight(self, graph: Graph) -> tuple[str, str]:
        """Its integers, int8 (in, out), and their scale, float32 (out,)."""
        out, columns = self.shape
        integers = self.tensor(graph, "weight_int8", (columns, out), torch.int8)
        return integers, self.tensor(graph, "weight_scale", (out,), torch.float32)


class FloatLinears:
    """Weights and arithmetic in the body's dtype."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def normalize(self, x: str) -> Input:
        """x: (..., tokens, in) in the body's dtype."""
        return Input(x)

    def linear(self, x: Input, stored: Stored) -> str:
        """Returns (..., tokens, out) in the body's dtype."""
        out, columns = stored.shape
        weight = stored.tensor(self.graph, "weight", (columns, out), self.graph.body)
        return _add_bias(self.graph, self.graph.op("MatMul", x.value, weight), stored)


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

    def linear(self, x: Input, stored: Stored) -> str:
        assert x.token_amax is not None
        graph = self.graph
        integers = _quantize_dequantize(graph, x.value, graph.constant(1 / QMAX, torch.float32))
        y = graph.op("Mul", graph.op("MatMul", integers, _int8_weight(graph, stored)), x.token_amax)
        return _add_bias(graph, graph.narrow(y), stored)


class PerTensorLinears:
    """INT8 weights, one static activation scale per distinct input."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def normalize(self, x: str) -> Input:
        return Input(self.graph.wide(x))

    def linear(self, x: Input, stored: Stored) -> str:
        graph = self.graph
        scale = stored.tensor(graph, "input_scale", (), torch.float32)
        y = graph.op("MatMul", _quantize_dequantize(graph, x.value, scale), _int8_weight(graph, stored))
        return _add_bias(graph, graph.narrow(y), stored)


Linears = FloatLinears | PerTokenLinears | PerTensorLinears
FORMS: Mapping[Precision, type[Linears]] = {  # by the activations
    FLOAT: FloatLinears,
    ACTIVATIONS["per-token"]: PerTokenLinears,
    ACTIVATIONS["per-tensor"]: PerTensorLinears,
}


def _quantize_dequantize(graph: Graph, x: str, scale: str) -> str:
    zero = graph.constant(0, torch.int8)
    return graph.op("DequantizeLinear", graph.op("QuantizeLinear", x, scale, zero), scale, zero)


def _int8_weight(graph: Graph, stored: Stored) -> str:
    return graph.op("DequantizeLinear", *stored.int8_weight(graph), axis=1)


def _add_bias(graph: Graph, y: str, stored: Stored) -> str:
    if "bias" not in stored.contents:
        return y
    return graph.op("Add", y, stored.tensor(graph, "bias", stored.shape[:1], graph.body))
