"""Sequences side by side in one buffer: a step of all of them is one run of the graph.

    buffers    keys and values of every layer, (sequences, kv_heads, tokens, channels); the graph writes into them
    rows       a step runs the first n rows, so sequences that take part move there if they are elsewhere

Two forms of graphs write so. Of grouped attention, a buffer grows as its longest sequence does, to twice its length;
what is computed for a sequence is the same alone and in any company (`grouped`), so its tokens are, too. Of a cache in
place (`exporters.onnx.cache`), buffers have the capacity of the graph, and are read whole in every step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy

from builders.engine.slots import PieceDecoding, Slots, free_slot
from builders.onnxruntime.session import CACHES, capacity_of
from smoothquant.artifacts.ports import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    PAST,
    POSITION_IDS,
    PRESENT,
    WRITE_INDICES,
)
from smoothquant.errors import UserError
from smoothquant.machine import subnormals_as_zero
from smoothquant.packages import require

FIRST = 256  # tokens of a new buffer


class BufferSlots(Slots):
    """Room for sequences. session: of a graph that writes into its buffers."""

    together = True

    def __init__(self, session: Any, count: int, length: int) -> None:
        super().__init__(count, length)
        self._value = require("onnxruntime").OrtValue.ortvalue_from_numpy
        self._buffers = {}
        for value in session.get_inputs():
            if value.name.startswith(PAST):
                shape = (count, value.shape[1], capacity_of(value) or min(FIRST, length), value.shape[3])
                self._buffers[value.name.removeprefix(PAST)] = numpy.zeros(shape, CACHES[value.type])
        self._rows: dict[int, int] = {}  # slot -> row
        self._tokens = [0] * count  # of each row
        self._step, self._piece = _Run(session), _Run(session)

    @abstractmethod
    def _feed(self, ids: numpy.ndarray, before: numpy.ndarray) -> dict[str, numpy.ndarray]:
        """The inputs of a run beside its buffers. ids: (rows, tokens). before: (rows,), the tokens before these."""

    def open(self) -> int:
        slot, row = free_slot(self._rows, self.count), free_slot(self._rows.values(), self.count)
        self._rows[slot] = row
        self._tokens[row] = 0
        return slot

    def append(self, slot: int, tokens: Sequence[int], keep: int = 1) -> numpy.ndarray:
        row = self._rows[slot]
        before = self._tokens[row]
        self._reserve(before + len(tokens))
        feed = self._feed(numpy.array([tokens], dtype=numpy.int64), numpy.array([before], dtype=numpy.int64))
        [logits] = self._piece(feed, self._value(numpy.array([keep], dtype=numpy.int64)), self._buffers, row, row + 1)
        self._tokens[row] += len(tokens)
        return logits

    def step(self, tokens: Mapping[int, int]) -> Mapping[int, numpy.ndarray]:
        self._gather(tokens)
        slots = sorted(tokens, key=self._rows.__getitem__)
        count, before = len(slots), numpy.array(self._tokens[: len(slots)], dtype=numpy.int64)
        self._reserve(int(before.max()) + 1)
        feed = self._feed(numpy.array([[tokens[slot]] for slot in slots], dtype=numpy.int64), before)
        logits = self._step(feed, self._value(numpy.ones(1, dtype=numpy.int64)), self._buffers, 0, count)
        for row in range(count):
            self._tokens[row] += 1
        return {slot: logits[row, -1] for row, slot in enumerate(slots)}

    def fork(self, slot: int, tokens: int) -> int:
        new = self.open()
        self._copy(self._rows[slot], self._rows[new], tokens)
        return new

    def cut(self, slot: int, tokens: int) -> bool:
        self._tokens[self._rows[slot]] = tokens
        return True

    def close(self, slot: int) -> None:
        del self._rows[slot]

    def _reserve(self, tokens: int) -> None:
        """Make the buffers long enough for a sequence of so many tokens. Raises UserError if that is too long."""
        if tokens > self.length:
            raise UserError(f"a sequence of {tokens} tokens", expected=f"at most {self.length}, its room in the cache")
        size = next(iter(self._buffers.values())).shape[2]
        if tokens <= size:
            return
        longer = min(self.length, max(tokens, 2 * size))
        for name, buffer in self._buffers.items():
            self._buffers[name] = numpy.empty((*buffer.shape[:2], longer, buffer.shape[3]), buffer.dtype)
            for row in self._rows.values():
                self._buffers[name][row, :, : self._tokens[row]] = buffer[row, :, : self._tokens[row]]

    def _gather(self, slots: Iterable[int]) -> None:
        """Bring the sequences that take part in a step to the first rows."""
        wanted = set(slots)
        outside = [slot for slot in wanted if self._rows[slot] >= len(wanted)]
        held = {row: slot for slot, row in self._rows.items()}
        for row in range(len(wanted)):
            other = held.get(row)
            if other in wanted:
                continue
            slot = outside.pop()
            source = self._rows[slot]
            self._swap(source, row, empty=other is None)
            self._rows[slot] = row
            if other is not None:
                self._rows[other] = source

    def _copy(self, source: int, target: int, tokens: int) -> None:
        for buffer in self._buffers.values():
            buffer[target, :, :tokens] = buffer[source, :, :tokens]
        self._tokens[target] = tokens

    def _swap(self, source: int, target: int, *, empty: bool) -> None:
        """Exchange two rows. empty: nothing of the target's is needed."""
        if empty:
            return self._copy(source, target, self._tokens[source])
        longest = max(self._tokens[source], self._tokens[target])
        for buffer in self._buffers.values():
            kept = buffer[target, :, :longest].copy()
            buffer[target, :, :longest] = buffer[source, :, :longest]
            buffer[source, :, :longest] = kept
        self._tokens[source], self._tokens[target] = self._tokens[target], self._tokens[source]
        return None


class GroupedSlots(BufferSlots):
    """Room for sequences of a graph with grouped attention."""

    def _feed(self, ids: numpy.ndarray, before: numpy.ndarray) -> dict[str, numpy.ndarray]:
        ends = before[:, None] + ids.shape[1]
        return {
            INPUT_IDS: ids,
            POSITION_IDS: before[:, None] + numpy.arange(ids.shape[1], dtype=numpy.int64),
            ATTENTION_MASK: (numpy.arange(ends.max()) < ends).astype(numpy.int64),
        }


class InPlaceSlots(BufferSlots):
    """Room for sequences of a graph whose cache is written in place."""

    def _feed(self, ids: numpy.ndarray, before: numpy.ndarray) -> dict[str, numpy.ndarray]:
        return {INPUT_IDS: ids, WRITE_INDICES: before}


class BufferDecoding(PieceDecoding):
    """One sequence under way, in a buffer of its own. slots: room for this one."""

    def __init__(self, slots: BufferSlots) -> None:
        self._slots = slots
        self._slots.open()

    def append(self, tokens: Sequence[int], keep: int = 1) -> numpy.ndarray:
        """Append tokens. Returns logits, float32 (kept tokens, vocab), of the last `keep` of them; of all for 0."""
        logits = self._slots.append(0, tokens, keep)
        self.logits = logits[-1]
        return logits


class _Run:
    """Runs of a session on rows of the buffers, which stay bound from one run to the next."""

    def __init__(self, session: Any) -> None:
        self._session, self._binding = session, session.io_binding()
        self._bound: tuple = ()
        self._binding.bind_output(LOGITS)  # the first of the outputs

    def __call__(
        self, feed: Mapping[str, numpy.ndarray], keep: Any, buffers: Mapping[str, numpy.ndarray], begin: int, end: int
    ) -> numpy.ndarray:
        """Logits, float32 (rows, kept tokens, vocab). begin, end: the rows."""
        binding = self._binding
        for name, value in feed.items():
            binding.bind_cpu_input(name, value)
        binding.bind_ortvalue_input(LOGITS_TO_KEEP, keep)
        place = (begin, end, *(buffer.ctypes.data for buffer in buffers.values()))
        if place != self._bound:
            for name, buffer in buffers.items():
                rows = buffer[begin:end]
                where = ("cpu", 0, buffer.dtype.type, rows.shape, rows.ctypes.data)
                binding.bind_input(PAST + name, *where)
                binding.bind_output(PRESENT + name, *where)
            self._bound = place
        binding.bind_output(LOGITS)  # anew: its shape may be another one now
        with subnormals_as_zero():
            self._session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()
