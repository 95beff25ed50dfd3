"""Ranges of dynamic shapes, for the inputs of a decoder: by what each dimension is called, or by its place.

batch                   1 ... batch
sequence, and others    1 ... tokens
past                    0 ... past
total = past + sequence 1 ... past + tokens
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Shape = tuple[int, ...]
Dimension = int | str  # a number, a symbol, or "" for one without a name
BATCH, TOTAL, PAST = re.compile("batch"), re.compile(r"total|\+|kv_len"), re.compile("past|cache")
PLACES = {"attention_mask": ("batch", "total"), "past": ("batch", "heads", "past", "head_dim")}  # where names lack


@dataclass(frozen=True)
class DecoderProfile:
    """Most of each at run time. The least is one token of one sequence behind an empty cache."""

    batch: int = 4
    tokens: int = 256
    past: int = 512

    def shapes(self, name: str, dimensions: tuple[Dimension, ...]) -> tuple[Shape, Shape, Shape]:
        """Least, usual and most of an input. Usual: one token behind half a cache."""
        symbols = [self._symbol(name, place, value) for place, value in enumerate(dimensions)]

        def shape(batch: int, tokens: int, past: int) -> Shape:
            sizes = {"batch": batch, "tokens": tokens, "past": past, "total": past + tokens}
            return tuple(value if isinstance(value, int) else sizes[value] for value in symbols)

        return shape(1, 1, 0), shape(1, 1, max(1, self.past // 2)), shape(self.batch, self.tokens, self.past)

    def _symbol(self, name: str, place: int, value: Dimension) -> int | str:
        if isinstance(value, int):
            return value
        places = next((places for key, places in PLACES.items() if name.startswith(key)), ("batch", "tokens"))
        symbol = value.lower() or (places[place] if place < len(places) else "tokens")
        for pattern, size in ((BATCH, "batch"), (TOTAL, "total"), (PAST, "past")):
            if pattern.search(symbol):
                return size
        return "tokens"
