"""The embedding in INT8: one scale for each row, that is for each token of the vocabulary.

    row  =  q * scale          with a table of its own: scale = max |row| / 127, q rounded to nearest
    row  =  q * scale / s      tied to an output head in INT8: q and scale are the head's, so that one table serves
                               both; its columns hold s, the scale of the head's input, if it has one

This is float32. What follows it (a multiplier, a projection, positions, a norm) is as in float: `decoder.embed`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from smoothquant import decoder
from smoothquant.head import UNPLANNED, PlannedHead
from smoothquant.model import Model
from smoothquant.quantization import quantize_weight
from smoothquant.scheme import Scheme


@dataclass(frozen=True, eq=False)
class Embedding:
    """The embedding of a model, in float or in INT8. head: the output head whose table in INT8 it shares; None for a
    table of its own."""

    model: Model
    quantized: bool = False
    head: PlannedHead | None = None

    @property
    def table(self) -> str:
        """The name of the stored table, (vocab, embedded size)."""
        return f"{self.model.family.embedding}.weight"

    @property
    def divisor(self) -> Tensor | None:
        """What its rows are divided by, float32 (embedded size,); None for nothing."""
        return self.head.smoothing_scale if self.head else None

    def int8_rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The table in INT8, some rows at a time: int8 (rows, embedded size), and its scale, float32 (rows,)."""
        if self.head:
            yield from self.head.int8_rows(self.model)
            return
        for rows in self.model.rows(self.table):
            yield quantize_weight(rows)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of tokens, (..., embedded size), float32 or as they are stored. ids: int64 (...)."""
        if not self.quantized:
            return self.model.lookup(self.table, ids)
        unique, where = torch.unique(ids, return_inverse=True)
        if self.head:
            integers, scale = self.head.int8_at(self.model, unique)
        else:
            integers, scale = quantize_weight(self.model.lookup(self.table, unique))
        wide = integers.float() * scale[:, None]
        return (wide if self.divisor is None else wide / self.divisor)[where]

    def embed(self, ids: Tensor, dtype: torch.dtype, positions: Tensor | None = None) -> Tensor:
        """The input of the first layer: `decoder.embed` with these rows."""
        return decoder.embed(self.model, ids, dtype, positions, self.rows)


def embedding_of(model: Model, scheme: Scheme, planned: PlannedHead = UNPLANNED) -> Embedding:
    """The embedding of a scheme. planned: the output head of the plan, which counts where the scheme's is in INT8."""
    quantized = scheme.embedding.quantized
    shared = quantized and scheme.head.quantized and model.geometry.tied_embeddings
    return Embedding(model, quantized, planned if shared else None)
