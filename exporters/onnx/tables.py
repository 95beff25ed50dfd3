"""Tables of which rows are looked up: the embedding and learned positions.

float       x = Gather(table, ids)                                    (vocab, hidden)
INT8        x = Cast(Gather(table, ids)) * Gather(scale, ids)
shared      the same of the output head's matrix, (hidden, vocab), along axis 1; then / s, the scale of its input

The head's matrix stays as its product wants it. ONNX Runtime fuses the product as ever, and holds one copy: of a matrix
(vocab, hidden), it would make a transposed one beside it. One-byte columns of some hundred tokens cost a tenth of the
product with the head. TensorRT looks up no integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from exporters.onnx.contents import of_divisor, of_int8_table, of_table
from exporters.onnx.graph import OPSET, Graph
from exporters.onnx.linears import Stored
from smoothquant.embedding import Embedding
from smoothquant.model import Model


class Table(Protocol):
    """A stored table."""

    def rows(self, graph: Graph, ids: str) -> str:
        """Rows in the body's dtype, (batch, sequence, channels). ids: (batch, sequence) int64."""
        ...


@dataclass(frozen=True)
class FloatTable:
    """A table in float. value: its name in the graph."""

    value: str
    dtype: torch.dtype

    def rows(self, graph: Graph, ids: str) -> str:
        return graph.cast(graph.op("Gather", self.value, ids), self.dtype, graph.body)


@dataclass(frozen=True)
class Int8Table:
    """A table in INT8. integers, scale: their names in the graph, the integers' (vocab, channels) or, if transposed,
    (channels, vocab). divisor: the name of what its rows are divided by, if anything."""

    integers: str
    scale: str
    transposed: bool = False
    divisor: str | None = None

    def rows(self, graph: Graph, ids: str) -> str:
        if self.transposed:
            found = graph.op("Gather", self.integers, ids, axis=1)  # (channels, batch, sequence)
            found = graph.op("Transpose", found, perm=[1, 2, 0])
        else:
            found = graph.op("Gather", self.integers, ids)
        scale = graph.op("Unsqueeze", graph.op("Gather", self.scale, ids), graph.constant([-1]))
        wide = graph.op("Mul", graph.cast(found, torch.int8, torch.float32), scale)
        return graph.narrow(wide if self.divisor is None else graph.op("Div", wide, self.divisor))


def float_table(graph: Graph, model: Model, name: str, shape: tuple[int, int], multiplied: bool = False) -> FloatTable:
    """A table of the checkpoint. In 16 bits if the checkpoint has them, for a float32 body too: half the file, and the
    very same numbers. name: of its module. multiplied: it is also the output head's matrix, which stays in the body's
    dtype: ONNX Runtime casts nothing above 1 GB once for all, but again for every token."""
    name = f"{name}.weight"
    stored = model.info(name).dtype
    half = stored.itemsize == 2 and graph.opset >= OPSET  # TensorRT 8.6 has no bfloat16
    dtype = stored if half and not multiplied and graph.body == torch.float32 else graph.body
    return FloatTable(graph.weight(name, shape, dtype, of_table(model, name)), dtype)


def int8_table(graph: Graph, embedding: Embedding, shape: tuple[int, int], head: Stored | FloatTable) -> Int8Table:
    """The table of an embedding in INT8. shape: (vocab, channels). head: the matrix of the output head, which it reads
    where it shares it."""
    vocabulary, channels = shape
    name = embedding.model.family.embedding
    if embedding.head is None:
        own = Stored(name, shape, of_int8_table(embedding.int8_rows))
        integers = own.tensor(graph, "weight_int8", shape, torch.int8)
        return Int8Table(integers, own.tensor(graph, "weight_scale", (vocabulary,), torch.float32))
    assert isinstance(head, Stored)  # a head in INT8
    integers, scale = head.int8_weight(graph)
    if embedding.divisor is None:
        return Int8Table(integers, scale, transposed=True)
    divisor = graph.weight(f"{name}.divisor", (channels,), torch.float32, of_divisor(embedding.divisor))
    return Int8Table(integers, scale, transposed=True, divisor=divisor)
