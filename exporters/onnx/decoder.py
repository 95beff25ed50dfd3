"""The decoder graph, written from the family record.

inputs   input_ids, position_ids (batch, sequence) int64; attention_mask (batch, total) int64, 1 = token, 0 = padding;
         past_key_values.N.key/value (batch, kv_heads, past, head_dim), past may be 0; total = past + sequence
outputs  logits (batch, sequence, vocab) float32; present.N.key/value (batch, kv_heads, total, head_dim)

Standard operators only. Keys and values are never repeated: the query heads that share a kv head become rows of one
matrix, (batch, kv_heads, group * sequence, head_dim). Linears that read the same input are one matrix product: one
quantization of the input, one integer kernel. The mask, cos and sin are computed once for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from exporters.onnx.graph import Graph
from exporters.onnx.linears import FORMS, FloatLinears, Linears
from smoothquant.model import Model

CACHE = ("key", "value")
MERGED = {("q", "k", "v"): "qkv_proj", ("gate", "up"): "gate_up_proj"}  # the names that serving engines use


def _silu(graph: Graph, x: str) -> str:
    return graph.op("Mul", x, graph.op("Sigmoid", x))


ACTIVATIONS: Mapping[str, Callable[[Graph, str], str]] = {"silu": _silu}


@dataclass(frozen=True)
class Merged:
    """Linears that read one input, side by side in one matrix. name: of the matrix; roles: in order."""

    name: str
    roles: tuple[str, ...]


def merged_name(model: Model, layer: int, roles: tuple[str, ...]) -> str:
    """Module name for linears in one matrix: ("q", "k", "v") -> "model.layers.0.self_attn.qkv_proj"."""
    first = model.linear(layer, roles[0])
    return f"{first.rpartition('.')[0]}.{MERGED[roles]}" if roles in MERGED else first


class DecoderGraph:
    """Builds the graph of a model. activations, lm_head: forms of `linears.FORMS`; body: float32 or float16."""

    def __init__(self, model: Model, activations: str, body: torch.dtype, lm_head: str) -> None:
        self.model, self.geometry, self.body = model, model.geometry, body
        self.graph = Graph()
        self.merged: dict[int, list[Merged]] = {}  # by layer
        self.linears: Linears = FORMS[activations](self.graph, body)
        self.head: Linears = FORMS[lm_head](self.graph, body)
        self._build()

    def _build(self) -> None:
        graph, geometry, family = self.graph, self.geometry, self.model.family
        ids = graph.input("input_ids", torch.int64, ("batch", "sequence"))
        mask = graph.input("attention_mask", torch.int64, ("batch", "total"))
        positions = graph.input("position_ids", torch.int64, ("batch", "sequence"))
        shape = ("batch", geometry.kv_heads, "past", geometry.head_dim)
        past = [
            tuple(graph.input(f"past_key_values.{layer}.{part}", self.body, shape) for part in CACHE)
            for layer in range(geometry.layers)
        ]
        table = graph.weight(f"{family.embedding}.weight", (geometry.vocab_size, geometry.hidden_size), self.body)
        graph.scope = "mask"
        self.mask = self._mask(ids, mask)
        graph.scope = "rotary"
        self.rotary = self._rotary(positions)
        graph.scope = family.embedding
        hidden = graph.op("Gather", table, ids)
        present = []
        for layer in range(geometry.layers):
            hidden, keys, values = self._layer(layer, hidden, *past[layer])
            present.append((keys, values))
        graph.scope = family.final_norm
        hidden = self._rms_norm(hidden, family.final_norm)
        logits = self._logits(hidden, table)
        graph.output(logits, "logits", torch.float32, ("batch", "sequence", geometry.vocab_size))
        shape = ("batch", geometry.kv_heads, "total", geometry.head_dim)
        for layer, pair in enumerate(present):
            for value, part in zip(pair, CACHE, strict=True):
                graph.output(value, f"present.{layer}.{part}", self.body, shape)

    def _layer(self, layer: int, hidden: str, past_key: str, past_value: str) -> tuple[str, str, str]:
        """hidden: (batch, sequence, hidden). Returns the same, and the keys and values up to now."""
        graph, model = self.graph, self.model
        qkv = self._linear(layer, self._norm(layer, "attention", hidden), "q", "k", "v")
        graph.scope = model.family.module(layer, "attention")
        attention, keys, values = self._attention(qkv, past_key, past_value)
        o = self._linear(layer, attention, "o")
        graph.scope = model.family.module(layer, "residual")
        hidden = graph.op("Add", hidden, o)
        gate_up = self._linear(layer, self._norm(layer, "mlp", hidden), "gate", "up")
        graph.scope = model.family.module(layer, "activation")
        gate, up = graph.op("Split", gate_up, outputs=2, axis=-1, num_outputs=2)
        product = graph.op("Mul", ACTIVATIONS[self.geometry.activation](graph, gate), up)
        down = self._linear(layer, product, "down")
        graph.scope = model.family.module(layer, "residual")
        return graph.op("Add", hidden, down), keys, values

    def _linear(self, layer: int, x: str, *roles: str) -> str:
        """One matrix product for all linears that read x: (batch, sequence, sum of their outputs)."""
        model, geometry = self.model, self.geometry
        merged = Merged(merged_name(model, layer, roles), roles)
        self.merged.setdefault(layer, []).append(merged)
        self.graph.scope = merged.name
        shapes = [model.family.shape(role, geometry) for role in roles]
        shape = (sum(out for out, _ in shapes), shapes[0][1])
        biased = any(role in geometry.biased for role in roles)
        return self.linears.linear(self.linears.input(x, merged.name), merged.name, shape, biased)

    def _attention(self, qkv: str, past_key: str, past_value: str) -> tuple[str, str, str]:
        """qkv: (batch, sequence, heads of q, k, v). Returns (batch, sequence, heads * head_dim), keys, values."""
        graph, geometry = self.graph, self.geometry
        heads, kv_heads, head_dim = geometry.heads, geometry.kv_heads, geometry.head_dim
        qkv = graph.op("Reshape", qkv, graph.constant([0, 0, heads + 2 * kv_heads, head_dim]))
        qkv = graph.op("Transpose", qkv, perm=[0, 2, 1, 3])  # (batch, heads of q, k, v, sequence, head_dim)
        qk, v = graph.op("Split", qkv, graph.constant([heads + kv_heads, kv_heads]), outputs=2, axis=1)
        q, k = graph.op("Split", self._rotate(qk), graph.constant([heads, kv_heads]), outputs=2, axis=1)
        keys = graph.op("Concat", past_key, k, axis=2)
        values = graph.op("Concat", past_value, v, axis=2)
        q = graph.op("Reshape", q, graph.constant([0, kv_heads, -1, head_dim]))
        q = graph.op("Mul", q, graph.constant(1 / math.sqrt(head_dim), self.body))
        scores = graph.op("MatMul", q, graph.op("Transpose", keys, perm=[0, 1, 3, 2]))
        weights = graph.op("Softmax", graph.op("Add", scores, self.mask), axis=-1)
        y = graph.op("MatMul", weights, values)  # (batch, kv_heads, group * sequence, head_dim)
        y = graph.op("Reshape", y, graph.constant([0, heads, -1, head_dim]))
        y = graph.op("Transpose", y, perm=[0, 2, 1, 3])
        return graph.op("Reshape", y, graph.constant([0, 0, geometry.query_size])), keys, values

    def _rotate(self, x: str) -> str:
        """x: (batch, heads, sequence, head_dim) -> x * cos + swap(x) * sin, where swap exchanges the halves."""
        graph, (cos, sin) = self.graph, self.rotary
        first, second = graph.op("Split", x, outputs=2, axis=-1, num_outputs=2)
        swapped = graph.op("Concat", second, first, axis=-1)
        return graph.op("Add", graph.op("Mul", x, cos), graph.op("Mul", swapped, sin))

    def _rotary(self, positions: str) -> tuple[str, str]:
        """cos and sin, each (batch, 1, sequence, head_dim); the first half of sin is negative, for `_rotate`."""
        graph = self.graph
        frequencies = graph.array("rotary.inv_freq", self.geometry.inv_freq.numpy()[None, None])
        angle = graph.op("Unsqueeze", graph.op("Cast", positions, to=graph.element(torch.float32)), graph.constant([2]))
        angle = graph.op("Mul", angle, frequencies)
        cos, sin = graph.op("Cos", angle), graph.op("Sin", angle)
        cos = graph.op("Concat", cos, cos, axis=-1)
        sin = graph.op("Concat", graph.op("Neg", sin), sin, axis=-1)
        cos, sin = (graph.op("Unsqueeze", table, graph.constant([1])) for table in (cos, sin))
        return self._to_body(cos), self._to_body(sin)

    def _mask(self, ids: str, attention_mask: str) -> str:
        """Causal and padding mask to add to the scores, (batch, 1, group * sequence, total) in the body's dtype.

        What is hidden gets half of the dtype's least value, not -inf: a padding token that sees nothing stays finite.
        """
        graph, one = self.graph, self.graph.constant(1)
        sequence = graph.op("Gather", graph.op("Shape", ids), one)
        total = graph.op("Gather", graph.op("Shape", attention_mask), one)
        columns = graph.op("Range", graph.constant(0), total, one)
        rows = graph.op("Range", graph.op("Sub", total, sequence), total, one)
        causal = graph.op("LessOrEqual", columns, graph.op("Unsqueeze", rows, graph.constant([1])))  # (sequence, total)
        present = graph.op("Cast", attention_mask, to=self.graph.onnx.TensorProto.BOOL)
        allowed = graph.op("And", causal, graph.op("Unsqueeze", present, graph.constant([1, 2])))
        hidden = graph.constant(torch.finfo(self.body).min / 2, self.body)
        mask = graph.op("Where", allowed, graph.constant(0.0, self.body), hidden)  # (batch, 1, sequence, total)
        group = self.geometry.heads // self.geometry.kv_heads
        return graph.op("Concat", *[mask] * group, axis=2) if group > 1 else mask

    def _norm(self, layer: int, role: str, x: str) -> str:
        name = self.graph.scope = self.model.norm(layer, role)
        return self._rms_norm(x, name)

    def _rms_norm(self, x: str, name: str) -> str:
        """The operators, in the order, that ONNX Runtime and TensorRT fuse into one norm; inside float32."""
        graph = self.graph
        gain = graph.weight(f"{name}.weight", (self.geometry.hidden_size,), self.body)
        if self.body != torch.float32:
            x = graph.op("Cast", x, to=graph.element(torch.float32))
        square = graph.op("Pow", x, graph.constant(2.0, torch.float32))
        mean = graph.op("ReduceMean", square, graph.constant([-1]), keepdims=1)
        epsilon = graph.constant(self.geometry.norm_epsilon, torch.float32)
        x = graph.op("Div", x, graph.op("Sqrt", graph.op("Add", mean, epsilon)))
        return graph.op("Mul", self._to_body(x), gain)

    def _logits(self, hidden: str, table: str) -> str:
        graph, geometry = self.graph, self.geometry
        name = graph.scope = self.model.family.lm_head
        if isinstance(self.head, FloatLinears) and geometry.tied_embeddings:
            logits = graph.op("MatMul", hidden, graph.op("Transpose", table, perm=[1, 0]))
        else:
            shape = (geometry.vocab_size, geometry.hidden_size)
            logits = self.head.linear(self.head.input(hidden, name), name, shape, bias=False)
        return logits if self.body == torch.float32 else graph.op("Cast", logits, to=graph.element(torch.float32))

    def _to_body(self, x: str) -> str:
        return x if self.body == torch.float32 else self.graph.op("Cast", x, to=self.graph.element(self.body))
