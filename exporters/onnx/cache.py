"""Keys and values of earlier tokens: inputs of the graph, joined by the new ones, outputs again.

grown      all = Concat(past, new)                                     a copy of the whole cache in every run
in place   all = TensorScatter(past, new, write_indices)               buffers of a fixed capacity; past and all may be
                                                                       one memory, and then nothing is copied
int8       new = QuantizeLinear(keys or values, scale)                 queries read DequantizeLinear(all, scale)

TensorScatter is how ONNX (opset 24) spells TensorRT's KVCacheUpdate: TensorRT's parser makes this layer of it, which
wants a capacity that is a number in the graph, and float buffers. Buffers begin with any finite numbers: what no token
has written yet is hidden by the mask, not left out.

The integers are what goes in and comes out: a cache of a quarter of the size, or half. New keys and values are read as
the cache gives them back, so that a prompt run in pieces is the prompt run whole. Scales are static, of a layer's keys
and of its values (`smoothquant.kv_cache`), and float32 like all others.

Keys are flipped as integers, before DequantizeLinear: a Transpose behind it makes ONNX Runtime 1.32 convert the whole
cache once more, or, with int8 zero points, refuse the graph.
"""

from __future__ import annotations

import torch

from exporters.onnx.contents import of_cache_scale
from exporters.onnx.graph import Graph
from smoothquant.artifacts import ports
from smoothquant.artifacts.ports import CACHED
from smoothquant.artifacts.smoothing_file import CACHE_SCALE
from smoothquant.family import Geometry


class CacheNodes:
    """The caches of all layers: keys and values, (batch, kv_heads, past, head_dim) each.

    dtype: that they are held in. names: the module names of the layers; a scale is stored under its layer's name.
    capacity: the tokens of a buffer that is written in place; None for a cache that grows.
    """

    def __init__(
        self, graph: Graph, geometry: Geometry, dtype: torch.dtype, names: list[str], capacity: int | None = None
    ) -> None:
        self.graph, self.geometry, self.dtype, self.names, self.capacity = graph, geometry, dtype, names, capacity
        self._present: list[tuple[str, str]] = []
        for layer in range(len(names)):
            for part in CACHED:
                graph.input(ports.past(layer, part), self.dtype, self._shape("past"))

    def extended(self, layer: int, part: str, new: str, flipped: bool = False) -> str:
        """All keys or all values of a layer up to now, in the body's dtype.

        part: "key" or "value". new: the keys or values of the tokens under way. flipped: whether the last two
        dimensions are exchanged.
        """
        graph, steps = self.graph, []
        if self.dtype == torch.int8:
            scale = graph.weight(
                f"{self.names[layer]}.{part}{CACHE_SCALE}", (), torch.float32, of_cache_scale(layer, part)
            )
            steps = [scale, graph.constant(0, torch.int8)]
            new = graph.op("QuantizeLinear", graph.wide(new), *steps)
        past = ports.past(layer, part)
        if self.capacity is None:
            held = graph.op("Concat", past, new, axis=2)
        else:
            held = graph.op("TensorScatter", past, new, ports.WRITE_INDICES, axis=2, mode="linear")
        self._present.append((held, ports.present(layer, part)))
        seen = graph.op("Transpose", held, perm=[0, 1, 3, 2]) if flipped else held
        return graph.narrow(graph.op("DequantizeLinear", seen, *steps)) if steps else seen

    def put_out(self) -> None:
        """Declare the outputs."""
        for held, name in self._present:
            self.graph.output(held, name, self.dtype, self._shape("total"))

    def _shape(self, tokens: str) -> tuple[int | str, ...]:
        return ("batch", self.geometry.kv_heads, self.capacity or tokens, self.geometry.head_dim)
