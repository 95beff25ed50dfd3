"""Where tokens stand, and what each of them sees: what the two forms of a cache derive from their inputs.

grown      attention_mask (batch, total) marks tokens, position_ids (batch, sequence) numbers them; a sequence may have
           padding on its left. Token i of a run is column total - sequence + i
in place   write_indices (batch,): a sequence's tokens before the run. Token i of a run has the position, and the
           column, write_indices + i; what lies behind it in the buffer is not seen. No padding on the left, no masks
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import torch

from exporters.onnx.graph import Graph
from smoothquant.artifacts.ports import ATTENTION_MASK, POSITION_IDS, WRITE_INDICES


class Places(ABC):
    """ids: the input of token ids. position_ids: (batch, sequence) int64, the tokens' positions."""

    position_ids: str

    def __init__(self, graph: Graph, ids: str) -> None:
        self.graph, self.ids = graph, ids

    @cached_property
    @abstractmethod
    def rows_and_columns(self) -> tuple[str, str]:
        """Columns of the queries, (sequence, 1) or (batch, 1, sequence, 1), and of the keys, (total,), both int64."""

    @abstractmethod
    def allowed(self, seen: str) -> str:
        """Which keys are seen, (batch, 1, sequence, total) bool. seen: by causality and window."""

    @cached_property
    @abstractmethod
    def key_positions(self) -> str:
        """(batch or 1, total) int64: the positions of the keys."""

    def seen(self, window: int | None) -> str:
        """Which keys are seen, (batch, 1, sequence, total) bool. window: the newest keys, all for None."""
        graph = self.graph
        rows, columns = self.rows_and_columns
        seen = graph.op("LessOrEqual", columns, rows)
        if window is not None:
            oldest = graph.op("Sub", rows, graph.constant(window))
            seen = graph.op("And", seen, graph.op("Greater", columns, oldest))
        return self.allowed(seen)

    def _length(self, x: str) -> str:
        """Second dimension of an input, a scalar."""
        return self.graph.op("Gather", self.graph.op("Shape", x), self.graph.constant(1))


class Grown(Places):
    """The places of tokens in a cache that grows."""

    def __init__(self, graph: Graph, ids: str) -> None:
        super().__init__(graph, ids)
        self.mask = graph.input(ATTENTION_MASK, torch.int64, ("batch", "total"))
        self.position_ids = graph.input(POSITION_IDS, torch.int64, ("batch", "sequence"))

    @cached_property
    def rows_and_columns(self) -> tuple[str, str]:
        graph = self.graph
        sequence, total = self._length(self.ids), self._length(self.mask)
        columns = graph.op("Range", graph.constant(0), total, graph.constant(1))
        rows = graph.op("Range", graph.op("Sub", total, sequence), total, graph.constant(1))
        return graph.op("Unsqueeze", rows, graph.constant([1])), columns

    def allowed(self, seen: str) -> str:
        graph = self.graph
        present = graph.op("Cast", self.mask, to=graph.onnx.TensorProto.BOOL)
        return graph.op("And", seen, graph.op("Unsqueeze", present, graph.constant([1, 2])))

    @cached_property
    def key_positions(self) -> str:
        graph = self.graph
        counted = graph.op("CumSum", self.mask, graph.constant(1))
        return graph.op("Max", graph.op("Sub", counted, graph.constant(1)), graph.constant(0))


class InPlace(Places):
    """The places of tokens in a buffer of fixed capacity."""

    def __init__(self, graph: Graph, ids: str, capacity: int) -> None:
        super().__init__(graph, ids)
        self.capacity = capacity
        self.write_indices = graph.input(WRITE_INDICES, torch.int64, ("batch",))
        with graph.within("positions"):
            run = graph.op("Range", graph.constant(0), self._length(ids), graph.constant(1))
            before = graph.op("Unsqueeze", self.write_indices, graph.constant([1]))
            self.position_ids = graph.op("Add", before, run)

    @cached_property
    def rows_and_columns(self) -> tuple[str, str]:
        graph = self.graph
        columns = graph.op("Range", graph.constant(0), graph.constant(self.capacity), graph.constant(1))
        return graph.op("Unsqueeze", self.position_ids, graph.constant([1, 3])), columns

    def allowed(self, seen: str) -> str:
        return seen

    @cached_property
    def key_positions(self) -> str:
        return self.graph.op("Unsqueeze", self.rows_and_columns[1], self.graph.constant([0]))
