"""(float checkpoint, activation scales, settings) -> smoothed layers -> quantized layers, one at a time.

    for layer in smoothed_layers(model, input_absmax, settings):
        quantized = quantize_layer(layer)       # int8 weights and float32 scales; the float layer can be forgotten

A layer is loaded in the dtype it has on disk; one linear at a time is widened to float32, smoothed and quantized.
Peak memory is one layer on disk plus a few copies of its largest matrix, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor

from smoothquant import kv_cache, smoothing
from smoothquant.errors import ActScalesError
from smoothquant.family import ROUTER, SmoothingGroup
from smoothquant.layers import FloatLayer, W8A8Layer, float_layer, float_linear
from smoothquant.model import Model
from smoothquant.norms import Norm
from smoothquant.quantization import absmax, input_scale, quantize_weight
from smoothquant.ranges import borrow_ranges, check_act_scales, input_ranges, output_ranges
from smoothquant.settings import SmoothingSettings


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

    def weight(self, role: str) -> Tensor:
        """Smoothed weight, float32 (out, in), computed anew at every call."""
        weight = self.source.weights[role].to(torch.float32, copy=True)
        if role in self.column:
            weight *= self.column[role]
        if role in self.row:
            weight /= self.row[role][:, None]
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


@dataclass(frozen=True)
class QuantizedLinear:
    """name: module name in the checkpoint, which linears of one matrix share; weight: int8 (out, in);
    weight_scale: float32 (out,) > 0; input_scale: float32 scalar > 0, for static activations (None without act scales);
    bias: float32 (out,) or None; smoothing_scale: float32 (in,), None where the input is not smoothed; smoother: the
    same where the engine divides the input by it, else None."""

    name: str
    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    bias: Tensor | None = None
    smoothing_scale: Tensor | None = None
    smoother: Tensor | None = None


@dataclass(frozen=True)
class QuantizedLayer:
    """linears: by role, all that get quantized; float_weights: of the others, float32, smoothed; norms: by role,
    smoothing folded in; smoothers: by role, what the engine divides inputs by."""

    index: int
    linears: dict[str, QuantizedLinear]
    float_weights: dict[str, Tensor]
    norms: dict[str, Norm]
    smoothers: dict[str, Tensor] = field(default_factory=dict)

    def runnable(self, act: str = "per-token", kept: Mapping[str, Tensor] | None = None) -> W8A8Layer:
        """This layer for the decoder. act: "per-token" or "per-tensor"; kept: smoothed weights, by role, of linears
        that are left in float after all."""
        static = {role: linear.input_scale for role, linear in self.linears.items() if linear.input_scale is not None}
        return W8A8Layer(
            index=self.index,
            weights={role: linear.weight for role, linear in self.linears.items()},
            weight_scales={role: linear.weight_scale for role, linear in self.linears.items()},
            biases={role: linear.bias for role, linear in self.linears.items() if linear.bias is not None},
            norms=self.norms,
            input_scales=static if act == "per-tensor" else {},
            float_weights={**self.float_weights, **(kept or {})},
            smoothers=self.smoothers,
        )


def smoothed_layers(
    model: Model,
    input_absmax: Mapping[str, Tensor] | None,
    settings: SmoothingSettings,
    start: int = 0,
    output_absmax: Mapping[str, Tensor] | None = None,
) -> Iterator[SmoothedLayer]:
    """Layers `start` and later, smoothed. input_absmax: linear's module name -> float32 (in,), every linear's;
    output_absmax: the same of outputs, float32 (out,), of those that are known.

    Without smoothing and static scales (groups "none", per token) there need be no input_absmax.
    Raises what `check_scales` does, and CheckpointError for NaN and Inf.
    """
    check_scales(model, input_absmax, settings)
    for index in range(start, model.geometry.layers):
        yield smooth_layer(model, index, input_absmax or {}, settings, output_absmax or {})


def check_scales(model: Model, input_absmax: Mapping[str, Tensor] | None, settings: SmoothingSettings) -> None:
    """Raise ActScalesError for a linear without scales or with scales of another shape, and where smoothing has none
    at all."""
    if input_absmax is not None:
        check_act_scales(model, input_absmax)
    elif settings.groups != "none":
        raise ActScalesError(
            "no activation scales to smooth by",
            expected="a file made by smoothquant calibrate",
            do="give ACT_SCALES, or --groups none",
        )


def smooth_layer(
    model: Model,
    index: int,
    input_absmax: Mapping[str, Tensor],
    settings: SmoothingSettings,
    output_absmax: Mapping[str, Tensor] = MappingProxyType({}),
    source: FloatLayer | None = None,
) -> SmoothedLayer:
    """Load one layer, unless `source` is it, and fold the chosen smoothing groups into it."""
    source = source or float_layer(model, index)
    act, output = input_ranges(model, index, input_absmax), output_ranges(model, index, output_absmax)
    layer = SmoothedLayer(model, index, source, norms=dict(source.norms), input_absmax=dict(act))
    for group in settings.chosen(model.groups, model.quantized_roles):
        scale = _group_scale(model, source, act, group, settings)
        if group.through == "norm":
            if settings.groups != "paper":
                scale = smoothing.skip_dead_channels(scale, act[group.linears[0]])
            scale, layer.norms[group.source] = source.norms[group.source].fold(scale)
        elif group.through == "run-time":
            hold = smoothing.as_factor if settings.groups == "unfolded" else smoothing.as_divisor
            scale = smoothing.skip_dead_channels(scale, act[group.linears[0]])
            scale = hold(scale, getattr(torch, settings.smoother_dtype))
            layer.smoother |= dict.fromkeys(group.linears, scale)
        else:
            scale = smoothing.skip_dead_channels(scale, _shared(model, group, act[group.linears[0]]))
            if group.through == "attention" and settings.kv_cache == "int8":
                scale = kv_cache.match(scale, output["v"], kv_cache.key_absmax(output["k"], model.geometry, index))
            layer.row[group.source] = scale
            scale = _spread(model, group, scale)
        for role in group.linears:
            layer.column[role] = scale
            layer.input_absmax[role] = act[role] / scale
    layer.output_absmax = {role: reach / layer.row.get(role, 1) for role, reach in output.items()}
    layer.cache_scales = kv_cache.cache_scales(
        model.geometry, index, layer.norms.get("key"), layer.output_absmax, shared=settings.kv_cache == "int8"
    )
    borrow_ranges(layer.input_absmax)
    return layer


def quantize_layer(layer: SmoothedLayer, weights: str = "per-channel") -> QuantizedLayer:
    """Quantize every linear of a smoothed layer; holds one float32 matrix at a time."""
    return QuantizingLayer(layer, weights).quantized()


def quantize_linear(
    layer: SmoothedLayer, role: str, weight: Tensor, granularity: str = "per-channel"
) -> QuantizedLinear:
    """Quantize one linear of a smoothed layer. weight: `layer.weight(role)`."""
    quantized, scale = quantize_weight(weight, granularity)
    return QuantizedLinear(
        name=layer.model.linear(layer.index, role),
        weight=quantized,
        weight_scale=scale,
        input_scale=input_scale(layer.input_absmax[role]) if role in layer.input_absmax else None,
        bias=layer.bias(role),
        smoothing_scale=layer.column.get(role),
        smoother=layer.smoother.get(role),
    )


class QuantizingLayer:
    """A smoothed layer that the decoder runs in float, quantized on the way: each weight is computed once for both.

    weights: "per-channel" or "per-tensor".
    """

    def __init__(self, layer: SmoothedLayer, weights: str = "per-channel") -> None:
        self.layer, self.index, self.norms, self.weights = layer, layer.index, layer.norms, weights
        self._linears: dict[str, QuantizedLinear] = {}

    def linear(self, role: str, x: Tensor) -> Tensor:
        weight = self.layer.weight(role)
        if role != ROUTER:
            self._linears[role] = self._quantize(role, weight)
        return float_linear(self.layer.divided(role, x), weight, self.layer.bias(role))

    def cached(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values

    def quantized(self) -> QuantizedLayer:
        """The quantized layer. Linears that the decoder did not run (experts without a token) are done now."""
        layer, roles = self.layer, self.layer.model.quantized_roles
        linears = {role: self._linears.get(role) or self._quantize(role, layer.weight(role)) for role in roles}
        float_weights = {role: layer.weight(role) for role in layer.source.weights if role not in linears}
        return QuantizedLayer(layer.index, linears, float_weights, layer.norms, layer.smoother)

    def _quantize(self, role: str, weight: Tensor) -> QuantizedLinear:
        return quantize_linear(self.layer, role, weight, self.weights)


def _group_scale(
    model: Model, source: FloatLayer, act: Mapping[str, Tensor], group: SmoothingGroup, settings: SmoothingSettings
) -> Tensor:
    columns = [absmax(source.weights[role], dim=0).float() for role in group.linears]
    weight_absmax = _shared(model, group, torch.stack(columns).amax(dim=0))
    return smoothing.smoothing_scale(_shared(model, group, act[group.linears[0]]), weight_absmax, settings.alpha)


def _shared(model: Model, group: SmoothingGroup, values: Tensor) -> Tensor:
    """From the channels of a group's input to those of its source."""
    if group.through != "attention":
        return values
    return smoothing.share_over_query_heads(values, model.geometry.kv_heads, model.geometry.head_dim)


def _spread(model: Model, group: SmoothingGroup, values: Tensor) -> Tensor:
    """From the channels of a group's source to those of its input."""
    if group.through != "attention":
        return values
    geometry = model.geometry
    return smoothing.repeat_over_query_heads(values, geometry.heads, geometry.kv_heads, geometry.head_dim)
