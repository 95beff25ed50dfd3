"""What a worker speaks: a line of JSON in, a line of JSON out. Standard library and numpy alone: vLLM's environment has
no more.

    {"prompt": tokens, "batch": sequences, "steps": 0}    the seconds until the last logits of every prompt are there
    {"prompt": tokens, "batch": sequences, "steps": n}    the seconds of a step of all sequences, mean of n
    {"ids": file, "logits": file}                         the logits of sequences, as numpy files
    the answers: {"seconds": number, "peak": bytes}, {"peak": bytes}; {"failed": why}

peak: the most memory that the process has had, mapped files included. Sequences that took steps wait, so that they need
not be read again in the next round: each round goes on behind the one before it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy

Rows = list[list[int]]  # token ids of sequences of one length


class UnderWay(ABC):
    """Sequences under way. The logits behind their prompts are there."""

    @abstractmethod
    def step(self) -> None:
        """Append a token to each and compute its logits."""

    def close(self) -> None:  # noqa: B027
        """Forget them."""


class PeerEngine(ABC):
    """An engine. vocabulary: the number of its tokens."""

    vocabulary: int

    @abstractmethod
    def start(self, rows: Rows) -> UnderWay:
        """Sequences behind their prompts, one static batch."""

    def logits(self, ids: numpy.ndarray) -> numpy.ndarray:
        """The logits of sequences, float32 (batch, tokens, vocab). ids: int64 (batch, tokens).

        A position that an engine does not show is NaN.
        """
        raise NotImplementedError("it shows no logits")

    def prompt_seconds(self, rows: Rows) -> float:
        """The seconds until the last logits of every prompt are there."""
        begin = time.perf_counter()
        sequences = self.start(rows)
        seconds = time.perf_counter() - begin
        sequences.close()
        return seconds

    def step_seconds(self, rows: Rows, steps: int) -> float:
        """The seconds of a step of all sequences behind their prompts, mean of some."""
        if not hasattr(self, "_waiting"):
            self._waiting: dict[tuple[int, int], UnderWay] = {}
        key = len(rows), len(rows[0])
        if key not in self._waiting:
            self._waiting[key] = self.start(rows)
        begin = time.perf_counter()
        for _ in range(steps):
            self._waiting[key].step()
        return (time.perf_counter() - begin) / steps


def serve(make: Any) -> None:
    """Answer until standard input ends. make: opens the engine."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    engine = make()
    print(json.dumps({"peak": peak()}), file=out, flush=True)
    for line in sys.stdin:
        try:
            answer = _answer(engine, json.loads(line))
        except Exception as error:  # what it says is the answer
            answer = {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(answer | {"peak": peak()}), file=out, flush=True)


def _answer(engine: PeerEngine, asked: dict) -> dict:
    if "logits" in asked:
        numpy.save(asked["logits"], engine.logits(numpy.load(asked["ids"])))
        return {}
    rows = [
        [(token + 17 * row) % engine.vocabulary for token in range(asked["prompt"])] for row in range(asked["batch"])
    ]
    if asked["steps"]:
        return {"seconds": engine.step_seconds(rows, asked["steps"])}
    return {"seconds": engine.prompt_seconds(rows)}


def peak() -> int:
    """The most bytes of memory that this process has had."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
