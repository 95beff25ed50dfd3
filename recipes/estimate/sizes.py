"""The numbers of a model and of a text that the cost of every step follows from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from smoothquant.batches import sequences_together
from smoothquant.memory import Budget
from smoothquant.model import ROWS, Model
from smoothquant.roles import ROUTER, parsed
from smoothquant.sidecars import SIDECARS, sidecar


@dataclass(frozen=True)
class Tokens:
    """So many sequences of so many tokens."""

    sequences: int
    length: int

    @property
    def count(self) -> int:
        return self.sequences * self.length

    @property
    def batch(self) -> int:
        """The tokens that go through a layer together."""
        return self.length * min(self.sequences, sequences_together(self.length))

    def heard(self, tokens: int) -> Tokens:
        """So many of the first tokens, rounded up to whole batches: what a listener hears that wants no more."""
        return self.of(min(self.sequences, -(-tokens // self.batch) * self.batch // self.length))

    def readings(self, budget: Budget) -> int:
        """How often a sweep reads a weight: once, or for each batch where the layer does not fit into the budget."""
        if budget.numbers is None:
            return 1
        return -(-self.sequences // sequences_together(self.length, budget))

    def of(self, sequences: int) -> Tokens:
        """So many sequences of the same length."""
        return Tokens(sequences, self.length)


class ModelSizes:
    """The sizes of a model. Numbers count elements; bytes say so."""

    def __init__(self, model: Model) -> None:
        self.model, self.geometry = model, model.geometry
        self.dtype = model.checkpoint.dtype
        self.layers = model.geometry.layers
        self.nbytes = model.checkpoint.nbytes
        self.shapes = {role: model.family.shape(role, model.geometry) for role in model.roles}  # (out, in)

    @cached_property
    def layer(self) -> int:
        """Numbers in the matrices of one layer."""
        return sum(out * into for out, into in self.shapes.values())

    @cached_property
    def active(self) -> int:
        """Those that a token goes through: of experts, the ones it is sent to."""
        experts = self.geometry.experts
        inner = sum(self._numbers(role) for role in self.shapes if parsed(role).expert is not None)
        return self.layer - inner + (inner * self.geometry.experts_per_token // experts if experts else 0)

    @cached_property
    def matrix(self) -> int:
        """Numbers of the largest matrix on disk."""
        return max(sum(map(self._numbers, roles)) for roles in self.model.stored.values())

    @cached_property
    def linear(self) -> int:
        """Numbers of the largest linear."""
        return max(map(self._numbers, self.shapes))

    @cached_property
    def side_by_side(self) -> int:
        """Numbers of the largest linears that are rounded together."""
        return max(sum(map(self._numbers, roles)) for roles in self.model.side_by_side)

    @cached_property
    def inputs(self) -> tuple[int, ...]:
        """Channels of each input that linears of a layer read."""
        return tuple(self.shapes[roles[0]][1] for roles in self.model.side_by_side)

    @cached_property
    def widest(self) -> int:
        """Channels of the widest output of linears that read one input, together."""
        return max(sum(self.shapes[role][0] for role in roles) for roles in self.model.side_by_side)

    @property
    def table(self) -> int:
        """Numbers of the embedding, and of the head."""
        return self.geometry.vocab_size * self.geometry.embedded_size

    @property
    def piece(self) -> int:
        """Numbers of embedding or head that are in memory at a time."""
        return min(ROWS, self.geometry.vocab_size) * self.geometry.embedded_size

    @cached_property
    def act_scales(self) -> int:
        """Bytes of an act scales file: maxima of inputs and outputs, and mean squares of inputs, float32."""
        return sum(4 * (2 * into + out) for _, (out, into) in self.model.linears()) + self._names(3)

    @cached_property
    def smoothing(self) -> int:
        """Bytes of a smoothing file, at most: for each linear a scale and the range of its input, float32."""
        inside = sum(8 * into for role, (_, into) in self.shapes.items() if role != ROUTER)
        return self.layers * inside + self._names(2)

    @cached_property
    def sidecars(self) -> int:
        """Bytes of tokenizer and other small files that an export copies."""
        folder: Path = self.model.checkpoint.folder
        found = [sidecar(folder, name) for name in ("config.json", *SIDECARS)]
        return sum(path.stat().st_size for path in found if path)

    def hidden(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of the hidden states of so many tokens."""
        return tokens * self.geometry.hidden_size * dtype.itemsize

    def _numbers(self, role: str) -> int:
        out, into = self.shapes[role]
        return out * into

    def _names(self, each: int) -> int:
        """Bytes of a header with `each` tensors for every linear, about."""
        return 150 * each * self.layers * len(self.shapes)
