"""The progress of a build, from the phases that TensorRT reports. Phases nest, and each has a number of steps.

share of a phase = (its steps done + shares of the open phases within it, at most one step) / its steps
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

WHOLE = 1000


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """Turn phases into calls of `progress(done, WHOLE)` whose `done` only grows. Several threads may report phases."""

    def __init__(self, progress: Callable[[int, int], None]) -> None:
        self._progress, self._lock = progress, Lock()
        self._open: dict[str, _Phase] = {}
        self._reached = 0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._open[name] = _Phase(parent, max(steps, 1))

    def step(self, name: str, index: int) -> None:
        """Note that a step of a phase is done. index: the step's number, from 0."""
        with self._lock:
            if name in self._open:
                self._open[name].done = index + 1
                self._report()

    def finish(self, name: str) -> None:
        with self._lock:
            self._open.pop(name, None)

    def _report(self) -> None:
        roots = [name for name, phase in self._open.items() if phase.parent not in self._open]
        reached = int(WHOLE * max((self._share(name) for name in roots), default=0))
        if reached > self._reached:
            self._reached = reached
            self._progress(reached, WHOLE)

    def _share(self, name: str) -> float:
        phase = self._open[name]
        inner = sum(self._share(child) for child, other in self._open.items() if other.parent == name)
        return min((phase.done + min(inner, 1.0)) / phase.steps, 1.0)
