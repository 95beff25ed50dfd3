"""The one place where smoothing scales are folded into a layer.

    norm        the norm's weight is divided by the scale; where the choice has rounded it already, it is taken as it is
    attention   the rows of v, one factor for all query heads of a kv head
    linear      the rows of the linear before (up -> down, fc1 -> fc2)
    run-time    nothing is divided: the engine does it

In every case the columns of the linears that read the input are multiplied. An export chooses scales and folds them;
validation reads the recorded ones and folds them by the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smoothquant import kv_cache, smoothing
from smoothquant.layers import FloatLayer, float_linear
from smoothquant.model import Model
from smoothquant.norms import Norm
from smoothquant.scheme import Precision
from smoothquant.settings import SmoothingSettings

# (layer as it is stored, role, smoothed weight float32 (out, in), how it is to be held) -> the weight to quantize
Edit = Callable[["SmoothedLayer", str, Tensor, Precision], Tensor]


@dataclass(frozen=True)
class Scales:
    """What is folded into one layer.

    column: role -> smoothing_scale float32 (in,), of the linears whose input is smoothed.
    input_absmax: role -> float32 (in,), calibrated maxima of the smoothed input.
    norms: smoothed norms that the choice has rounded, by role. A scale is what that rounding divides by.
    """

    column: Mapping[str, Tensor]
    input_absmax: Mapping[str, Tensor]
    norms: Mapping[str, Norm] = field(default_factory=dict)


@dataclass
class SmoothedLayer:
    """A layer with smoothing folded in. Weights stay as on disk; factors are applied when a weight is asked for.

    column: role -> smoothing_scale float32 (in,), multiplies the weight's columns.
    row: role -> float32 (out,), divides the weight's rows and the bias (this linear feeds a smoothed one).
    norms: by role, smoothing folded in; weights in the dtype on disk, biases of smoothed norms in float32.
    smoother: role -> those of `column` that the engine divides the input by at run time, nothing before it does.
    input_absmax: role -> float32 (in,), calibrated maxima of the smoothed input; empty without act scales.
    output_absmax: role -> float32 (out,), calibrated maxima of the smoothed linear's output, where they are known.
    cache_scales: that an 8-bit KV cache would have, where they are known.
    edits: what steps make of a weight before it is quantized, in order.
    """

    model: Model
    index: int
    source: FloatLayer
    norms: dict[str, Norm]
    input_absmax: dict[str, Tensor]
    column: dict[str, Tensor] = field(default_factory=dict)
    row: dict[str, Tensor] = field(default_factory=dict)
    smoother: dict[str, Tensor] = field(default_factory=dict)
    output_absmax: dict[str, Tensor] = field(default_factory=dict)
    cache_scales: kv_cache.Scales | None = None
    edits: tuple[Edit, ...] = ()

    def weight(self, role: str) -> Tensor:
        """Smoothed weight, float32 (out, in), computed anew at every call."""
        weight = self.source.weights[role].to(torch.float32, copy=True)
        if role in self.column:
            weight *= self.column[role]
        if role in self.row:
            weight /= self.row[role][:, None]
        return weight

    def edited(self, role: str, weight: Tensor, precision: Precision) -> Tensor:
        """What is quantized in place of a smoothed weight (out, in). precision: how it is to be held."""
        for edit in self.edits:
            weight = edit(self, role, weight, precision)
        return weight

    def bias(self, role: str) -> Tensor | None:
        """Smoothed bias, float32 (out,), or None."""
        if role not in self.source.biases:
            return None
        bias = self.source.biases[role].float()
        return bias / self.row[role] if role in self.row else bias

    def linear(self, role: str, x: Tensor) -> Tensor:
        """The smoothed linear in float: lets the decoder run this layer."""
        return float_linear(self.divided(role, x), self.weight(role), self.bias(role))

    def cached(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values

    def divided(self, role: str, x: Tensor) -> Tensor:
        """What the engine makes of a linear's input (..., in) before anything else: smoothed, if it has to do that."""
        return x / self.smoother[role].to(x.dtype) if role in self.smoother else x


def fold(model: Model, index: int, source: FloatLayer, settings: SmoothingSettings, scales: Scales) -> SmoothedLayer:
    """A layer with scales folded in. source: as it is on disk; settings: say what each scale is folded into."""
    geometry = model.geometry
    layer = SmoothedLayer(
        model,
        index,
        source,
        norms={**source.norms, **scales.norms},
        input_absmax=dict(scales.input_absmax),
        column=dict(scales.column),
    )
    for group in settings.chosen(model.groups, model.quantized_roles):
        scale = scales.column.get(group.linears[0])
        if scale is None:
            continue
        if group.through == "norm":
            if group.source not in scales.norms:
                layer.norms[group.source] = source.norms[group.source].divided(scale)
        elif group.through == "run-time":
            layer.smoother |= dict.fromkeys(group.linears, scale)
        elif group.through == "attention":  # equal within a kv head's query heads
            layer.row[group.source] = smoothing.share_over_query_heads(scale, geometry.kv_heads, geometry.head_dim)
        else:
            layer.row[group.source] = scale
    return layer
