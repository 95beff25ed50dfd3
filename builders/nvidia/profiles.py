"""The shapes of a decoder's inputs in an optimization profile.

A dimension's name tells its size, or its place if it has no name:

batch       the sequences of a run
sequence    the tokens of a run; any unknown dimension has this size, too
past        the tokens in the cache before the run
total       past + sequence: the columns of the attention mask

A profile names three points: least, usual (TensorRT chooses kernels for it) and most. TensorRT checks the graph at
each, so total is past + sequence at all three.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from smoothquant.artifacts.ports import ATTENTION_MASK, INPUT_IDS, PAST, POSITION_IDS, WRITE_INDICES

Shape = tuple[int, ...]
Range = tuple[int, int, int]  # least, usual, most
Dimension = int | str  # a number, a symbol, or "" without a name

SYMBOLS = {"batch": "batch", "total": r"total|\+|kv_len", "past": "past|cache"}  # the first pattern found counts
PLAIN, MASK, CACHE = ("batch", "sequence"), ("batch", "total"), ("batch", "heads", "past", "head_dim")


@dataclass(frozen=True)
class Profile:
    """One optimization profile: least, usual and most of each size."""

    name: str
    batch: Range
    sequence: Range
    past: Range

    @property
    def total(self) -> Range:
        (a, b, c), (d, e, f) = self.past, self.sequence
        return a + d, b + e, c + f

    def shapes(self, name: str, dimensions: Sequence[Dimension]) -> tuple[Shape, Shape, Shape]:
        """The least, usual and most shape of an input. name: the input. dimensions: its dimensions; numbers stay."""
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
    """One profile for prefill and decode, for up to so many sequences, tokens of a run, and tokens in the cache.

    Its usual point is one token behind half a cache.
    """
    return Profile("only", (1, 1, batch), (1, 1, tokens), (0, max(1, past // 2), past))


def is_decoder_input(name: str, rank: int) -> bool:
    """Whether an input of this name and rank is one of our decoder graphs', whose dimensions have known places."""
    return rank == 4 if name.startswith(PAST) else name in (INPUT_IDS, ATTENTION_MASK, POSITION_IDS, WRITE_INDICES)
