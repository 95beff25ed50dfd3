"""Recover the smoothing scales that a folder does not record, from its weights and those of the float model.

    behind a norm   s_j = gain_j / gain'_j                               ' marks what the folder holds
    v -> o,         s_i = sum_j E_ij^2 / sum_j E_ij W'_ij                rows of v or up, by least squares
    up -> down          where E = W s: the float weight with the scale of its own input

INT8 rounds W' without a preference, so the mean over a row is nearly exact. The columns of o and down tell the same
scale once more, c_j = sum_i W'_ij W_ij / sum_i W_ij^2. A scale is believed where both agree: where they do not, nothing
was folded there, and a scale of another size is an error of the folder.

The recovered scales explain a folder if its weights are those of the float model after them. The weights of a rotated
model are not: their distance to what is expected is as large as the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from smoothquant.fold import Scales, fold
from smoothquant.int8_layer import int8_layer
from smoothquant.int8_model import Int8Model
from smoothquant.layers import FloatLayer, W8A8Layer, float_layer
from smoothquant.model import Model
from smoothquant.norms import Norm
from smoothquant.settings import SmoothingSettings
from smoothquant.smoothing import repeat_over_query_heads

AGREE = math.log(1.1)  # the largest median distance of two scales that are one; INT8 moves it by some thousandths
EXPLAINED = 0.5  # the largest median of |W' - E| / |E|: INT8 has 0.01 to 0.1, two unrelated matrices have 1.4


@dataclass(frozen=True)
class Recovered:
    """The scales of a folder. smoothing_scale: by linear, float32 (in,). run_time: by linear the divisor of its input
    in the engine, float32 (in,). distance: the median of |W' - E| / |E| over all quantized linears."""

    smoothing_scale: dict[str, Tensor]
    run_time: dict[str, Tensor]
    distance: float

    @property
    def explained(self) -> bool:
        """Whether the scales explain the folder."""
        return self.distance < EXPLAINED


@torch.no_grad()
def recover(model: Model, int8: Int8Model) -> Recovered:
    """The scales of a folder that was made from `model`. One layer of both is in memory at a time."""
    smoothing_scale: dict[str, Tensor] = {}
    run_time: dict[str, Tensor] = {}
    distances: list[float] = []
    for index in range(model.geometry.layers):
        source, stored = float_layer(model, index), int8_layer(int8, index)
        column = _columns(model, source, stored)
        distances += _distances(model, source, stored, column)
        smoothing_scale |= {model.linear(index, role): scale for role, scale in column.items()}
        run_time |= {model.linear(index, role): scale for role, scale in stored.smoothers.items()}
    return Recovered(smoothing_scale, run_time, median(distances))


def _columns(model: Model, source: FloatLayer, stored: W8A8Layer) -> dict[str, Tensor]:
    """The smoothing_scale of each linear by role, float32 (in,)."""
    geometry, column = model.geometry, dict[str, Tensor]()
    for group in model.groups:  # those of norms come first
        if group.through == "norm":
            scale = _divisor(source.norms[group.source], stored.norms[group.source])
            column |= dict.fromkeys(group.linears, scale)
            continue
        expected = source.weights[group.source].float()
        if group.source in column:
            expected = expected * column[group.source]
        row = _ratio(expected.square().sum(1), (expected * _effective(stored, group.source)).sum(1))
        if group.through == "attention":
            row = repeat_over_query_heads(row, geometry.heads, geometry.kv_heads, geometry.head_dim)
        for role in group.linears:
            weight = source.weights[role].float()
            told = _ratio((weight * _effective(stored, role)).sum(0), weight.square().sum(0))
            if (told / row).log().abs().nanmedian() < AGREE:
                column[role] = torch.where(row.isfinite(), row, torch.ones_like(row))
    return column


def _distances(model: Model, source: FloatLayer, stored: W8A8Layer, column: dict[str, Tensor]) -> Iterator[float]:
    """Yield |W' - E| / |E| of every quantized linear."""
    expected = fold(model, source.index, source, SmoothingSettings(), Scales(column, {}))
    for role in stored.weights:
        weight = expected.weight(role)
        yield ((_effective(stored, role) - weight).norm() / weight.norm().clamp_min(1e-30)).item()


def _effective(stored: W8A8Layer, role: str) -> Tensor:
    """The weight that multiplies the input of a linear in effect, float32 (out, in)."""
    if role in stored.float_weights:
        return stored.float_weights[role].float()
    weight = stored.weights[role].float() * stored.weight_scales[role][:, None]
    return weight / stored.smoothers[role] if role in stored.smoothers else weight


def _divisor(norm: Norm, stored: Norm) -> Tensor:
    """The scale that a norm's output was divided by, float32 (channels,); 1 where it cannot be told."""
    scale = norm.gain.float() / stored.gain.float()
    return torch.where(scale.isfinite() & (scale != 0), scale, torch.ones_like(scale))


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """The ratio of two sums; NaN where it is no scale."""
    found = above / below
    return torch.where((found > 0) & found.isfinite(), found, torch.full_like(found, math.nan))
