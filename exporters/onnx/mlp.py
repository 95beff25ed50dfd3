"""The MLP of a layer: gated or plain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from exporters.onnx.graph import Graph
from exporters.onnx.products import Products
from smoothquant.model import Model


def _silu(graph: Graph, x: str) -> str:
    return graph.op("Mul", x, graph.op("Sigmoid", x))


def _gelu(graph: Graph, x: str) -> str:
    if graph.opset >= 20:
        return graph.op("Gelu", x)
    erf = graph.op("Erf", graph.op("Mul", x, graph.number(math.sqrt(0.5))))
    return graph.op("Mul", graph.op("Mul", x, graph.op("Add", erf, graph.number(1.0))), graph.number(0.5))


def _gelu_tanh(graph: Graph, x: str) -> str:
    if graph.opset >= 20:
        return graph.op("Gelu", x, approximate="tanh")
    cube = graph.op("Mul", graph.op("Mul", graph.op("Mul", x, x), x), graph.number(0.044715))
    inner = graph.op("Mul", graph.op("Add", x, cube), graph.number(math.sqrt(2 / math.pi)))
    return graph.op(
        "Mul", graph.op("Mul", x, graph.op("Add", graph.op("Tanh", inner), graph.number(1.0))), graph.number(0.5)
    )


def _relu(graph: Graph, x: str) -> str:
    return graph.op("Relu", x)


ACTIVATIONS: Mapping[str, Callable[[Graph, str], str]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "relu": _relu,
}


class Mlp:
    """Dense MLPs of a graph, and those of single experts. first: roles of the linears that read their input."""

    def __init__(self, graph: Graph, model: Model, products: Products) -> None:
        self.graph, self.model, self.products = graph, model, products
        self.first = ("gate", "up") if model.family.gated else ("up",)

    def of(self, layer: int, x: str) -> str:
        """x: (batch, sequence, hidden); returns the same shape."""
        return self.activated(layer, self.products.of(layer, x, *self.first))

    def activated(self, layer: int, y: str, expert: str = "") -> str:
        """From the outputs of gate and up, side by side, or of up alone, to those of down. expert: end of its roles."""
        graph = self.graph
        with graph.within(self.model.family.module(layer, f"activation{expert}")):
            activation = ACTIVATIONS[self.model.geometry.activation]
            if self.model.family.gated:
                gate, up = graph.halves(y, self.model.geometry.intermediate_size)
                y = graph.op("Mul", activation(graph, gate), up)
            else:
                y = activation(graph, y)
        return self.products.of(layer, y, f"down{expert}")
