"""Choose the scales that smooth a layer: the paper's equation for every group, as far as each fold can hold it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from smoothquant import kv_cache, smoothing
from smoothquant.family import SmoothingGroup
from smoothquant.fold import Scales
from smoothquant.layers import FloatLayer
from smoothquant.model import Model
from smoothquant.norms import Norm
from smoothquant.settings import SmoothingSettings


def choose_scales(
    model: Model,
    index: int,
    source: FloatLayer,
    act: Mapping[str, Tensor],
    output: Mapping[str, Tensor],
    settings: SmoothingSettings,
) -> Scales:
    """The scales of a layer.

    act: for each role the calibrated maxima of its input before smoothing, float32 (in,). output: for each role those
    of its output, float32 (out,).
    """
    scales = {
        group: smoothing.smoothing_scale(*group_ranges(model, source, act, group), settings.alpha_of(group))
        for group in settings.chosen(model.groups, model.quantized_roles)
    }
    return held(model, index, source, act, output, settings, scales)


def group_ranges(
    model: Model, source: FloatLayer, act: Mapping[str, Tensor], group: SmoothingGroup
) -> tuple[Tensor, Tensor]:
    """The maxima of a group's input and of its linears' weights, float32, for the channels of its source: the paper's
    equation makes a scale from them. act: as in `choose_scales`."""
    columns = [source.column_absmax(role) for role in group.linears]
    weight_absmax = torch.stack(columns).amax(dim=0)
    return shared(model, group, act[group.linears[0]]), shared(model, group, weight_absmax)


def held(
    model: Model,
    index: int,
    source: FloatLayer,
    act: Mapping[str, Tensor],
    output: Mapping[str, Tensor],
    settings: SmoothingSettings,
    wanted: Mapping[SmoothingGroup, Tensor],
) -> Scales:
    """The scales of a layer as its folds can hold them. wanted: for each group to smooth its scale, for the channels of
    its source. The other arguments are those of `choose_scales`."""
    column: dict[str, Tensor] = {}
    norms: dict[str, Norm] = {}
    reach_of_keys = kv_cache.key_reach(model.geometry, index, source.norms, output)
    keys = None
    if settings.smooths_keys and reach_of_keys is not None:
        keys = kv_cache.key_divisor(source.norms, reach_of_keys)
    for group, scale in wanted.items():
        reach = act[group.linears[0]]
        if group.through == "norm":
            if settings.groups != "paper":
                scale = smoothing.skip_dead_channels(scale, reach)
            scale, norms[group.source] = source.norms[group.source].fold(scale)
        elif group.through == "run-time":
            hold = smoothing.as_factor if settings.groups == "unfolded" else smoothing.as_divisor
            scale = hold(smoothing.skip_dead_channels(scale, reach), getattr(torch, settings.smoother_dtype))
        else:
            scale = smoothing.skip_dead_channels(scale, shared(model, group, reach))
            if group.through == "attention" and settings.cache == "shared" and reach_of_keys is not None:
                furthest = (reach_of_keys if keys is None else reach_of_keys / keys).amax()
                scale = kv_cache.match(scale, output["v"], furthest)
            scale = spread(model, group, scale)
        column |= dict.fromkeys(group.linears, scale)
    smoothed = {role: reach / column[role] if role in column else reach for role, reach in act.items()}
    return Scales(column, smoothed, norms, keys)


def shared(model: Model, group: SmoothingGroup, values: Tensor) -> Tensor:
    """Values of the channels of a group's source, from values of the channels of its input."""
    if group.through != "attention":
        return values
    return smoothing.share_over_query_heads(values, model.geometry.kv_heads, model.geometry.head_dim)


def spread(model: Model, group: SmoothingGroup, values: Tensor) -> Tensor:
    """Values of the channels of a group's input, from values of the channels of its source."""
    if group.through != "attention":
        return values
    geometry = model.geometry
    return smoothing.repeat_over_query_heads(values, geometry.heads, geometry.kv_heads, geometry.head_dim)
