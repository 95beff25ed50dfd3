"""Norms, in the operators and in the order that ONNX Runtime and TensorRT fuse into one kernel; inside float32.

The gain is float32, too, and multiplied before the cast to the body's dtype: with a half body, TensorRT's compiler then
fuses residual, norm and the quantization per token behind it into one kernel, else into three.
"""

from __future__ import annotations

import torch

from exporters.onnx.graph import Graph
from smoothquant.model import Model


class Norms:
    """Norms of a model.

    In external data: `<name>.weight`, what the normalized input is multiplied by, and for layer norms `<name>.bias`.
    """

    def __init__(self, graph: Graph, model: Model) -> None:
        self.graph, self.model = graph, model

    def at(self, name: str, x: str, size: int | None = None) -> str:
        """The norm of this module. x: (..., size) with size channels, the hidden size by default; returns the same."""
        size = size or self.model.geometry.hidden_size
        with self.graph.within(name):
            norm = self._layer if self.model.family.norm == "layer" else self._rms
            return self.graph.narrow(norm(name, self.graph.wide(x), size))

    def of_layer(self, layer: int, role: str, x: str) -> str:
        """x through the norm with this role, where the layer has one."""
        if role not in self.model.family.norms:
            return x
        return self.at(self.model.norm(layer, role), x, self.model.family.norm_size(role, self.model.geometry))

    def _rms(self, name: str, x: str, size: int) -> str:
        graph = self.graph
        gain = graph.weight(f"{name}.weight", (size,), torch.float32)
        square = graph.op("Pow", x, graph.constant(2.0, torch.float32))
        mean = graph.reduce("ReduceMean", square)
        epsilon = graph.constant(self.model.geometry.norm_epsilon, torch.float32)
        x = graph.op("Div", x, graph.op("Sqrt", graph.op("Add", mean, epsilon)))
        return graph.op("Mul", x, gain)

    def _layer(self, name: str, x: str, size: int) -> str:
        graph = self.graph
        gain, bias = (graph.weight(f"{name}.{part}", (size,), torch.float32) for part in ("weight", "bias"))
        return graph.op("LayerNormalization", x, gain, bias, axis=-1, epsilon=self.model.geometry.norm_epsilon)
