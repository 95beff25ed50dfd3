"""Sequences side by side in one engine: each has a slot, joins and leaves between steps, and may begin as a copy.

A server's scheduler drives an engine through `Slots`. Whether the engine computes the steps of all sequences as one
batch is its own affair; what a sequence gets does not depend on it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy

from builders.engine.generation import Decoding, GeneratingEngine, pieces


class Slots(ABC):
    """Room for `count` sequences of up to `length` tokens each. A slot is a number; the engine chooses it.

    together: whether a step of all sequences is one run of the engine. multiple: of how many tokens the beginning of a
    prompt is, if reading on behind a copy of it gives the same as reading all, bit by bit.
    """

    together = False
    multiple = 1

    def __init__(self, count: int, length: int) -> None:
        self.count, self.length = count, length

    @abstractmethod
    def open(self) -> int:
        """A free slot, with an empty sequence from now on. Raises IndexError if there is none."""

    @abstractmethod
    def append(self, slot: int, tokens: Sequence[int], keep: int = 1) -> numpy.ndarray:
        """Append tokens to one sequence. Returns logits, float32 (kept tokens, vocab).

        tokens: a piece of a prompt, at least one token. keep: the number of last tokens whose logits are computed; 0
        for all.
        """

    @abstractmethod
    def step(self, tokens: Mapping[int, int]) -> Mapping[int, numpy.ndarray]:
        """Append a token to each of several sequences. Returns logits, float32 (vocab,), by slot."""

    @abstractmethod
    def fork(self, slot: int, tokens: int) -> int | None:
        """A free slot, with a copy of a sequence's first tokens; None if they are not all there any more.

        tokens: their number, at least one and at most those of the sequence. Raises IndexError if no slot is free.
        """

    @abstractmethod
    def cut(self, slot: int, tokens: int) -> bool:
        """Forget all but a sequence's first tokens. Returns whether that was possible. tokens: as for `fork`."""

    @abstractmethod
    def close(self, slot: int) -> None:
        """Forget a sequence; its slot is free."""


class PieceDecoding(Decoding):
    """A sequence under way that takes several tokens at a time. It begins empty."""

    @abstractmethod
    def append(self, tokens: Sequence[int], keep: int = 1) -> numpy.ndarray:
        """Append tokens. Returns logits, float32 (kept tokens, vocab), of the last `keep` of them; of all for 0."""

    def step(self, token: int) -> None:
        """Append a token to the sequence and compute its logits."""
        self.append([token])


class SeparateDecoding(PieceDecoding):
    """A sequence under way whose cache is its own."""

    @abstractmethod
    def beginning(self, tokens: int) -> SeparateDecoding | None:
        """Another sequence, of the first tokens of this one; None if a window has made it forget some that are needed.

        tokens: their number, at least one.
        """


class ServableEngine(GeneratingEngine):
    """An engine on a processor whose sequences run side by side."""

    @abstractmethod
    def empty(self) -> PieceDecoding:
        """A sequence without tokens."""

    @abstractmethod
    def slots(self, count: int, length: int) -> Slots:
        """Room for sequences. count: their number. length: the largest number of tokens of each."""

    def cache_bytes(self, count: int, length: int) -> int:
        """The most bytes that keys and values of sequences can take. count, length: as for `slots`."""
        facts, origin = self.manifest.facts, self.manifest.origin
        size = 1 if origin.scheme.kv_cache.quantized else 2 if origin.onnx and origin.onnx.body != "fp32" else 4
        return 2 * facts.layers * facts.kv_heads * facts.head_dim * size * count * self.kept_tokens(length)

    def kept_tokens(self, length: int) -> int:
        """The most tokens in the cache of a sequence of so many: windows forget (`tokens_to_keep`)."""
        window = self.manifest.facts.cache_window
        return min(length, 2 * window) if window else length

    def start(self, prompt: Sequence[int]) -> PieceDecoding:
        """A sequence after its prompt, which is read in pieces. prompt: token ids."""
        decoding = self.empty()
        for piece in pieces(prompt):
            decoding.append(piece)
        return decoding


class SeparateSlots(Slots):
    """Sequences that are computed one after another, each by a decoding of its own.

    start: makes an empty decoding. multiple: as above.
    """

    def __init__(self, count: int, length: int, start: Callable[[], SeparateDecoding], multiple: int = 1) -> None:
        super().__init__(count, length)
        self._start, self.multiple = start, multiple
        self._decodings: dict[int, SeparateDecoding] = {}

    def open(self) -> int:
        return self._put(self._start())

    def fork(self, slot: int, tokens: int) -> int | None:
        copy = self._decodings[slot].beginning(tokens)
        return None if copy is None else self._put(copy)

    def cut(self, slot: int, tokens: int) -> bool:
        shorter = self._decodings[slot].beginning(tokens)
        if shorter is not None:
            self._decodings[slot] = shorter
        return shorter is not None

    def _put(self, decoding: SeparateDecoding) -> int:
        slot = free_slot(self._decodings, self.count)
        self._decodings[slot] = decoding
        return slot

    def append(self, slot: int, tokens: Sequence[int], keep: int = 1) -> numpy.ndarray:
        return self._decodings[slot].append(tokens, keep)

    def step(self, tokens: Mapping[int, int]) -> Mapping[int, numpy.ndarray]:
        return {slot: self._decodings[slot].append([token])[-1] for slot, token in tokens.items()}

    def close(self, slot: int) -> None:
        self._decodings.pop(slot).close()


def free_slot(taken: Collection[int], count: int) -> int:
    """The first of `count` slots that is not taken. Raises IndexError if all are."""
    for slot in range(count):
        if slot not in taken:
            return slot
    raise IndexError(f"all {count} slots are taken")
