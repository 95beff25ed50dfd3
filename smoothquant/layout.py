"""Split the linears that lie in one matrix on disk, and join them again. Two orders of rows exist:

one after another   rows of the first, rows of the second, ...             (Phi-3: qkv_proj, gate_up_proj)
interleaved         for each kv head its queries, its key, its value       (BLOOM, Falcon: query_key_value)

The functions work on anything with a row per output channel: weights (out, in), biases and scales (out,).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from smoothquant.family import Family, Geometry


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
