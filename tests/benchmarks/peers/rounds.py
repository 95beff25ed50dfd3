"""Who is measured when: each engine by itself first, then all in turn.

A cell that fails is marked, and the others are measured on: a process that died fails in each of its cells. Numbers
from before stay.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.benchmarks.peers.forms import PeerForm
from tests.benchmarks.peers.process import PeerProcess

STEPS = 8
CASES = {"prefill 256": (256, 0), "prefill 1024": (1024, 0), "decode behind 512": (512, STEPS)}
BATCHES = (1, 4, 16)
CELLS = {
    f"{case}, batch {batch}": (prompt, batch, steps) for batch in BATCHES for case, (prompt, steps) in CASES.items()
}


@dataclass
class Rounds:
    """The measurement of engines by their folders.

    threads: of each engine. limit: seconds of a cell that is measured in every round; longest: that is measured at all.
    place: where processes write. failed: why an engine has no folder, does not open or has no number. times: seconds by
    cell and engine, the first alone and one of each round. memory: peaks in bytes by engine; an engine that failed in
    its first pass has none. failures: why an engine stopped in a cell, by cell and engine.
    """

    folders: Mapping[PeerForm, Path]
    threads: int
    limit: float
    longest: float
    place: Path
    failed: dict[str, str]
    times: dict[str, dict[str, list[float]]] = field(default_factory=lambda: {cell: {} for cell in CELLS})
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    failures: dict[str, dict[str, str]] = field(default_factory=lambda: {cell: {} for cell in CELLS})

    def alone(self) -> None:
        """One number of each cell, of each engine by itself, and its peaks of memory."""
        for peer in self.folders:
            with ExitStack() as stack:
                if process := self._opened(peer, stack):
                    self._first(peer, process)
            found = {cell: by[peer.name][0] for cell, by in self.times.items() if peer.name in by}
            print(f"alone: {peer.name}: {found}, {self.memory.get(peer.name)}", file=sys.stderr)
            if not found and peer.name not in self.failed:
                self.failed[peer.name] = next(by[peer.name] for by in self.failures.values() if peer.name in by)

    def together(self, rounds: int) -> Iterable[int]:
        """Measure the short cells in turn, all engines open; yield the number of each round behind it."""
        with ExitStack() as stack:
            opened = {peer: self._opened(peer, stack) for peer in self._measured()}
            processes = {peer: process for peer, process in opened.items() if process}
            self._take(processes, keep=False)
            for number in range(rounds):
                self._take(processes)
                yield number + 1

    def fresh(self, rounds: int) -> Iterable[int]:
        """The same, with one engine open at a time."""
        for number in range(rounds):
            for peer in self._measured():
                with ExitStack() as stack:
                    if process := self._opened(peer, stack):
                        self._take({peer: process})
            yield number + 1

    def _measured(self) -> list[PeerForm]:
        return [peer for peer in self.folders if any(peer.name in by for by in self.times.values())]

    def _opened(self, peer: PeerForm, stack: ExitStack) -> PeerProcess | None:
        try:
            return stack.enter_context(PeerProcess(peer, self.folders[peer], self.threads, self.place / "log"))
        except RuntimeError as error:
            self.failed[peer.name] = str(error)
            print(f"does not open: {error}", file=sys.stderr)
            return None

    def _first(self, peer: PeerForm, process: PeerProcess) -> None:
        self._seconds(process, peer, next(iter(CELLS)), 32, 1, 0)  # opens what opens late
        peaks = {"batch 1": process.peak}
        for cell, (prompt, batch, steps) in CELLS.items():
            one = self.times[cell.replace(f"batch {batch}", "batch 1")].get(peer.name, [0.0])[0]
            reading = self.times["prefill 1024, batch 1"].get(peer.name, [0.0])[0] * batch * (prompt / 1024)
            if batch > 1 and max(one, reading) > self.longest:
                continue
            spent = self._seconds(process, peer, cell, prompt, batch, steps)
            if spent is not None and (batch == 1 or spent > 1.5 * one * batch):  # something was made ready on the way
                spent = self._seconds(process, peer, cell, prompt, batch, steps)
            if spent is not None:
                self.times[cell][peer.name] = [spent]
            if batch == 1:
                peaks["batch 1"] = process.peak
        if not any(peer.name in by for by in self.failures.values()):
            self.memory[peer.name] = peaks | {"all": process.peak}

    def _take(self, processes: Mapping[PeerForm, PeerProcess], keep: bool = True) -> None:
        """Measure the short cells once more, engines in turn. What a cell costs tells its first number."""
        for cell, (prompt, batch, steps) in CELLS.items():
            for peer, process in processes.items():
                before = self.times[cell].get(peer.name)
                if before is None or self._cost(peer, cell) > self.limit:
                    continue
                spent = self._seconds(process, peer, cell, prompt, batch, steps)
                if keep and spent is not None:
                    before.append(spent)

    def _cost(self, peer: PeerForm, cell: str) -> float:
        """The seconds that a cell of an engine takes; llama.cpp reads the prompts of its steps each time."""
        prompt, batch, steps = CELLS[cell]
        if peer.kind == "llama.cpp" and steps:
            return self.times["prefill 256, batch 1"].get(peer.name, [0.0])[0] * batch * prompt / 256
        return self.times[cell][peer.name][0] * (steps or 1)

    def _seconds(
        self, process: PeerProcess, peer: PeerForm, cell: str, prompt: int, batch: int, steps: int
    ) -> float | None:
        """None if it fails, now or before."""
        if peer.name in self.failures[cell]:
            return None
        try:
            return process.seconds(prompt, batch, steps)
        except RuntimeError as error:
            self.failures[cell][peer.name] = str(error)
            print(f"failed: {cell}: {error}", file=sys.stderr)
            return None
