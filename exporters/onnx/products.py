"""Matrix products of a layer: linears that read one input lie side by side in one matrix."""

from __future__ import annotations

from collections.abc import Collection

from exporters.onnx.contents import of_linears
from exporters.onnx.graph import Graph
from exporters.onnx.linears import Input, Linears, Stored
from smoothquant.model import Model
from smoothquant.roles import parsed
from smoothquant.scheme import Scheme

QKV = ("q", "k", "v")
MERGED = {  # the names that serving engines use, and theirs put together
    QKV: "qkv_proj",
    ("gate", "up"): "gate_up_proj",
    (*QKV, "up"): "qkv_up_proj",
    (*QKV, "gate", "up"): "qkv_gate_up_proj",
}


def merged_name(model: Model, layer: int, roles: tuple[str, ...]) -> str:
    """Module name for linears in one matrix: ("q", "k", "v") -> "model.layers.0.self_attn.qkv_proj"."""
    first = model.linear(layer, roles[0])
    kinds = tuple(parsed(role).kind for role in roles)
    return f"{first.rpartition('.')[0]}.{MERGED[kinds]}" if kinds in MERGED else first


def quantized_names(model: Model, kept: Collection[str] = ()) -> list[str]:
    """Names of the matrices that a quantized graph must have, by the record alone: what reads one input is one matrix,
    of every expert. kept: module names of linears that stay in float."""
    names = ((layer, roles) for layer in range(model.geometry.layers) for roles in model.side_by_side)
    return [merged_name(model, layer, roles) for layer, roles in names if model.linear(layer, roles[0]) not in kept]


class Products:
    """The matrix products of a graph. quantized, plain: the two ways to spell one. scheme: says which linears are
    spelled plain, and how the others hold their weights."""

    def __init__(self, graph: Graph, model: Model, quantized: Linears, plain: Linears, scheme: Scheme) -> None:
        self.graph, self.model, self.quantized, self.plain, self.scheme = graph, model, quantized, plain, scheme

    def form(self, layer: int, *roles: str) -> Linears:
        """How the product of these linears is spelled."""
        return self.plain if self._in_float(layer, roles) else self.quantized

    def of(self, layer: int, x: str, *roles: str) -> str:
        """One matrix product for all linears that read x (..., in): (..., sum of their outputs) in the body's dtype."""
        name = merged_name(self.model, layer, roles)
        with self.graph.within(name):
            return self.linear(layer, self.form(layer, *roles).normalize(x), *roles)

    def linear(self, layer: int, x: Input, *roles: str) -> str:
        """The same, for an input that is normalized already."""
        model, geometry = self.model, self.model.geometry
        shape = (self.width(roles), model.family.shape(roles[0], geometry)[1])
        contents = of_linears(model, layer, roles, self.scheme.weights, kept=self._in_float(layer, roles))
        stored = Stored(merged_name(model, layer, roles), shape, contents)
        with self.graph.within(stored.name):
            return self.form(layer, *roles).linear(x, stored)

    def _in_float(self, layer: int, roles: tuple[str, ...]) -> bool:
        return self.model.linear(layer, roles[0]) in self.scheme.float_linears

    def width(self, roles: tuple[str, ...]) -> int:
        """Output channels of these linears."""
        return sum(self.model.family.shape(role, self.model.geometry)[0] for role in roles)
