"""Matrix products of a layer: linears that read one input lie side by side in one matrix."""

from __future__ import annotations

from dataclasses import dataclass

from exporters.onnx.graph import Graph
from exporters.onnx.linears import Input, Linears
from smoothquant.model import Model

MERGED = {("q", "k", "v"): "qkv_proj", ("gate", "up"): "gate_up_proj"}  # the names that serving engines use


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

    def input(self, layer: int, x: str, roles: tuple[str, ...]) -> Input:
        """Quantize what these linears, and perhaps others, read. x: (..., in)."""
        name = merged_name(self.model, layer, roles)
        with self.graph.within(name):
            return self.form.input(x, name)

    def linear(self, layer: int, x: Input, roles: tuple[str, ...]) -> str:
        """One matrix product for all these linears: (..., sum of their outputs) in the body's dtype."""
        model, geometry = self.model, self.model.geometry
        merged = Merged(merged_name(model, layer, roles), roles)
        self.merged.setdefault(layer, []).append(merged)
        shapes = [model.family.shape(role, geometry) for role in roles]
        shape = (sum(out for out, _ in shapes), shapes[0][1])
        biased = any(model.family.has_bias(role, geometry) for role in roles)
        with self.graph.within(merged.name):
            return self.form.linear(x, merged.name, shape, biased)

    def of(self, layer: int, x: str, *roles: str) -> str:
        """Both in one: for an input that nothing else reads."""
        return self.linear(layer, self.input(layer, x, roles), roles)
