"""Matrix products of a layer: linears that read one input lie side by side in one matrix."""

from __future__ import annotations

from dataclasses import dataclass

from exporters.onnx.graph import Graph
from exporters.onnx.linears import Input, Linears
from smoothquant.model import Model

QKV = ("q", "k", "v")
MERGED = {  # the names that serving engines use, and theirs put together
    QKV: "qkv_proj",
    ("gate", "up"): "gate_up_proj",
    (*QKV, "up"): "qkv_up_proj",
    (*QKV, "gate", "up"): "qkv_gate_up_proj",
}


@dataclass(frozen=True)
class Merged:
    """Linears that read one input, side by side in one matrix. name: of the matrix; roles: in order."""

    name: str
    roles: tuple[str, ...]


def merged_name(model: Model, layer: int, roles: tuple[str, ...]) -> str:
    """Module name for linears in one matrix: ("q", "k", "v") -> "model.layers.0.self_attn.qkv_proj"."""
    first = model.linear(layer, roles[0])
    kinds = tuple(role.partition(".")[0] for role in roles)
    return f"{first.rpartition('.')[0]}.{MERGED[kinds]}" if kinds in MERGED else first


class Products:
    """The quantized products of a graph. form: how they are spelled. merged: what lies in the matrices, by layer."""

    def __init__(self, graph: Graph, model: Model, form: Linears) -> None:
        self.graph, self.model, self.form = graph, model, form
        self.merged: dict[int, list[Merged]] = {}

    def of(self, layer: int, x: str, *roles: str) -> str:
        """One matrix product for all linears that read x (..., in): (..., sum of their outputs) in the body's dtype."""
        name = merged_name(self.model, layer, roles)
        with self.graph.within(name):
            return self.linear(layer, self.form.normalize(x), *roles)

    def linear(self, layer: int, x: Input, *roles: str) -> str:
        """The same, for an input that is normalized already."""
        model, geometry = self.model, self.model.geometry
        merged = Merged(merged_name(model, layer, roles), roles)
        self.merged.setdefault(layer, []).append(merged)
        shape = (self.width(roles), model.family.shape(roles[0], geometry)[1])
        biased = any(model.family.has_bias(role, geometry) for role in roles)
        with self.graph.within(merged.name):
            return self.form.linear(x, merged.name, shape, biased)

    def width(self, roles: tuple[str, ...]) -> int:
        """Output channels of these linears."""
        return sum(self.model.family.shape(role, self.model.geometry)[0] for role in roles)
