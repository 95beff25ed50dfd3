"""Which rank holds what: tensor parallelism within a stage, pipeline parallelism between stages.

rank = stage * tp + tp_rank          stage s holds layers s * n, ..., (s + 1) * n - 1 with n = layers / pp

    column   linears that produce what is shared: rows of the weight, its scales, its bias       qkv, fc, gate, lm_head
    row      linears that consume it: columns of the weight, the smoother                        dense, proj
    both     everything else is on every rank, whole

qkv is three linears in one: each is divided by itself, and a rank's parts are joined. Where there are fewer kv heads
than ranks, every kv head is repeated for the ranks that share it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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


@dataclass(frozen=True)
class Sharded:
    """A tensor of the unsharded model. parts: divided along `dim` each by itself, then joined; dim: None for whole."""

    parts: tuple[Tensor, ...]
    dim: int | None = None

    def of(self, rank: int, tp: int) -> Tensor:
        """What one rank of `tp` holds."""
        if self.dim is None or tp == 1:
            return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts, self.dim or 0)
        mine = [part.chunk(tp, self.dim)[rank] for part in self.parts]
        return mine[0] if len(mine) == 1 else torch.cat(mine, self.dim)


def whole(tensor: Tensor) -> Sharded:
    """On every rank."""
    return Sharded((tensor,))


def divided(dim: int, *parts: Tensor) -> Sharded:
    """Along a dimension."""
    return Sharded(parts, dim)


def repeated_heads(tensor: Tensor, kv_heads: int, tp: int) -> Tensor:
    """Rows of k or v, each head as often as ranks share it. tensor: (kv_heads * head_dim, ...), or any number per row;
    returns (max(kv_heads, tp) * head_dim, ...)."""
    times = max(1, tp // kv_heads)
    if times == 1:
        return tensor
    heads = tensor.view(kv_heads, 1, -1, *tensor.shape[1:])
    return heads.expand(-1, times, *heads.shape[2:]).reshape(-1, *tensor.shape[1:])


def padded(rows: int, tp: int) -> int:
    """Rows of a vocabulary after zero rows have made it divisible."""
    return -(-rows // tp) * tp
