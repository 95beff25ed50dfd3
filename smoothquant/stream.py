"""(float checkpoint, activation scales, settings) -> smoothed layers -> quantized layers, one at a time.

    load -> choose scales (`choose`) -> fold them (`fold`) -> steps (`steps`) -> quantize

    for layer in smoothed_layers(model, input_absmax, settings):
        quantized = quantize_layer(layer)       # int8 weights and float32 scales; the float layer can be forgotten

A layer is loaded in the dtype it has on disk; one linear at a time is widened to float32, smoothed and quantized.
Peak memory is one layer on disk plus a few copies of its largest matrix, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from torch import Tensor

from smoothquant import kv_cache
from smoothquant.choose import choose_scales
from smoothquant.errors import ActScalesError
from smoothquant.fold import SmoothedLayer, fold
from smoothquant.layers import FloatLayer, W8A8Layer, float_layer, float_linear
from smoothquant.model import Model
from smoothquant.norms import Norm
from smoothquant.quantization import input_scale, quantize_weight
from smoothquant.ranges import check_act_scales, input_ranges, output_ranges
from smoothquant.roles import ROUTER
from smoothquant.settings import SmoothingSettings
from smoothquant.steps import DEFAULT, Step, run_steps


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
    steps: Sequence[Step] = DEFAULT,
) -> Iterator[SmoothedLayer]:
    """Layers `start` and later, smoothed. input_absmax: linear's module name -> float32 (in,), every linear's;
    output_absmax: the same of outputs, float32 (out,), of those that are known. steps: between smoothing and storing.

    Without smoothing and static scales (groups "none", per token) there need be no input_absmax.
    Raises what `check_scales` does, and CheckpointError for NaN and Inf.
    """
    check_scales(model, input_absmax, settings)
    for index in range(start, model.geometry.layers):
        yield smooth_layer(model, index, input_absmax or {}, settings, output_absmax or {}, steps)


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
    steps: Sequence[Step] = DEFAULT,
    source: FloatLayer | None = None,
) -> SmoothedLayer:
    """Load one layer, unless `source` is it, choose its scales, fold them, and do the steps."""
    source = source or float_layer(model, index)
    act, output = input_ranges(model, index, input_absmax), output_ranges(model, index, output_absmax)
    layer = fold(model, index, source, settings, choose_scales(model, index, source, act, output, settings))
    layer.output_absmax = {role: reach / layer.row.get(role, 1) for role, reach in output.items()}
    layer.cache_scales = kv_cache.cache_scales(
        model.geometry, index, layer.norms, layer.output_absmax, shared=settings.shared_cache_scale
    )
    return run_steps(steps, layer)


def quantize_layer(layer: SmoothedLayer, weights: str = "per-channel") -> QuantizedLayer:
    """Quantize every linear of a smoothed layer; holds one float32 matrix at a time."""
    return QuantizingLayer(layer, weights).quantized()


def quantize_linear(
    layer: SmoothedLayer, role: str, weight: Tensor, granularity: str = "per-channel"
) -> QuantizedLinear:
    """Quantize one linear of a smoothed layer. weight: `layer.weight(role)`."""
    quantized, scale = quantize_weight(layer.edited(role, weight, granularity), granularity)
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
