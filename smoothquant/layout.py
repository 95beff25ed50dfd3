"""Split the linears that lie in one matrix on disk, and join them again. Two orders of rows exist:

one after another   rows of the first, rows of the second, ...             (Phi-3: qkv_proj, gate_up_proj)
interleaved         for each kv head its queries, its key, its value       (BLOOM, Falcon: query_key_value)

The functions work on anything with a row per output channel: weights (out, in), biases and scales (out,).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from smoothquant.family import Family, Geometry


@dataclass(frozen=True)
class RoleRows:
    """Where the rows of a role lie in their matrix: runs of `run` rows, the first at row `first`, each `stride` rows
    after the one before."""

    first: int
    run: int
    stride: int

    def runs(self, rows: slice) -> Iterator[tuple[slice, slice]]:
        """Some of the role's rows, run by run: which they are of `rows`, and which of the matrix."""
        start = rows.start
        while start < rows.stop:
            number, within = divmod(start, self.run)
            stop = min(rows.stop, start + self.run - within)
            place = self.first + number * self.stride + within
            yield slice(start - rows.start, stop - rows.start), slice(place, place + stop - start)
            start = stop


def role_rows(family: Family, geometry: Geometry, role: str) -> RoleRows:
    """Where the rows of a role lie in its matrix on disk."""
    name = family.linear(role)
    sizes = {one: family.shape(one, geometry)[0] for one in family.stored(geometry)[name]}
    if name in family.interleaved:
        sizes = {one: size // geometry.kv_heads for one, size in sizes.items()}
    before = list(sizes)[: list(sizes).index(role)]
    return RoleRows(sum(sizes[one] for one in before), sizes[role], sum(sizes.values()))


def split(family: Family, geometry: Geometry, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The rows of each role, contiguous. name: the name of the matrix within a layer. tensor: (rows, ...)."""
    roles = family.stored(geometry)[name]
    if len(roles) == 1:
        return {roles[0]: tensor}
    rows = [family.shape(role, geometry)[0] for role in roles]
    if name not in family.interleaved:
        return dict(zip(roles, (part.contiguous() for part in tensor.split(rows)), strict=True))
    per_head = tensor.view(geometry.kv_heads, -1, geometry.head_dim, *tensor.shape[1:])
    heads = [size // geometry.kv_size for size in rows]  # heads of each role for one kv head
    parts = per_head.split(heads, dim=1)
    return {role: part.reshape(-1, *tensor.shape[1:]) for role, part in zip(roles, parts, strict=True)}


def join(family: Family, geometry: Geometry, name: str, parts: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
    """The whole matrix, the inverse of `split`. parts: the rows by role, or in the order of the roles."""
    ordered = [parts[role] for role in family.stored(geometry)[name]] if isinstance(parts, Mapping) else list(parts)
    if len(ordered) == 1:
        return ordered[0]
    if name not in family.interleaved:
        return torch.cat(ordered)
    shape = ordered[0].shape[1:]
    per_head = [part.view(geometry.kv_heads, -1, geometry.head_dim, *shape) for part in ordered]
    return torch.cat(per_head, dim=1).reshape(-1, *shape)
