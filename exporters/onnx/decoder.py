"""The decoder graph, written from the family record.

inputs   input_ids, position_ids (batch, sequence) int64; attention_mask (batch, total) int64, 1 = token, 0 = padding;
         past_key_values.N.key/value (batch, kv_heads, past, head_dim), past may be 0; total = past + sequence (`cache`)
outputs  logits (batch, sequence, vocab) float32; present.N.key/value (batch, kv_heads, total, head_dim)

Standard operators only. Keys and values are never repeated: the query heads that share a kv head become rows of one
matrix, (batch, kv_heads, group * sequence, head_dim). Linears that read the same input are one matrix product: one
quantization of the input, one integer kernel.
"""

from __future__ import annotations

from typing import Any

import torch

from exporters.onnx.cache import CacheNodes
from exporters.onnx.contents import of_int8_head, of_outer_linear, of_outer_norm
from exporters.onnx.experts import Experts
from exporters.onnx.external_data import ExternalData
from exporters.onnx.form import Form
from exporters.onnx.graph import Graph
from exporters.onnx.linears import FORMS, FloatLinears, Input, Linears, Stored
from exporters.onnx.mlp import Mlp
from exporters.onnx.norms import Norms
from exporters.onnx.positions import Positions
from exporters.onnx.products import QKV, Products, quantized_names
from exporters.onnx.tables import FloatTable, Table, float_table, int8_table
from smoothquant.artifacts.ports import ATTENTION_MASK, INPUT_IDS, LOGITS, LOGITS_TO_KEEP, POSITION_IDS
from smoothquant.embedding import embedding_of
from smoothquant.head import UNPLANNED, PlannedHead
from smoothquant.model import Model


class DecoderGraph:
    """Builds the graph of a model. data: of another graph of the model, to share its weights. planned: what a plan says
    of an output head in INT8."""

    def __init__(
        self, model: Model, form: Form, data: ExternalData | None = None, planned: PlannedHead = UNPLANNED
    ) -> None:
        self.model, self.geometry, self.form, self.planned = model, model.geometry, form, planned
        self.graph = Graph(form.dtype, form.opset, data)
        scheme = self.scheme = form.scheme
        quantized, plain = FORMS[scheme.activations](self.graph), FloatLinears(self.graph)
        self.products = Products(self.graph, model, quantized, plain, scheme)
        self.norms = Norms(self.graph, model)
        self.mlp = Mlp(self.graph, model, self.products)
        self.branch: Mlp | Experts = Experts(self.graph, model, self.mlp) if model.geometry.experts else self.mlp
        self.head: Linears = FORMS[scheme.head_activations](self.graph)
        self._build()

    @property
    def quantized_names(self) -> list[str]:
        """Names of the matrices that must be in INT8."""
        linears = quantized_names(self.model, self.scheme.float_linears) if self.scheme.quantized else []
        return linears + ([self.model.family.lm_head] if self.scheme.head.quantized else [])

    def _build(self) -> None:
        graph, geometry, family = self.graph, self.geometry, self.model.family
        ids = graph.input(INPUT_IDS, torch.int64, ("batch", "sequence"))
        mask = graph.input(ATTENTION_MASK, torch.int64, ("batch", "total"))
        position_ids = graph.input(POSITION_IDS, torch.int64, ("batch", "sequence"))
        layers = [family.layer.format(layer) for layer in range(geometry.layers)]
        self.cache = CacheNodes(graph, geometry, self.form.cache_dtype, layers)
        self.positions = Positions(graph, self.model, ids, mask, position_ids, grouped=graph.opset < 23)
        head = self._head_matrix()
        hidden = self._embed(self._table(head), ids, position_ids)
        for layer in range(geometry.layers):
            hidden = self._layer(layer, hidden)
        graph.output(self._logits(hidden, head), LOGITS, torch.float32, ("batch", "kept", geometry.vocab_size))
        self.cache.put_out()

    def _head_matrix(self) -> FloatTable | Stored:
        """The matrix of the output head: the embedding's where they are tied in float."""
        model, geometry = self.model, self.geometry
        shape = (geometry.vocab_size, geometry.embedded_size)
        if self.scheme.head.quantized:
            return Stored(model.family.lm_head, shape, of_int8_head(model, self.planned))
        if geometry.tied_embeddings:
            return float_table(self.graph, model, model.family.embedding, shape, multiplied=True)
        return Stored(model.family.lm_head, shape, of_outer_linear(model, model.lm_head))

    def _table(self, head: FloatTable | Stored) -> Table:
        """The table of the embedding: the head's matrix, where they are one."""
        model, geometry = self.model, self.geometry
        shape = (geometry.vocab_size, geometry.embedded_size)
        if self.scheme.embedding.quantized:
            return int8_table(self.graph, embedding_of(model, self.scheme, self.planned), shape, head)
        return head if isinstance(head, FloatTable) else float_table(self.graph, model, model.family.embedding, shape)

    def _embed(self, table: Table, ids: str, position_ids: str) -> str:
        graph, geometry, family = self.graph, self.geometry, self.model.family
        graph.scope = family.embedding
        hidden = table.rows(graph, ids)
        if geometry.embedding_scale != 1:
            hidden = graph.op("Mul", hidden, graph.number(geometry.embedding_scale))
        if family.project_in:
            hidden = self._project(family.project_in, hidden, (geometry.hidden_size, geometry.embedded_size))
        if family.positions:
            graph.scope = family.positions
            places = geometry.max_positions + family.position_offset
            index = graph.op("Add", position_ids, graph.constant(family.position_offset))
            learned = float_table(graph, self.model, family.positions, (places, geometry.hidden_size))
            hidden = graph.op("Add", hidden, learned.rows(graph, index))
        return self.norms.at(family.embedding_norm, hidden) if family.embedding_norm else hidden

    def _layer(self, layer: int, hidden: str) -> str:
        """hidden: (batch, sequence, hidden); returns the same shape."""
        graph, family, norms, products = self.graph, self.model.family, self.norms, self.products
        scale = self.geometry.residual_scale
        x = norms.of_layer(layer, "attention", hidden)
        if family.parallel and "mlp" not in family.norms:  # both branches read one input: one product
            y = products.of(layer, x, *QKV, *self.mlp.first)
            size = self.geometry.query_size + 2 * self.geometry.kv_size
            sizes = graph.constant([size, products.width(self.mlp.first)])
            graph.scope = family.module(layer, "branches")
            qkv, inner = graph.op("Split", y, sizes, outputs=2, axis=-1)
            branch = self._attention(layer, qkv)
            other = self.mlp.activated(layer, inner)
        else:
            branch = self._attention(layer, products.of(layer, x, *QKV))
            if family.parallel:
                other = self.branch.of(layer, norms.of_layer(layer, "mlp", hidden))
        branch = norms.of_layer(layer, "attention_output", branch)
        graph.scope = family.module(layer, "residual")
        if family.parallel:
            other = norms.of_layer(layer, "mlp_output", other)
            return graph.op("Add", hidden, graph.scaled(graph.op("Add", branch, other), scale))
        hidden = norms.of_layer(layer, "attention_residual", graph.op("Add", hidden, graph.scaled(branch, scale)))
        other = norms.of_layer(layer, "mlp_output", self.branch.of(layer, norms.of_layer(layer, "mlp", hidden)))
        graph.scope = family.module(layer, "residual")
        return norms.of_layer(layer, "mlp_residual", graph.op("Add", hidden, graph.scaled(other, scale)))

    def _attention(self, layer: int, qkv: str) -> str:
        """qkv: (batch, sequence, heads of q, k, v); returns (batch, sequence, hidden)."""
        graph, geometry, kind = self.graph, self.geometry, self.geometry.attention[layer]
        graph.scope = self.model.family.module(layer, "attention")
        q, k, v = self._heads(layer, qkv)
        keys = self.cache.extended(layer, "key", k, flipped=graph.opset < 23)
        y = self._attend(q, keys, self.cache.extended(layer, "value", v), self.positions.mask(kind.window))
        y = graph.op("Transpose", y, perm=[0, 2, 1, 3])
        y = graph.op("Reshape", y, graph.constant([0, 0, geometry.query_size]))
        return self.products.of(layer, y, "o")

    def _heads(self, layer: int, qkv: str) -> tuple[str, str, str]:
        """qkv: (batch, sequence, heads of q, k, v); each comes back as (batch, heads, sequence, head_dim), normed
        and rotated."""
        graph, geometry, norms, kind = self.graph, self.geometry, self.norms, self.geometry.attention[layer]
        heads, kv_heads = geometry.heads, geometry.kv_heads
        if "queries" in self.model.family.norms:  # of all heads at once, before they are apart
            sizes = graph.constant([geometry.query_size, geometry.kv_size, geometry.kv_size])
            q, k, v = graph.op("Split", qkv, sizes, outputs=3, axis=-1)
            q, k = norms.of_layer(layer, "queries", q), norms.of_layer(layer, "keys", k)
            q, k, v = self._apart(q, heads), self._apart(k, kv_heads), self._apart(v, kv_heads)
            return self.positions.rotate(q, kind), self.positions.rotate(k, kind), v
        qkv = self._apart(qkv, heads + 2 * kv_heads)
        if "query" in self.model.family.norms:
            q, k, v = graph.op("Split", qkv, graph.constant([heads, kv_heads, kv_heads]), outputs=3, axis=1)
            q, k = norms.of_layer(layer, "query", q), norms.of_layer(layer, "key", k)
            return self.positions.rotate(q, kind), self.positions.rotate(k, kind), v
        qk, v = graph.op("Split", qkv, graph.constant([heads + kv_heads, kv_heads]), outputs=2, axis=1)
        qk = self.positions.rotate(qk, kind)
        q, k = graph.op("Split", qk, graph.constant([heads, kv_heads]), outputs=2, axis=1)
        return q, k, v

    def _apart(self, x: str, heads: int) -> str:
        """x: (batch, sequence, heads * head_dim); returns (batch, heads, sequence, head_dim)."""
        x = self.graph.op("Reshape", x, self.graph.constant([0, 0, heads, self.geometry.head_dim]))
        return self.graph.op("Transpose", x, perm=[0, 2, 1, 3])

    def _attend(self, q: str, keys: str, values: str, mask: str) -> str:
        """q: (batch, heads, sequence, head_dim); returns the same shape. keys: flipped for basic operators."""
        graph, geometry = self.graph, self.geometry
        if graph.opset >= 23:
            cap: dict[str, Any] = {"softcap": geometry.attention_softcap} if geometry.attention_softcap else {}
            return graph.op("Attention", q, keys, values, mask, scale=geometry.score_scale, **cap)
        q = graph.op("Reshape", q, graph.constant([0, geometry.kv_heads, -1, geometry.head_dim]))
        q = graph.op("Mul", q, graph.number(geometry.score_scale))
        scores = graph.op("MatMul", q, keys)
        scores = graph.op("Add", self._capped(scores, geometry.attention_softcap), mask)
        y = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), values)
        return graph.op("Reshape", y, graph.constant([0, geometry.heads, -1, geometry.head_dim]))

    def _logits(self, hidden: str, head: FloatTable | Stored) -> str:
        graph, geometry, family = self.graph, self.geometry, self.model.family
        if family.final_norm:
            hidden = self.norms.at(
                family.final_norm, hidden, contents=of_outer_norm(self.model, family.final_norm, self.planned)
            )
        with graph.within(LOGITS_TO_KEEP):  # behind the norm: the residual stream may reach further than float16
            first = graph.op("Neg", graph.option(LOGITS_TO_KEEP, [0]))  # 0 of the last ones are all
            hidden = graph.op("Slice", hidden, first, graph.constant([2**63 - 1]), graph.constant([1]))
        if family.project_out:
            hidden = self._project(family.project_out, hidden, (geometry.embedded_size, geometry.hidden_size))
        graph.scope = family.lm_head
        if isinstance(head, FloatTable):
            logits = graph.op("MatMul", hidden, graph.op("Transpose", head.value, perm=[1, 0]))
        else:
            logits = self.head.linear(self.head.normalize(hidden), head)
        return graph.wide(self._capped(graph.scaled(logits, geometry.logits_scale), geometry.logits_softcap))

    def _project(self, name: str, x: str, shape: tuple[int, int]) -> str:
        """A linear that stays float. shape: (out, in)."""
        with self.graph.within(name):
            stored = Stored(name, shape, of_outer_linear(self.model, f"{name}.weight"))
            return FloatLinears(self.graph).linear(Input(x), stored)

    def _capped(self, x: str, softcap: float) -> str:
        """softcap * tanh(x / softcap); x itself where there is no cap (0)."""
        if not softcap:
            return x
        cap = self.graph.number(softcap)
        return self.graph.op("Mul", self.graph.op("Tanh", self.graph.op("Div", x, cap)), cap)
