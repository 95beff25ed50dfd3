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
from smoothquant.quantization import absmax
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
    column: dict[str, Tensor] = {}
    norms: dict[str, Norm] = {}
    for group in settings.chosen(model.groups, model.quantized_roles):
        reach = act[group.linears[0]]
        scale = _group_scale(model, source, act, group, settings)
        if group.through == "norm":
            if settings.groups != "paper":
                scale = smoothing.skip_dead_channels(scale, reach)
            scale, norms[group.source] = source.norms[group.source].fold(scale)
        elif group.through == "run-time":
            hold = smoothing.as_factor if settings.groups == "unfolded" else smoothing.as_divisor
            scale = hold(smoothing.skip_dead_channels(scale, reach), getattr(torch, settings.smoother_dtype))
        else:
            scale = smoothing.skip_dead_channels(scale, _shared(model, group, reach))
            if group.through == "attention" and settings.shared_cache_scale:
                scale = kv_cache.match(scale, output["v"], kv_cache.key_absmax(output["k"], model.geometry, index))
            scale = _spread(model, group, scale)
        column |= dict.fromkeys(group.linears, scale)
    smoothed = {role: reach / column[role] if role in column else reach for role, reach in act.items()}
    return Scales(column, smoothed, norms)


def _group_scale(
    model: Model, source: FloatLayer, act: Mapping[str, Tensor], group: SmoothingGroup, settings: SmoothingSettings
) -> Tensor:
    columns = [absmax(source.weights[role], dim=0).float() for role in group.linears]
    weight_absmax = _shared(model, group, torch.stack(columns).amax(dim=0))
    return smoothing.smoothing_scale(
        _shared(model, group, act[group.linears[0]]), weight_absmax, settings.alpha_of(group)
    )


def _shared(model: Model, group: SmoothingGroup, values: Tensor) -> Tensor:
    """Values of the channels of a group's source, from values of the channels of its input."""
    if group.through != "attention":
        return values
    return smoothing.share_over_query_heads(values, model.geometry.kv_heads, model.geometry.head_dim)


def _spread(model: Model, group: SmoothingGroup, values: Tensor) -> Tensor:
    """Values of the channels of a group's input, from values of the channels of its source."""
    if group.through != "attention":
        return values
    geometry = model.geometry
    return smoothing.repeat_over_query_heads(values, geometry.heads, geometry.kv_heads, geometry.head_dim)
