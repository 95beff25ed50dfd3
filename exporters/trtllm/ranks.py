"""Which rank holds what: tensor parallelism within a stage, pipeline parallelism between them.

rank = stage * tp + tp_rank          stage s holds layers s * n, ..., (s + 1) * n - 1 with n = layers / pp
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """tp: ranks that share every matrix; pp: stages that share the layers."""

    tp: int = 1
    pp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp

    def ranks(self, stage: int) -> range:
        """Ranks of a stage, in the order of their parts."""
        return range(stage * self.tp, (stage + 1) * self.tp)

    def stage(self, layer: int, layers: int) -> int:
        """The stage that holds a layer."""
        return layer // (layers // self.pp)

    def local(self, layer: int, layers: int) -> int:
        """The layer's index within its stage."""
        return layer % (layers // self.pp)
