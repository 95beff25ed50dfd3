"""(float checkpoint, activation scales, settings) -> smoothed layers -> quantized layers, one at a time.

    load -> choose scales (`choose`) -> fold them (`fold`) -> steps (`steps`) -> quantize

With the plan of a search, the scales are those that it records, and so are the weights that it has rounded:

    load -> the plan's scales (`plan`) -> fold them -> steps -> the plan's weights; quantize the others

    for layer in smoothed_layers(model, input_absmax, settings):
        quantized = quantize_layer(layer)       # int8 weights and float32 scales; the float layer can be forgotten

A layer is loaded in its dtype on disk. One linear at a time is widened to float32, smoothed and quantized.
Peak memory is one layer on disk plus a few copies of its largest matrix, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import Tensor

from smoothquant import kv_cache
from smoothquant.choose import choose_scales
from smoothquant.errors import ActScalesError
from smoothquant.fold import SmoothedLayer, fold
from smoothquant.layers import FloatLayer, W8A8Layer, float_layer, float_linear
from smoothquant.model import Model
from smoothquant.norms import Norm
from smoothquant.plan import Plan, PlannedLayer
from smoothquant.quantization import input_scale, quantize_weight
from smoothquant.ranges import check_act_scales, input_ranges, output_ranges
from smoothquant.scheme import PER_TOKEN, Precision, Scheme
from smoothquant.settings import SmoothingSettings
from smoothquant.steps import DEFAULT, Step, run_steps


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized linear.

    name: its module name in the checkpoint, which linears of one matrix share. weight: int8 (out, in). weight_scale:
    float32 (out,), > 0. input_scale: a float32 scalar > 0, for static activations; None without act scales. bias:
    float32 (out,), or None. smoothing_scale: float32 (in,); None if the input is not smoothed. smoother: the
    smoothing_scale if the engine divides the input by it, or else None.
    """

    name: str
    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    bias: Tensor | None = None
    smoothing_scale: Tensor | None = None
    smoother: Tensor | None = None


@dataclass(frozen=True)
class QuantizedLayer:
    """A quantized layer.

    linears: the quantized linears by role. float_weights, float_biases: the smoothed weights and biases of the other
    linears by role, float32. norms: the norms by role, with smoothing folded in. smoothers: the divisors of inputs in
    the engine by role.
    """

    index: int
    linears: dict[str, QuantizedLinear]
    float_weights: dict[str, Tensor]
    norms: dict[str, Norm]
    smoothers: dict[str, Tensor] = field(default_factory=dict)
    float_biases: dict[str, Tensor] = field(default_factory=dict)

    def runnable(self, activations: Precision = PER_TOKEN.activations) -> W8A8Layer:
        """This layer for the decoder. activations: the precision of its linears' inputs."""
        static = {role: linear.input_scale for role, linear in self.linears.items() if linear.input_scale is not None}
        biases = {role: linear.bias for role, linear in self.linears.items() if linear.bias is not None}
        return W8A8Layer(
            index=self.index,
            weights={role: linear.weight for role, linear in self.linears.items()},
            weight_scales={role: linear.weight_scale for role, linear in self.linears.items()},
            biases=biases | self.float_biases,
            norms=self.norms,
            activations=activations,
            input_scales=static if activations.static else {},
            float_weights=self.float_weights,
            smoothers=self.smoothers,
        )


def smoothed_layers(
    model: Model,
    input_absmax: Mapping[str, Tensor] | None,
    settings: SmoothingSettings,
    start: int = 0,
    output_absmax: Mapping[str, Tensor] | None = None,
    steps: Sequence[Step] = DEFAULT,
    plan: Plan | None = None,
) -> Iterator[SmoothedLayer]:
    """Yield the smoothed layers from `start` on.

    input_absmax: the input maxima of every linear, float32 (in,), by module name. Without smoothing and static scales
    (groups "none", per token) it may be None. output_absmax: the known output maxima, float32 (out,), by module name.
    steps: the steps between smoothing and storing. plan: what a search has chosen, with `settings`.
    Raises the errors of `check_scales`, and CheckpointError for NaN and Inf.
    """
    check_scales(model, input_absmax, settings)
    for index in range(start, model.geometry.layers):
        yield smooth_layer(model, index, input_absmax or {}, settings, output_absmax or {}, steps, plan=plan)


def check_scales(model: Model, input_absmax: Mapping[str, Tensor] | None, settings: SmoothingSettings) -> None:
    """Raise ActScalesError if a linear has no scales or scales of another shape, or if smoothing has no scales at
    all."""
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
    plan: Plan | None = None,
) -> SmoothedLayer:
    """One smoothed layer: its scales are chosen, or taken from a plan, and folded, and the steps applied. source: the
    layer, if it is already loaded."""
    source = source or float_layer(model, index)
    act, output = input_ranges(model, index, input_absmax), output_ranges(model, index, output_absmax)
    planned = (
        plan.layer(model, index)
        if plan
        else PlannedLayer(choose_scales(model, index, source, act, output, settings), rounded={})
    )
    return run_steps(steps, planned_layer(model, source, planned, output, settings))


def planned_layer(
    model: Model, source: FloatLayer, planned: PlannedLayer, output: Mapping[str, Tensor], settings: SmoothingSettings
) -> SmoothedLayer:
    """The layer with the scales of a plan folded in, and its rounded weights; no step was applied.

    output: the known maxima of the stored linears' outputs by role, float32 (out,).
    """
    layer = fold(model, source.index, source, settings, planned.scales)
    layer.rounded = planned.rounded
    layer.output_absmax = {role: reach / layer.row.get(role, 1) for role, reach in output.items()}
    layer.cache_scales = planned.cache_scales or kv_cache.cache_scales(
        model.geometry, source.index, layer.norms, layer.output_absmax, shared=settings.cache == "shared"
    )
    return layer


def quantize_layer(layer: SmoothedLayer, scheme: Scheme = PER_TOKEN) -> QuantizedLayer:
    """The layer with quantized linears; some stay in float by the scheme. One float32 matrix is in memory at a time."""
    return QuantizingLayer(layer, scheme.weights, scheme.float_linears).quantized()


def runnable(layer: SmoothedLayer, scheme: Scheme) -> W8A8Layer:
    """The layer in a scheme's arithmetic, for the decoder, with its 8-bit cache if the scheme has one."""
    quantized = quantize_layer(layer, scheme).runnable(scheme.activations)
    return replace(quantized, cache_scales=layer.cache_scales) if scheme.kv_cache.quantized else quantized


def quantize_linear(layer: SmoothedLayer, role: str, weight: Tensor, precision: Precision) -> QuantizedLinear:
    """One quantized linear of a smoothed layer: as a plan has rounded it, or else rounded to nearest. weight:
    `layer.weight(role)`. precision: the weight's precision."""
    planned, bias = layer.rounded.get(role), layer.bias(role)
    if planned is None:
        quantized, scale = quantize_weight(layer.edited(role, weight, precision), precision)
    else:
        quantized, scale = planned.weight, planned.weight_scale
        bias = bias if planned.bias is None else planned.bias
    return QuantizedLinear(
        name=layer.model.linear(layer.index, role),
        weight=quantized,
        weight_scale=scale,
        input_scale=input_scale(layer.input_absmax[role]) if role in layer.input_absmax else None,
        bias=bias,
        smoothing_scale=layer.column.get(role),
        smoother=layer.smoother.get(role),
    )


class QuantizingLayer:
    """A smoothed layer that the decoder runs in float, quantized on the way: each weight is computed once for both.

    weights: the precision of weights. kept: the module names of linears that stay in float.
    """

    def __init__(
        self, layer: SmoothedLayer, weights: Precision = PER_TOKEN.weights, kept: Collection[str] = ()
    ) -> None:
        self.layer, self.index, self.norms, self.weights = layer, layer.index, layer.norms, weights
        model = layer.model
        self._roles = [role for role in model.quantized_roles if model.linear(layer.index, role) not in kept]
        self._linears: dict[str, QuantizedLinear] = {}

    def linear(self, role: str, x: Tensor) -> Tensor:
        weight = self.layer.weight(role)
        if role in self._roles:
            self._linears[role] = self._quantize(role, weight)
        return float_linear(self.layer.divided(role, x), weight, self.layer.bias(role))

    def cached(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values

    def quantized(self) -> QuantizedLayer:
        """The quantized layer. Linears that the decoder did not run (experts without a token) are done now."""
        layer = self.layer
        linears = {role: self._linears.get(role) or self._quantize(role, layer.weight(role)) for role in self._roles}
        in_float = [role for role in layer.source.weights if role not in linears]
        weights = {role: layer.weight(role) for role in in_float}
        biases = {role: bias for role in in_float if (bias := layer.bias(role)) is not None}
        return QuantizedLayer(layer.index, linears, weights, layer.norms, layer.smoother, biases)

    def _quantize(self, role: str, weight: Tensor) -> QuantizedLinear:
        return quantize_linear(self.layer, role, weight, self.weights)
