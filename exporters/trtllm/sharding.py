"""Which rank holds what: tensor parallelism within a stage, pipeline parallelism between stages.

rank = stage * tp + tp_rank          stage s holds layers s * n, ..., (s + 1) * n - 1 with n = layers / pp

    column   linears that produce what is shared: rows of the weight, its scales, its bias       qkv, fc, gate, lm_head
    row      linears that consume it: columns of the weight, the smoother                        dense, proj
    both     everything else is on every rank, whole

qkv is three linears in one: each is divided by itself, and a rank's parts are joined. Where there are fewer kv heads
than ranks, every kv head is repeated for the ranks that share it.

What lies outside the layers is streamed some rows at a time into the ranks that hold it:

first stage    transformer.vocab_embedding.weight       (vocabulary, hidden), whole on every rank
               transformer.position_embedding.weight    (positions, hidden), learned positions; without the rows
                                                        before position 0
               transformer.ln_embed.{weight,bias}       a norm behind the embedding
last stage     transformer.ln_f.{weight,bias}
               lm_head.weight                           (vocabulary padded with zero rows, hidden), rows divided;
                                                        the embedding once more where they are tied
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from smoothquant.artifacts.safetensors_files import Planned, SafetensorsFile
from smoothquant.model import Model

Cast = Callable[[str, Tensor], Tensor]  # (name, tensor) -> in the dtype of the engine


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


@dataclass(frozen=True)
class Outer:
    """One tensor outside the layers. source: its name in the checkpoint. skipped: the number of first rows that are
    left out. divided: whether its rows are divided among the ranks."""

    name: str
    source: str
    first: bool
    skipped: int = 0
    divided: bool = False

    def plan(self, model: Model, dtype: torch.dtype, tp: int) -> Planned:
        """On each rank of its stage."""
        rows, *channels = model.info(self.source).shape
        rows = padded(rows, tp) // tp if self.divided else rows - self.skipped
        return Planned((rows, *channels), dtype)

    def write(self, model: Model, files: list[SafetensorsFile], cast: Cast) -> None:
        """Read it once, and write it to the files of its stage's ranks."""
        row = -self.skipped
        for part in model.rows(self.source):
            kept = cast(self.name, part[max(0, -row) :])
            self._write_rows(files, kept, max(0, row))
            row += len(part)
        each = files[0].plan[self.name].shape[0]
        missing = each * len(files) - row if self.divided else 0
        self._write_rows(files, torch.zeros(missing, *kept.shape[1:], dtype=kept.dtype), row)

    def _write_rows(self, files: list[SafetensorsFile], part: Tensor, row: int) -> None:
        """part: rows of the whole tensor from `row` on."""
        each = files[0].plan[self.name].shape[0]
        for rank, file in enumerate(files):
            start = rank * each if self.divided else 0
            mine = part[max(0, start - row) : max(0, start + each - row)]
            if len(mine):
                file.write_part(self.name, mine, max(0, row - start))


def outer_tensors(model: Model) -> Iterator[Outer]:
    """All tensors of a model that lie outside its layers."""
    family = model.family
    yield Outer("transformer.vocab_embedding.weight", f"{family.embedding}.weight", first=True)
    if family.positions:
        positions = f"{family.positions}.weight"
        yield Outer("transformer.position_embedding.weight", positions, first=True, skipped=family.position_offset)
    for name, module, first in (("ln_embed", family.embedding_norm, True), ("ln_f", family.final_norm, False)):
        if module:
            yield Outer(f"transformer.{name}.weight", f"{module}.weight", first)
            if family.norm == "layer":
                yield Outer(f"transformer.{name}.bias", f"{module}.bias", first)
    yield Outer("lm_head.weight", model.lm_head, first=False, divided=True)
