"""The weights of a layer that stay on the disk: a slice of one matrix is in memory, some rows of it at a time.

A layer that is read like this is as any other to who computes with it: a weight is read whenever it is used, so that
experts are read one after another, and those that no token reaches not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smoothquant.model import Model

Part = tuple[slice, Tensor]  # which rows of a matrix, or columns of an output; and they themselves


@dataclass(frozen=True, eq=False)
class StoredWeights(Mapping[str, Tensor]):
    """The weights of a layer by role. dtype: None for that on disk. device: where they are put. numbers: how many
    numbers of a matrix are read at a time."""

    model: Model
    index: int
    numbers: int
    dtype: torch.dtype | None = None
    device: str = "cpu"

    def __getitem__(self, role: str) -> Tensor:
        """A whole matrix, (out, in)."""
        return torch.cat([part for _, part in self.parts(role)])

    def __iter__(self) -> Iterator[str]:
        return iter(self.model.roles)

    def __len__(self) -> int:
        return len(self.model.roles)

    def rows(self, role: str) -> int:
        """The number of rows of a matrix."""
        return self.model.family.shape(role, self.model.geometry)[0]

    def to(self, device: str, dtype: torch.dtype | None = None) -> StoredWeights:
        """The same weights on a device, in `dtype` if one is given."""
        return replace(self, device=device, dtype=dtype or self.dtype)

    def parts(self, role: str) -> Iterator[Part]:
        """A matrix, some rows at a time, (rows, in) each."""
        rows, columns = self.model.family.shape(role, self.model.geometry)
        step = max(1, self.numbers // columns)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            yield part, self._rows(role, part).to(self.device, self.dtype)

    def _rows(self, role: str, rows: slice) -> Tensor:
        name = f"{self.model.linear(self.index, role)}.weight"
        read = [self.model.read(name, there) for _, there in self.model.role_rows(role).runs(rows)]
        return read[0] if len(read) == 1 else torch.cat(read)


def joined(columns: int, parts: Iterable[Part]) -> Tensor:
    """An output, (..., columns), that is computed some columns at a time."""
    whole: Tensor | None = None
    for place, part in parts:
        if part.shape[-1] == columns:
            whole = part
        else:
            whole = part.new_empty(*part.shape[:-1], columns) if whole is None else whole
            whole[..., place] = part
    assert whole is not None  # a matrix has rows
    return whole
