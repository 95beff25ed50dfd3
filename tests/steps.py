"""Steps between smoothing and storing that only tests have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from smoothquant.fold import SmoothedLayer
from smoothquant.steps import Step


@dataclass(frozen=True)
class ClipRows:
    """Rows of a weight are cut at a quantile of their own magnitudes."""

    quantile: float
    name: ClassVar[str] = "clip-rows"

    def __call__(self, layer: SmoothedLayer) -> SmoothedLayer:
        def clipped(layer: SmoothedLayer, role: str, weight: Tensor, granularity: str) -> Tensor:
            limit = weight.abs().quantile(self.quantile, dim=1, keepdim=True)
            return weight.clamp(-limit, limit)

        return replace(layer, edits=(*layer.edits, clipped))


@dataclass(frozen=True)
class Shrink:
    """Ranges become smaller, and weights are scaled by what has become of them: neither is idempotent."""

    name: ClassVar[str] = "shrink"

    def __call__(self, layer: SmoothedLayer) -> SmoothedLayer:
        def scaled(layer: SmoothedLayer, role: str, weight: Tensor, granularity: str) -> Tensor:
            return weight * layer.input_absmax[role]

        ranges = {role: 0.9 * reach for role, reach in layer.input_absmax.items()}
        return replace(layer, input_absmax=ranges, edits=(*layer.edits, scaled))


KNOWN: dict[str, type[Step]] = {step.name: step for step in (ClipRows, Shrink)}
