"""Shapes that an optimization profile names for the inputs of a decoder: by what each dimension is called, else by its
place.

batch       sequences at once
sequence    tokens of a run, and any other dimension that is not known
past        tokens in the cache before it
total       past + sequence: columns of the attention mask

A profile names three points: least, usual (kernels are chosen for it) and most. TensorRT checks the graph at each, so
total is past + sequence at all three.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from smoothquant.artifacts.ports import ATTENTION_MASK, INPUT_IDS, PAST, POSITION_IDS

Shape = tuple[int, ...]
Range = tuple[int, int, int]  # least, usual, most
Dimension = int | str  # a number, a symbol, or "" for one without a name

SYMBOLS = {"batch": "batch", "total": r"total|\+|kv_len", "past": "past|cache"}  # the first that is found counts
PLAIN, MASK, CACHE = ("batch", "sequence"), ("batch", "total"), ("batch", "heads", "past", "head_dim")


@dataclass(frozen=True)
class Profile:
    """The sizes that one optimization profile takes."""

    name: str
    batch: Range
    sequence: Range
    past: Range

    @property
    def total(self) -> Range:
        (a, b, c), (d, e, f) = self.past, self.sequence
        return a + d, b + e, c + f

    def shapes(self, name: str, dimensions: Sequence[Dimension]) -> tuple[Shape, Shape, Shape]:
        """Least, usual and most of an input. Sizes that are numbers stay as they are."""
        ranges = [
            (size, size, size) if isinstance(size, int) else self._range(name, place, size)
            for place, size in enumerate(dimensions)
        ]
        least, usual, most = (tuple(sizes[point] for sizes in ranges) for point in range(3))
        return least, usual, most

    def _range(self, name: str, place: int, symbol: str) -> Range:
        places = MASK if name == ATTENTION_MASK else CACHE if name.startswith("past") else PLAIN
        called = symbol.lower() or (places[place] if place < len(places) else "sequence")
        known = (size for size, pattern in SYMBOLS.items() if re.search(pattern, called))
        return getattr(self, next(known, "sequence"))


def single_profile(batch: int, tokens: int, past: int) -> Profile:
    """One profile for prefill and decode, with the most of each. Usual: one token behind half a cache."""
    return Profile("only", (1, 1, batch), (1, 1, tokens), (0, max(1, past // 2), past))


def is_decoder_input(name: str, rank: int) -> bool:
    """Whether it is an input of our decoder graphs, whose dimensions are known by their places."""
    return rank == 4 if name.startswith(PAST) else name in (INPUT_IDS, ATTENTION_MASK, POSITION_IDS)
