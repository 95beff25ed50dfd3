"""A layer of experts: every token goes through those that the router chooses, and only those are computed.

    slots    (token, rank among its choices), sorted by expert, by counting: no NonZero, no If and no scatter with a
             reduction, which TensorRT lacks or compiles badly; no CumSum but along axis 1, since TensorRT may take one
             axis for all of them (onnx/onnx-tensorrt#1034)
    expert   gets the rows of its slots, maybe none: then none of its weights is read
    output   the rows go back to their slots, times their shares, and each token's are summed

One graph for ONNX Runtime and TensorRT. Tokens are normalised before they are gathered and quantized afterwards, since
ONNX Runtime fuses no product behind a Gather of integers.
"""

from __future__ import annotations

import torch

from exporters.onnx.contents import of_router
from exporters.onnx.graph import Graph
from exporters.onnx.mlp import Mlp
from smoothquant.model import Model
from smoothquant.roles import ROUTER


class Experts:
    """The expert layers of a graph. The router computes in float32."""

    def __init__(self, graph: Graph, model: Model, mlp: Mlp) -> None:
        self.graph, self.model, self.mlp = graph, model, mlp
        self.experts, self.chosen = model.geometry.experts, model.geometry.experts_per_token

    def of(self, layer: int, x: str) -> str:
        """x: (batch, sequence, hidden); returns the same shape."""
        graph, hidden = self.graph, self.model.geometry.hidden_size
        form = self.mlp.products.form(layer, *(f"{role}.0" for role in self.mlp.first))  # all experts read one input
        with graph.within(self.model.linear(layer, ROUTER)):
            shape = graph.op("Shape", x)
            rows = graph.op("Reshape", x, graph.constant([-1, hidden]))  # (tokens, hidden)
            shares, chosen = self._route(layer, rows)  # (tokens, experts per token) each
            counts, place, token = self._sort(chosen)
            tokens = graph.op("Split", token, counts, outputs=self.experts, axis=0)  # of every expert
            normal = form.normalize(rows)
        parts = []
        for expert in range(self.experts):
            first = tuple(f"{role}.{expert}" for role in self.mlp.first)
            y = self.mlp.products.linear(layer, normal.rows(graph, tokens[expert]), *first)
            parts.append(self.mlp.activated(layer, y, f".{expert}"))
        with graph.within(self.model.linear(layer, ROUTER)):
            y = graph.op("Gather", graph.op("Concat", *parts, axis=0), place)  # slots in their order again
            y = graph.op("Reshape", y, graph.constant([-1, self.chosen, hidden]))
            # a product, since ONNX Runtime's sum over experts takes another order for one token than for several
            y = graph.op("MatMul", graph.op("Unsqueeze", shares, graph.constant([1])), y)
            return graph.op("Reshape", y, shape)

    def _route(self, layer: int, rows: str) -> tuple[str, str]:
        """Shares in the body's dtype, and the chosen experts, int64."""
        graph, hidden = self.graph, self.model.geometry.hidden_size
        name, content = f"{self.model.linear(layer, ROUTER)}.weight", of_router(layer)
        weight = graph.weight(name, (hidden, self.experts), torch.float32, content)
        scores = graph.op("MatMul", graph.wide(rows), weight)
        likeliest, chosen = graph.op(
            "TopK", graph.op("Softmax", scores, axis=-1), graph.constant([self.chosen]), outputs=2, axis=-1
        )
        if self.model.geometry.normalized_shares:
            total = graph.op("ReduceSum", likeliest, graph.constant([-1]), keepdims=1)
            likeliest = graph.op("Div", likeliest, total)
        return graph.narrow(likeliest), chosen

    def _sort(self, chosen: str) -> tuple[str, str, str]:
        """chosen: (tokens, experts per token). Returns counts (experts,), slots of each expert; place (slots,), where
        each goes in their order; token (slots,), whose slot comes there."""
        graph, one = self.graph, self.graph.constant(1)
        slots = graph.op("Reshape", chosen, graph.constant([1, -1]))
        expert = graph.constant([[expert] for expert in range(self.experts)])
        hit = graph.op("Cast", graph.op("Equal", slots, expert), to=graph.element(torch.int64))  # (experts, slots)
        counts = graph.op("ReduceSum", hit, graph.constant([1]), keepdims=1)
        earlier = graph.op("Cast", graph.op("Less", slots, expert), to=graph.element(torch.int64))
        before = graph.op("ReduceSum", earlier, graph.constant([1]), keepdims=1)  # of the experts before each
        rank = graph.op("Sub", graph.op("CumSum", hit, one), one)
        place = graph.op("Mul", hit, graph.op("Add", rank, before))
        place = graph.op("ReduceSum", place, graph.constant([0]), keepdims=0)
        size = graph.op("Squeeze", graph.op("Shape", place), graph.constant([0]))
        slot = graph.op("ScatterElements", place, place, graph.op("Range", graph.constant(0), size, one), axis=0)
        token = graph.op("Div", slot, graph.constant(self.chosen))
        return graph.op("Reshape", counts, graph.constant([-1])), place, token
