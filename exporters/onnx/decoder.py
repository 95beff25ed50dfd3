"""The decoder graph, written from the family record.

inputs   input_ids, position_ids (batch, sequence) int64; attention_mask (batch, total) int64, 1 = token, 0 = padding;
         past_key_values.N.key/value (batch, kv_heads, past, head_dim), past may be 0; total = past + sequence (`cache`)
outputs  logits (batch, sequence, vocab) float32; present.N.key/value (batch, kv_heads, total, head_dim)

In place, write_indices (batch,) int64 stands for attention_mask and position_ids, and past and present have the shape
(batch, kv_heads, capacity, head_dim) (`places`).

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
from exporters.onnx.places import Grown, InPlace
from exporters.onnx.positions import Positions
from exporters.onnx.products import QKV, Products, quantized_names
from exporters.onnx.tables import FloatTable, Table, float_table, int8_table
from smoothquant.artifacts.ports import INPUT_IDS, LOGITS, LOGITS_TO_KEEP
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

    @property
    def _attention_operator(self) -> bool:
        """Whether attention is one operator. Of a cache in place, TensorRT copies keys and values for basic operators
        before each product, and for this one it does not (TensorRT-RTX 1.7, a token at a time); but it has none for
        float32, nor with a softcap."""
        if self.form.capacity is None:
            return self.form.opset >= 23
        return self.form.dtype.itemsize == 2 and not self.geometry.attention_softcap

    def _build(self) -> None:
        graph, geometry, family = self.graph, self.geometry, self.model.family
        ids = graph.input(INPUT_IDS, torch.int64, ("batch", "sequence"))
        capacity = self.form.capacity
        places = Grown(graph, ids) if capacity is None else InPlace(graph, ids, capacity)
        layers = [family.layer.format(layer) for layer in range(geometry.layers)]
        self.cache = CacheNodes(graph, geometry, self.form.cache_dtype, layers, capacity)
        self.positions = Positions(graph, self.model, places)
        head = self._head_matrix()
        hidden = self._embed(self._table(head), ids, places.position_ids)
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
        keys = self.cache.extended(layer, "key", k, flipped=not self._attention_operator)
        y = self._attend(q, keys, self.cache.extended(layer, "value", v), kind.window)
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

    def _attend(self, q: str, keys: str, values: str, window: int | None) -> str:
        """q: (batch, heads, sequence, head_dim); returns the same shape. keys: flipped for basic operators."""
        graph, geometry = self.graph, self.geometry
        if self._attention_operator:
            cap: dict[str, Any] = {"softcap": geometry.attention_softcap} if geometry.attention_softcap else {}
            mask = self.positions.mask(window)
            return graph.op("Attention", q, keys, values, mask, scale=geometry.score_scale, **cap)
        q = graph.op("Reshape", q, graph.constant([0, geometry.kv_heads, -1, geometry.head_dim]))
        q = graph.op("Mul", q, graph.number(geometry.score_scale))
        weights = self._weights(graph.op("MatMul", q, keys), window)
        y = graph.op("MatMul", weights, values)
        return graph.op("Reshape", y, graph.constant([0, geometry.heads, -1, geometry.head_dim]))

    def _weights(self, scores: str, window: int | None) -> str:
        """The softmax of scores, (batch, kv_heads, group * sequence, total), behind the mask.

        TensorRT fuses attention in half precision, and there alone, if the scores keep their shape: then whether a key
        is seen is repeated for each row. Otherwise heads come apart for the mask, which is one for all of them.
        """
        graph, geometry, positions = self.graph, self.geometry, self.positions
        grouped = geometry.heads != geometry.kv_heads
        if grouped and graph.body.itemsize == 2 and self.model.family.alibi is None:
            scores = self._capped(scores, geometry.attention_softcap)
            return graph.op("Softmax", graph.op("Where", positions.seen(window), scores, positions.hidden), axis=-1)
        if grouped:
            scores = graph.op("Reshape", scores, graph.constant([0, geometry.heads, -1, 0]))
        scores = self._capped(scores, geometry.attention_softcap)
        weights = graph.op("Softmax", graph.op("Add", scores, positions.mask(window)), axis=-1)
        return graph.op("Reshape", weights, graph.constant([0, geometry.kv_heads, -1, 0])) if grouped else weights

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
