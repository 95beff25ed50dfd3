"""Fold smoothing scales into a layer. The scale of a group divides:

    norm        the norm's weight; a norm that the choice of scales has rounded is taken as it is
    attention   the rows of v, by one factor for all query heads of a kv head
    linear      the rows of the linear before (up -> down, fc1 -> fc2)
    run-time    nothing: the engine divides the input

In every case it multiplies the columns of the linears that read the input. The divisor of keys (`kv_cache`) divides the
rows of k and multiplies those of q, or the weights of the norms behind them. An export chooses scales and folds them;
validation reads the recorded scales and folds them by the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from smoothquant import kv_cache, smoothing
from smoothquant.layers import FloatLayer, sliced_linear
from smoothquant.model import Model
from smoothquant.norms import Norm
from smoothquant.scheme import Precision
from smoothquant.settings import SmoothingSettings
from smoothquant.slices import Part

# (the stored layer, role, smoothed weight float32 (out, in), its precision) -> the weight to quantize
Edit = Callable[["SmoothedLayer", str, Tensor, Precision], Tensor]


@dataclass(frozen=True)
class Scales:
    """The scales to fold into one layer.

    column: for each role with a smoothed input its smoothing_scale, float32 (in,).
    input_absmax: for each role the calibrated maxima of the smoothed input, float32 (in,).
    norms: by role, the smoothed norms that the choice has rounded. The scale is the divisor that the rounded weight
        really has.
    keys: the divisor of keys in an 8-bit cache, float32 (kv_size,); None where they stay as they are.
    """

    column: Mapping[str, Tensor]
    input_absmax: Mapping[str, Tensor]
    norms: Mapping[str, Norm] = field(default_factory=dict)
    keys: Tensor | None = None


@dataclass(frozen=True)
class Rounded:
    """A linear as a plan has rounded it. weight: int8 (out, in), of the smoothed weight. weight_scale: float32 (out,).
    bias: float32 (out,), corrected for what rounding adds on average; None for the linear's own."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None = None


@dataclass
class SmoothedLayer:
    """A layer with smoothing folded in. Stored weights stay as they are; `weight` applies the factors.

    column: for each role its smoothing_scale, float32 (in,), which multiplies the weight's columns.
    row: for each role float32 (out,), which divides the weight's rows and the bias (this linear feeds a smoothed one).
    norms: the norms by role, with smoothing folded in; weights in the dtype on disk, biases of smoothed norms in
        float32.
    keys: the divisor of keys, float32 (kv_size,), if there is one.
    smoother: for each role the scale of `column` that the engine divides the input by at run time.
    input_absmax: for each role the calibrated maxima of the smoothed input, float32 (in,); empty without act scales.
    output_absmax: for each role the calibrated maxima of the smoothed linear's output, float32 (out,), if known.
    cache_scales: the scales of an 8-bit KV cache, if known.
    edits: the changes of a weight by steps before it is quantized, in order.
    rounded: by role, linears that a plan has rounded.
    """

    model: Model
    index: int
    source: FloatLayer
    norms: dict[str, Norm]
    input_absmax: dict[str, Tensor]
    column: dict[str, Tensor] = field(default_factory=dict)
    row: dict[str, Tensor] = field(default_factory=dict)
    smoother: dict[str, Tensor] = field(default_factory=dict)
    keys: Tensor | None = None
    output_absmax: dict[str, Tensor] = field(default_factory=dict)
    cache_scales: kv_cache.Scales | None = None
    edits: tuple[Edit, ...] = ()
    rounded: Mapping[str, Rounded] = field(default_factory=dict)

    def weight(self, role: str) -> Tensor:
        """The smoothed weight, float32 (out, in), computed anew at every call."""
        parts = [part for _, part in self.parts(role)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def parts(self, role: str) -> Iterator[Part]:
        """The smoothed weight, some rows at a time, float32 (rows, in) each. One that edits may change comes whole."""
        source = self.source
        whole = ((slice(0, source.rows(role)), source.weights[role]) for _ in self.edits[:1])
        for rows, stored in whole if self.edits else source.parts(role):
            weight = stored.to(torch.float32, copy=True)
            del stored
            if role in self.column:
                weight *= self.column[role]
            if role in self.row:
                weight /= self.row[role][rows, None]
            yield rows, weight

    def edited(self, role: str, weight: Tensor, precision: Precision) -> Tensor:
        """The weight after all edits, (out, in), which is then quantized. weight: the smoothed weight. precision: its
        precision after quantizing."""
        for edit in self.edits:
            weight = edit(self, role, weight, precision)
        return weight

    def bias(self, role: str) -> Tensor | None:
        """The smoothed bias, float32 (out,); None without a bias."""
        if role not in self.source.biases:
            return None
        bias = self.source.biases[role].float()
        return bias / self.row[role] if role in self.row else bias

    def in_float(self) -> FloatLayer:
        """This layer with the smoothed weights and biases in float32, each computed once."""
        weights = {role: self.weight(role) for role in self.source.weights}
        biases = {role: bias for role in weights if (bias := self.bias(role)) is not None}
        return FloatLayer(self.index, weights, biases, self.norms)

    def linear(self, role: str, x: Tensor) -> Tensor:
        """The output of the smoothed linear in float, for the decoder."""
        return sliced_linear(self.divided(role, x), self.source.rows(role), self.parts(role), self.bias(role))

    def cached(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values

    def divided(self, role: str, x: Tensor) -> Tensor:
        """The input of a linear, (..., in), after the engine's division at run time if the linear has one."""
        return x / self.smoother[role].to(x.dtype) if role in self.smoother else x


def fold_final_norm(model: Model, scale: Tensor) -> Norm:
    """The final norm with the scale of the output head's input folded in. scale: float32 (hidden,)."""
    assert model.family.final_norm
    return model.norm_at(model.family.final_norm).divided(scale)


def fold(model: Model, index: int, source: FloatLayer, settings: SmoothingSettings, scales: Scales) -> SmoothedLayer:
    """A layer with scales folded in. source: the stored layer. settings: they say where each scale is folded."""
    geometry = model.geometry
    layer = SmoothedLayer(
        model,
        index,
        source,
        norms={**source.norms, **scales.norms},
        input_absmax=dict(scales.input_absmax),
        column=dict(scales.column),
        keys=scales.keys,
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
    if scales.keys is not None and "key" in layer.norms:
        head = scales.keys[: geometry.head_dim]  # one for all heads, as the norm has
        layer.norms |= {"key": layer.norms["key"].divided(head), "query": layer.norms["query"].divided(1 / head)}
    elif scales.keys is not None:
        spread = smoothing.repeat_over_query_heads(scales.keys, geometry.heads, geometry.kv_heads, geometry.head_dim)
        layer.row |= {"k": scales.keys, "q": 1 / spread}
    return layer
