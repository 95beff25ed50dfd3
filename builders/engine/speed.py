"""How quick engines are beside each other: prefill of a prompt, and one-token steps behind it.

Engines take turns and the median counts, because machines are never quiet: what is worth comparing are ratios of one
run, not seconds of two.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from builders.engine.generation import GeneratingEngine


@dataclass(frozen=True)
class Speed:
    """Seconds for a prompt, and for one more token behind it."""

    prefill: float
    decode: float

    def over(self, other: Speed) -> tuple[float, float]:
        """How many times as quick the other one is: (prefill, decode)."""
        return self.prefill / other.prefill, self.decode / other.decode


def measure(
    engines: Mapping[str, GeneratingEngine], *, prompt: int = 256, steps: int = 8, rounds: int = 7
) -> dict[str, Speed]:
    """Median seconds of every engine, by label. prompt: tokens of prefill, and in the cache when decoding starts;
    steps: tokens decoded in a round; rounds: how often all engines take their turn, after one that warms them up."""
    prefill: dict[str, list[float]] = {label: [] for label in engines}
    decode: dict[str, list[float]] = {label: [] for label in engines}
    for turn in range(rounds + 1):
        for label, engine in engines.items():
            ids = [token % engine.manifest.facts.vocab_size for token in range(prompt)]
            begin = time.perf_counter()
            decoding = engine.start(ids)
            ready = time.perf_counter()
            for _ in range(steps):
                decoding.step(1)
            end = time.perf_counter()
            if turn:
                prefill[label].append(ready - begin)
                decode[label].append((end - ready) / steps)
    return {label: Speed(median(prefill[label]), median(decode[label])) for label in engines}
