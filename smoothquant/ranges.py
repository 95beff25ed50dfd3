"""Find the calibrated ranges of a layer by role. The act scales file has them by module name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from smoothquant.errors import ActScalesError
from smoothquant.model import Model
from smoothquant.roles import ROUTER


def check_act_scales(model: Model, input_absmax: Mapping[str, Tensor]) -> None:
    """Raise ActScalesError unless there is one finite, non-negative scale vector for every linear and no other."""
    calibrate = "calibrate this model: smoothquant calibrate MODEL --text FILE --out SCALES"
    linears = dict(model.linears())
    for name, (_, columns) in linears.items():
        if name not in input_absmax:
            raise ActScalesError(f"no activation scales for {name}", expected=f"one of shape [{columns}]", do=calibrate)
        found = input_absmax[name]
        if tuple(found.shape) != (columns,):
            raise ActScalesError(
                f"activation scales of {name} have shape {list(found.shape)}", expected=f"[{columns}]", do=calibrate
            )
        if not found.isfinite().all() or (found < 0).any():
            raise ActScalesError(f"activation scales of {name} are not finite and >= 0", do=calibrate)
    for name in sorted(input_absmax.keys() - linears.keys()):
        raise ActScalesError(f"activation scales for {name}, which this model does not have", do=calibrate)


def input_ranges(model: Model, index: int, input_absmax: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The input ranges of the linears with scales, float32 (in,), by role.

    Linears with the same input share one range, the larger if imported scales differ. So do experts, each of which saw
    some of the tokens, and their router.
    """
    names = {role: model.linear(index, role) for role in model.quantized_roles}
    act = {role: input_absmax[name].float() for role, name in names.items() if name in input_absmax}
    for group in model.groups:
        known = [act[role] for role in group.linears if role in act]
        if known:
            act |= dict.fromkeys(group.linears, torch.stack(known).amax(dim=0))
    return act


def output_ranges(model: Model, index: int, output_absmax: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The known output ranges of linears, float32 (out,), by role."""
    found: dict[str, Tensor] = {}
    for name, roles in model.stored.items():
        full = model.family.module(index, name)
        if full in output_absmax and roles != (ROUTER,):
            found |= model.split(name, output_absmax[full].float())
    return found
