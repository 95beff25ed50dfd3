"""What depends on positions alone, computed once for all layers that agree in it: masks, ALiBi, cos and sin.

mask     (batch, 1, sequence, total), or with ALiBi (batch, heads, sequence, total), in the body's dtype, to be added to
         the scores of all heads
seen     (batch, 1, group * sequence, total) bool, whether a key is seen, for the rows of all heads that share a kv head
rotary   cos and sin, each (batch, 1, sequence, rotated channels); the first half of sin is negative, for `rotate`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from exporters.onnx.graph import Graph
from exporters.onnx.places import Places
from smoothquant.attention import alibi_slopes
from smoothquant.family import Attention
from smoothquant.model import Model


class Positions:
    """places: of the tokens. Everything is built when a layer first asks for it."""

    def __init__(self, graph: Graph, model: Model, places: Places) -> None:
        self.graph, self.model, self.places = graph, model, places
        self._made: dict[tuple, Any] = {}

    def mask(self, window: int | None) -> str:
        """The mask of layers with this window, to be added."""
        return self._once(("mask", window), lambda: self._mask(window))

    def seen(self, window: int | None) -> str:
        """Which keys the rows of a layer with this window see."""
        return self._once(("seen", window), lambda: self._seen(window))

    @property
    def hidden(self) -> str:
        """What the score of a hidden key becomes, or gets added: half of the dtype's least value, not -inf. A padding
        token that sees nothing stays finite."""
        return self.graph.number(torch.finfo(self.graph.body).min / 2)

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def rotate(self, x: str, kind: Attention) -> str:
        """x: (batch, heads, sequence, head_dim) -> x * cos + swap(x) * sin, where swap exchanges the halves of the
        rotated channels; the others stay."""
        if not kind.inv_freq:
            return x
        graph, rotated, head_dim = self.graph, 2 * len(kind.inv_freq), self.model.geometry.head_dim
        cos, sin = self._once(("rotary", kind.inv_freq, kind.rotary_scale), lambda: self._rotary(kind))
        rest: list[str] = []
        if rotated < head_dim:
            x, *rest = graph.op("Split", x, graph.constant([rotated, head_dim - rotated]), outputs=2, axis=-1)
        first, second = graph.halves(x, rotated // 2)
        swapped = graph.op("Concat", second, first, axis=-1)
        y = graph.op("Add", graph.op("Mul", x, cos), graph.op("Mul", swapped, sin))
        return graph.op("Concat", y, *rest, axis=-1) if rest else y

    def _rotary(self, kind: Attention) -> tuple[str, str]:
        graph = self.graph
        with graph.within("rotary"):
            frequencies = graph.constant([[list(kind.inv_freq)]], torch.float32)
            positions = graph.op("Cast", self.places.position_ids, to=graph.element(torch.float32))
            angle = graph.op("Mul", graph.op("Unsqueeze", positions, graph.constant([2])), frequencies)
            cos, sin = graph.op("Cos", angle), graph.op("Sin", angle)
            if kind.rotary_scale != 1:
                scale = graph.constant(kind.rotary_scale, torch.float32)
                cos, sin = graph.op("Mul", cos, scale), graph.op("Mul", sin, scale)
            cos = graph.op("Concat", cos, cos, axis=-1)
            sin = graph.op("Concat", graph.op("Neg", sin), sin, axis=-1)
            cos, sin = (graph.op("Unsqueeze", table, graph.constant([1])) for table in (cos, sin))
            return graph.narrow(cos), graph.narrow(sin)

    def _mask(self, window: int | None) -> str:
        graph = self.graph
        with graph.within("mask"):
            bias = self._once(("alibi",), self._alibi) if self.model.family.alibi else graph.number(0.0)
            return graph.op(
                "Where", self._once(("allowed", window), lambda: self.places.seen(window)), bias, self.hidden
            )

    def _seen(self, window: int | None) -> str:
        graph, geometry = self.graph, self.model.geometry
        with graph.within("mask"):
            allowed = self._once(("allowed", window), lambda: self.places.seen(window))
            return graph.op("Concat", *[allowed] * (geometry.heads // geometry.kv_heads), axis=2)

    def _alibi(self) -> str:
        """(batch, heads, sequence, total) in the body's dtype: the key's bias minus that of the query's own position.
        The softmax does not see the difference, and 16 bits hold it where it matters, next to the query."""
        graph, geometry, alibi = self.graph, self.model.geometry, self.model.family.alibi
        assert alibi is not None
        slopes = alibi_slopes(geometry.heads).to(alibi.dtype).float()[:, None, None]

        def bias(positions: str, axes: list[int]) -> str:
            x = graph.op("Cast", positions, to=graph.element(torch.float32))
            x = graph.rounded(graph.op("Unsqueeze", x, graph.constant(axes)), alibi.dtype)
            return graph.rounded(graph.op("Mul", x, graph.constant(slopes.tolist(), torch.float32)), alibi.dtype)

        keys, queries = self.places.key_positions, self.places.position_ids
        relative = graph.op("Sub", bias(keys, [1, 2]), bias(queries, [1, 3]))
        if alibi.scaled:
            relative = graph.op("Mul", relative, graph.constant(geometry.score_scale, torch.float32))
        return graph.narrow(relative)
