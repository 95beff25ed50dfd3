"""Compare the speed of engines: prefill of a prompt, and steps of one token after it.

Engines take turns and the median counts, because machines are never quiet. Compare the ratios of one run, not the
seconds of two runs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from builders.engine.generation import GeneratingEngine


@dataclass(frozen=True)
class Speed:
    """The speed of one engine. prefill: the seconds of a prompt. decode: the seconds of one more token after it."""

    prefill: float
    decode: float

    def over(self, other: Speed) -> tuple[float, float]:
        """The factors by which the other one is quicker: (prefill, decode)."""
        return self.prefill / other.prefill, self.decode / other.decode


def measure(
    engines: Mapping[str, GeneratingEngine], *, prompt: int = 256, steps: int = 8, rounds: int = 7
) -> dict[str, Speed]:
    """The median seconds of every engine, by label.

    prompt: the tokens of the prefill, which fill the cache before decoding. steps: the tokens decoded in a round.
    rounds: the number of rounds in which every engine takes a turn, after one round of warming up.
    """
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
