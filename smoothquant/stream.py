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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from smoothquant import kv_cache
from smoothquant.choose import choose_scales
from smoothquant.errors import ActScalesError
from smoothquant.fold import SmoothedLayer, fold
from smoothquant.layers import FloatLayer, W8A8Layer, float_layer, sliced_linear
from smoothquant.memory import UNLIMITED, Budget
from smoothquant.model import Model
from smoothquant.norms import Norm
from smoothquant.plan import Plan, PlannedLayer
from smoothquant.quantization import absmax, input_scale, quantize_rows, quantize_weight, row_scales
from smoothquant.ranges import check_act_scales, input_ranges, output_ranges
from smoothquant.scheme import PER_TOKEN, WEIGHTS, Precision, Scheme
from smoothquant.settings import SmoothingSettings
from smoothquant.slices import Part
from smoothquant.steps import DEFAULT, Step, run_steps


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized linear.

    name: its module name in the checkpoint, which linears of one matrix share. weight: int8 (out, in); where its rows
    were handed over one after another, a tensor of this shape on the device "meta", which holds no numbers.
    weight_scale: float32 (out,), > 0. input_scale: a float32 scalar > 0, for static activations; None without act
    scales. bias: float32 (out,), or None. smoothing_scale: float32 (in,); None if the input is not smoothed. smoother:
    the smoothing_scale if the engine divides the input by it, or else None.
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
    budget: Budget = UNLIMITED,
) -> Iterator[SmoothedLayer]:
    """Yield the smoothed layers from `start` on.

    input_absmax: the input maxima of every linear, float32 (in,), by module name. Without smoothing and static scales
    (groups "none", per token) it may be None. output_absmax: the known output maxima, float32 (out,), by module name.
    steps: the steps between smoothing and storing. plan: what a search has chosen, with `settings`.
    budget: what may be in memory.
    Raises the errors of `check_scales`, and CheckpointError for NaN and Inf.
    """
    check_scales(model, input_absmax, settings)
    for index in range(start, model.geometry.layers):
        source = float_layer(model, index, numbers=budget.numbers)
        yield smooth_layer(model, index, input_absmax or {}, settings, output_absmax or {}, steps, source, plan)


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
    kept = [role for role in layer.source.weights if _in_float(layer, role, scheme)]
    roles = [role for role in layer.model.quantized_roles if role not in kept]
    return QuantizedLayer(
        layer.index,
        {role: quantize_linear(layer, role, layer.weight(role), scheme.weights) for role in roles},
        {role: layer.weight(role) for role in kept},
        layer.norms,
        layer.smoother,
        {role: bias for role in kept if (bias := layer.bias(role)) is not None},
    )


def runnable(layer: SmoothedLayer, scheme: Scheme) -> W8A8Layer:
    """The layer in a scheme's arithmetic, for the decoder, with its 8-bit cache if the scheme has one."""
    quantized = quantize_layer(layer, scheme).runnable(scheme.activations)
    return replace(quantized, cache_scales=layer.cache_scales) if scheme.kv_cache.quantized else quantized


def quantize_linear(layer: SmoothedLayer, role: str, weight: Tensor, precision: Precision) -> QuantizedLinear:
    """One quantized linear of a smoothed layer: as a plan has rounded it, or else rounded to nearest. weight:
    `layer.weight(role)`. precision: the weight's precision."""
    planned = layer.rounded.get(role)
    if planned is None:
        return _linear(layer, role, *quantize_weight(layer.edited(role, weight, precision), precision))
    return _linear(layer, role, planned.weight, planned.weight_scale)


def _linear(layer: SmoothedLayer, role: str, weight: Tensor, weight_scale: Tensor) -> QuantizedLinear:
    planned, bias = layer.rounded.get(role), layer.bias(role)
    if planned is not None and planned.bias is not None:
        bias = planned.bias
    return QuantizedLinear(
        name=layer.model.linear(layer.index, role),
        weight=weight,
        weight_scale=weight_scale,
        input_scale=input_scale(layer.input_absmax[role]) if role in layer.input_absmax else None,
        bias=bias,
        smoothing_scale=layer.column.get(role),
        smoother=layer.smoother.get(role),
    )


def _in_float(layer: SmoothedLayer, role: str, scheme: Scheme) -> bool:
    return role not in layer.model.quantized_roles or layer.model.linear(layer.index, role) in scheme.float_linears


class MeasuredLayer:
    """A stored layer that the decoder runs, whose columns are measured on the way (`FloatLayer.column_absmax`)."""

    def __init__(self, source: FloatLayer) -> None:
        self.source, self.index, self.norms = source, source.index, source.norms

    def linear(self, role: str, x: Tensor) -> Tensor:
        source = self.source
        return sliced_linear(x, source.rows(role), source.measuring(role), source.biases.get(role))

    def cached(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values


@dataclass(frozen=True)
class WeightRows:
    """Some rows of a linear's smoothed weight. rows: which. weight: float32 (rows, in). int8: the same rounded, int8
    (rows, in), by the precision of weights; empty for a linear that is never quantized."""

    role: str
    rows: slice
    weight: Tensor
    int8: Mapping[Precision, Tensor]


class QuantizingLayer:
    """A smoothed layer that the decoder runs in float, quantized on the way: each weight is computed once for both, and
    handed over some rows at a time.

    weights: the precisions of weights. hand: is given all rows of all linears.
    """

    def __init__(self, layer: SmoothedLayer, weights: Sequence[Precision], hand: Callable[[WeightRows], None]) -> None:
        self.layer, self.index, self.norms, self.weights, self._hand = layer, layer.index, layer.norms, weights, hand
        self._scales: dict[str, dict[Precision, list[Tensor]]] = {}  # role -> the scales of the rows so far

    def linear(self, role: str, x: Tensor) -> Tensor:
        x, bias = self.layer.divided(role, x), self.layer.bias(role)
        return sliced_linear(x, self.layer.source.rows(role), self._handed(role), bias)

    def cached(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values

    def rest(self) -> dict[Precision, QuantizedLayer]:
        """What was handed over, in each precision, without the weights. Linears that the decoder did not run (experts
        without a token) are handed over now."""
        layer = self.layer
        for role in layer.source.weights:
            for _ in self._handed(role) if role not in self._scales else ():
                pass
        found = {}
        for precision in self.weights:
            linears = {}
            for role in layer.model.quantized_roles:
                shape = layer.model.family.shape(role, layer.model.geometry)
                weight = torch.empty(shape, dtype=torch.int8, device="meta")
                linears[role] = _linear(layer, role, weight, torch.cat(self._scales[role][precision]))
            found[precision] = QuantizedLayer(layer.index, linears, {}, layer.norms, layer.smoother)
        return found

    def _handed(self, role: str) -> Iterator[Part]:
        """The weight, some rows at a time, each of which was handed over."""
        layer = self.layer
        precisions = self.weights if role in layer.model.quantized_roles else ()
        self._scales[role] = {precision: [] for precision in precisions}
        scales = {precision: _scale_of_all(layer, role, precision) for precision in precisions}
        planned = layer.rounded.get(role)
        for rows, weight in layer.parts(role):
            int8 = {}
            for precision, all_rows in scales.items():
                edited = layer.edited(role, weight, precision)
                scale = row_scales(absmax(edited, dim=1), precision) if all_rows is None else all_rows[rows]
                int8[precision] = quantize_rows(edited, scale) if planned is None else planned.weight[rows]
                self._scales[role][precision].append(scale)
            self._hand(WeightRows(role, rows, weight, int8))
            yield rows, weight


def _scale_of_all(layer: SmoothedLayer, role: str, precision: Precision) -> Tensor | None:
    """The weight_scale of all rows, float32 (out,), where one row does not tell its own; None where it does."""
    planned = layer.rounded.get(role)
    if planned is not None:
        return planned.weight_scale
    if precision == WEIGHTS["per-channel"]:
        return None
    reach = [absmax(layer.edited(role, part, precision), dim=1) for _, part in layer.parts(role)]
    return row_scales(torch.cat(reach), precision)
