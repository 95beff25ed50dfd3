"""Norms, in the operators and in the order that ONNX Runtime and TensorRT fuse into one kernel; inside float32.

The gain is float32, too, and multiplied before the cast to the body's dtype: with a half body, TensorRT's compiler then
fuses residual, norm and the quantization per token behind it into one kernel, else into three.
"""

from __future__ import annotations

import torch

from exporters.onnx.contents import Contents, of_norm, of_outer_norm
from exporters.onnx.graph import Graph
from smoothquant.model import Model


class Norms:
    """Norms of a model.

    In external data: `<name>.weight`, what the normalized input is multiplied by, and for layer norms `<name>.bias`.
    """

    def __init__(self, graph: Graph, model: Model) -> None:
        self.graph, self.model = graph, model

    def at(self, name: str, x: str, size: int | None = None, contents: Contents | None = None) -> str:
        """The norm of this module. x: (..., size) with size channels, the hidden size by default; returns the same.
        contents: of a layer's norm."""
        size, contents = size or self.model.geometry.hidden_size, contents or of_outer_norm(self.model, name)
        with self.graph.within(name):
            parts = ("weight", "bias") if self.model.family.norm == "layer" else ("weight",)
            tensors = [self.graph.weight(f"{name}.{part}", (size,), torch.float32, contents[part]) for part in parts]
            norm = self._layer if self.model.family.norm == "layer" else self._rms
            return self.graph.narrow(norm(self.graph.wide(x), *tensors))

    def of_layer(self, layer: int, role: str, x: str) -> str:
        """x through the norm with this role, where the layer has one."""
        if role not in self.model.family.norms:
            return x
        size = self.model.family.norm_size(role, self.model.geometry)
        return self.at(self.model.norm(layer, role), x, size, of_norm(layer, role))

    def _rms(self, x: str, gain: str) -> str:
        graph = self.graph
        square = graph.op("Pow", x, graph.constant(2.0, torch.float32))
        mean = graph.reduce("ReduceMean", square)
        epsilon = graph.constant(self.model.geometry.norm_epsilon, torch.float32)
        x = graph.op("Div", x, graph.op("Sqrt", graph.op("Add", mean, epsilon)))
        return graph.op("Mul", x, gain)

    def _layer(self, x: str, gain: str, bias: str) -> str:
        epsilon = self.model.geometry.norm_epsilon
        return self.graph.op("LayerNormalization", x, gain, bias, axis=-1, epsilon=epsilon)
