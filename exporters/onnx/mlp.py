"""The MLP of a layer: gated or plain."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from exporters.onnx.graph import Graph
from exporters.onnx.products import Products
from smoothquant.model import Model


def _silu(graph: Graph, x: str) -> str:
    return graph.op("Mul", x, graph.op("Sigmoid", x))


def _gelu(graph: Graph, x: str) -> str:
    return graph.op("Gelu", x)


def _gelu_tanh(graph: Graph, x: str) -> str:
    return graph.op("Gelu", x, approximate="tanh")


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
                gate, up = graph.op("Split", y, outputs=2, axis=-1, num_outputs=2)
                y = graph.op("Mul", activation(graph, gate), up)
            else:
                y = activation(graph, y)
        return self.products.of(layer, y, f"down{expert}")
