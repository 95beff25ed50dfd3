"""Where the numbers of every planned tensor come from: layers as they are smoothed and quantized, or the checkpoint.

a linear's tensors     weight (float), or weight_int8 and weight_scale, input_scale if static; bias
a norm's               weight, and bias of layer norms
outside the layers     tables, projections and the output head, read some rows at a time
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

import torch
from torch import Tensor

from exporters.onnx.external_data import Content, WeightContent
from smoothquant.artifacts.ports import CACHED
from smoothquant.head import UNPLANNED, PlannedHead
from smoothquant.model import Model
from smoothquant.norms import Norm
from smoothquant.roles import ROUTER
from smoothquant.scheme import Precision
from smoothquant.stream import QuantizedLayer, SmoothedLayer

Contents = Mapping[str, Content | WeightContent]  # kind of tensor, the end of its name -> content


def of_linears(model: Model, layer: int, roles: tuple[str, ...], weights: Precision, kept: bool) -> Contents:
    """Of linears side by side in one matrix (in, out); without a bias if none of them has one. kept: whether they stay
    in float in a quantized graph. weights: the precision of those that do not."""
    family, geometry = model.family, model.geometry

    rows = {role: family.shape(role, geometry)[0] for role in roles}
    starts = dict(zip(roles, accumulate(rows.values(), initial=0), strict=False))

    def weight_scale(_: SmoothedLayer, quantized: QuantizedLayer) -> Iterator[Tensor]:
        return (quantized.linears[role].weight_scale for role in roles)

    def input_scale(_: SmoothedLayer, quantized: QuantizedLayer) -> Iterator[Tensor]:
        scale = quantized.linears[roles[0]].input_scale  # one input, one scale
        assert scale is not None  # the writer's `check` has seen to it
        yield scale

    def bias(smoothed: SmoothedLayer, quantized: QuantizedLayer | None) -> Iterator[Tensor]:
        for role in roles:
            found = quantized.linears[role].bias if quantized is not None and not kept else smoothed.bias(role)
            yield torch.zeros(rows[role]) if found is None else found

    contents: dict[str, Content | WeightContent] = {
        "weight": WeightContent(layer, lambda found: found.weight, starts),
        "weight_int8": WeightContent(layer, lambda found: found.int8[weights], starts),
        "weight_scale": Content(weight_scale, layer),
        "input_scale": Content(input_scale, layer),
    }
    if any(family.has_bias(role, geometry) for role in roles):
        contents["bias"] = Content(bias, layer)
    return contents


def of_router(layer: int) -> WeightContent:
    """Of the linear that chooses a layer's experts, (in, out)."""
    return WeightContent(layer, lambda found: found.weight, {ROUTER: 0})


def of_cache_scale(layer: int, part: str) -> Content:
    """Of the scale of an INT8 cache. part: of `CACHED`."""
    return Content(lambda smoothed, _: [smoothed.cache_scales[CACHED.index(part)]], layer)


def of_norm(layer: int, role: str) -> Contents:
    """Of a layer's norm."""
    return {
        "weight": Content(lambda smoothed, _: [smoothed.norms[role].gain], layer),
        "bias": Content(lambda smoothed, _: [_bias(smoothed.norms[role])], layer),
    }


def of_outer_norm(model: Model, name: str, head: PlannedHead = UNPLANNED) -> Contents:
    """Of a norm outside the layers. name: of its module. head: the one that reads it, if one does."""

    def norm() -> Norm:
        return head.norm(model) or model.norm_at(name)

    return {"weight": Content(lambda: [norm().gain]), "bias": Content(lambda: [_bias(norm())])}


def of_table(model: Model, name: str) -> Content:
    """Of a tensor of the checkpoint, as it lies there."""
    return Content(lambda: model.rows(name))


def of_outer_linear(model: Model, name: str) -> Contents:
    """Of a linear outside the layers that stays in float, without a bias. name: of its weight in the checkpoint."""
    return {"weight": Content(lambda: model.rows(name), transposed=True)}


def of_divisor(scale: Tensor) -> Content:
    """Of what the rows of an embedding are divided by, float32 (channels,)."""
    return Content(lambda: [scale])


def of_int8_head(model: Model, head: PlannedHead) -> Contents:
    """Of the output head in INT8."""
    return of_int8_table(lambda: head.int8_rows(model), transposed=True)


def of_int8_table(rows: Callable[[], Iterator[tuple[Tensor, Tensor]]], transposed: bool = False) -> Contents:
    """Of a matrix in INT8 outside the layers. rows: gives some of its rows at a time, and their scale. transposed: it
    is stored as (in, out)."""
    scales: list[Tensor] = []

    def weight_int8() -> Iterator[Tensor]:
        scales.clear()
        for weight, scale in rows():
            scales.append(scale)
            yield weight

    return {
        "weight_int8": Content(weight_int8, transposed=transposed),
        "weight_scale": Content(lambda: scales),  # planned, and so written, behind the weight: read once
    }


def _bias(norm: Norm) -> Tensor:
    assert norm.bias is not None  # a layer norm has one
    return norm.bias
