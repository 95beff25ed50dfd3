"""What an export says of its smoothing, in the tensors of `smoothquant.artifacts.smoothing_file`."""

from __future__ import annotations

from torch import Tensor

from smoothquant.artifacts.ports import CACHED, KEY
from smoothquant.artifacts.smoothing_file import SCALE, tensors
from smoothquant.head import PlannedHead
from smoothquant.model import Model
from smoothquant.stream import SmoothedLayer


def explain_head(model: Model, head: PlannedHead) -> dict[str, Tensor]:
    """What is said of the output head: nothing where it is in float."""
    return {name: tensor for name, tensor in head.tensors(model).items() if name.endswith(SCALE)}


def explain_layer(model: Model, layer: SmoothedLayer) -> dict[str, Tensor]:
    """What is said of a layer: its scales, and the ranges behind static ones."""
    scales = {model.linear(layer.index, role): scale for role, scale in layer.column.items()}
    keys = {} if layer.keys is None else {model.family.module(layer.index, KEY): layer.keys}
    return tensors(
        smoothing_scale=scales | keys,
        input_absmax={model.linear(layer.index, role): absmax for role, absmax in layer.input_absmax.items()},
        cache_scale={
            model.family.module(layer.index, part): scale
            for part, scale in zip(CACHED, layer.cache_scales or (), strict=False)
        },
    )
