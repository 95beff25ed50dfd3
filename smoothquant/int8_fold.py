"""Fold the pre_quant_scale of an INT8 folder's linears into what lies before them, by the folds of the family.

An engine that knows it multiplies the input of a linear by its pre_quant_scale p, channel by channel. Others have no
place for it. So what gives that input is multiplied instead, without a change of any int8 number:

    a norm              its weight (and bias), rounded to its dtype; whatever else reads it in float gets columns / p
    v, up, fc1          weight_scale of its rows (and bias), by p of the linear that it feeds

That is `smoothquant.fold` with the scale 1 / p. It needs one p for all int8 linears that read one input, and for o one
p for all query heads of a kv head. Where it is not so, the linear is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from smoothquant.errors import CheckpointError
from smoothquant.family import SmoothingGroup
from smoothquant.fold import Scales, SmoothedLayer, fold
from smoothquant.int8_model import Int8Model
from smoothquant.norms import Norm
from smoothquant.settings import SmoothingSettings
from smoothquant.smoothing import repeat_over_query_heads, share_over_query_heads

EVERY_FOLD = SmoothingSettings()
LOSS = 2.0**-8  # of a folded norm's weight, by rounding: that of bfloat16, the coarsest dtype of norms
DO = "an engine that multiplies inputs itself takes the folder as it is (TensorRT Edge-LLM); or quantize anew"


def fold_layer(source: Int8Model, index: int) -> SmoothedLayer:
    """One layer with every pre_quant_scale folded. Its source holds the weights of float linears alone.

    Raises CheckpointError, which names the linear, for a pre_quant_scale that cannot be folded.
    """
    model, stored = source.model, source.float_part(index)
    layer = fold(model, index, stored, EVERY_FOLD, Scales(_columns(source, index, set(stored.weights)), {}))
    for group in model.groups:
        scale = layer.column.get(group.linears[0])
        if group.through == "norm" and scale is not None:
            where = f"{model.checkpoint.folder}: {model.norm(index, group.source)}"
            _check_norm(where, stored.norms[group.source], layer.norms[group.source], scale)
    return layer


def _columns(source: Int8Model, index: int, in_float: set[str]) -> dict[str, Tensor]:
    """1 / p for each role whose input is multiplied by p, float32 (in,)."""
    model = source.model
    factors = {
        role: factor
        for role in model.quantized_roles
        if role not in in_float and (factor := source.pre_quant_scale(model.linear(index, role))) is not None
    }
    columns: dict[str, Tensor] = {}
    for group in EVERY_FOLD.chosen(model.groups, model.quantized_roles):
        int8 = [role for role in group.linears if role not in in_float]
        if any(role in factors for role in int8):
            _check_group(source, index, group, int8, factors)
            columns |= dict.fromkeys(group.linears, 1 / factors[int8[0]])
    for role in factors:
        if role not in columns:
            raise CheckpointError(
                f"{model.linear(index, role)} has a pre_quant_scale, and nothing before it can take that",
                expected="a linear behind a norm, or behind a product that a fold passes through",
                do=DO,
            )
    return columns


def _check_group(
    source: Int8Model, index: int, group: SmoothingGroup, int8: list[str], factors: Mapping[str, Tensor]
) -> None:
    """Raise CheckpointError unless the int8 linears of a group have one pre_quant_scale, and one that folds."""
    model, geometry = source.model, source.model.geometry
    first = factors.get(int8[0])
    for role in int8[1:]:
        other = factors.get(role)
        if first is None or other is None or not torch.equal(first, other):
            raise CheckpointError(
                f"{model.linear(index, int8[0])} and {model.linear(index, role)} read one input, and multiply it by "
                "different pre_quant_scales",
                expected="one for all linears that read one input",
                do=DO,
            )
    assert first is not None  # one of them has one, so all have
    if group.through == "attention":
        shared = share_over_query_heads(first, geometry.kv_heads, geometry.head_dim)
        repeated = repeat_over_query_heads(shared, geometry.heads, geometry.kv_heads, geometry.head_dim)
        if not torch.equal(repeated, first):
            raise CheckpointError(
                f"{model.linear(index, int8[0])} has a pre_quant_scale that differs between query heads of one kv head",
                expected="the same channels for all of them, since they share one v",
                do=DO,
            )


def _check_norm(where: str, before: Norm, after: Norm, scale: Tensor) -> None:
    """Raise CheckpointError if the dtype of a norm cannot hold what was folded into it. scale: 1 / p."""
    exact = before.gain.float() / scale
    if not ((after.gain.float() - exact).abs() <= LOSS * exact.abs()).all():
        raise CheckpointError(
            f"{where}: {before.weight.dtype} cannot hold its weight times the pre_quant_scale of what reads it",
            expected=f"a product that rounds by at most {LOSS:.1%}",
            do=DO,
        )
