"""Which linears one static scale would ruin, by their act scales.

A static scale spends its 127 steps on the largest channel. With m_j = max |x_j| and channels whose values are about
m_j / 4 in the mean square, the channel of median range has a signal-to-noise ratio of

    (m / 4) / (M / 127 / sqrt(12))  =  110 m / M            m: median, M: largest of the channels' ranges

which falls below 10 dB (an error of a third of the signal) where M / m exceeds 34. Such an input is left in float: it
is typically that of a few down_proj, whose spikes no fold can reach, and costs little where it is rare.

What smoothing leaves of a range is m_j / s_j, about m_j^(1 - alpha) by the equation for s_j: the weights, which differ
far less from channel to channel, are not read for this. (`tests/benchmarks/onnx_forms.py`: of a model with two spiking
down_proj these two are found, and the KL of its static form falls from 0.56 to 0.004; without spikes none is.)
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.roles import ROUTER, parsed
from smoothquant.settings import SmoothingSettings

LIMIT = 34.0  # largest range of a channel over the median one


def spread(act_absmax: Tensor) -> float:
    """Largest channel over the median of those that move. act_absmax: (in,) >= 0; 1 where nothing moves."""
    moving = act_absmax[act_absmax > 0]
    return (moving.max() / moving.median()).item() if len(moving) else 1.0


def ruined_linears(model: Model, input_absmax: Mapping[str, Tensor], settings: SmoothingSettings) -> tuple[str, ...]:
    """Module names, in order, of the linears whose smoothed input is wider than `LIMIT`. Linears that read one input
    are named together. input_absmax: every linear's, unsmoothed."""
    smoothed = {role for group in settings.chosen(model.groups, model.quantized_roles) for role in group.linears}
    found = []
    for layer in range(model.geometry.layers):
        for roles in _quantized(model):
            width = max(spread(input_absmax[model.linear(layer, role)]) for role in roles)
            if width ** (1 - settings.alpha if roles[0] in smoothed else 1) > LIMIT:
                found += [model.linear(layer, role) for role in roles]
    return tuple(dict.fromkeys(found))


def _quantized(model: Model) -> list[tuple[str, ...]]:
    """`Model.inputs` without routers."""
    return [tuple(role for role in roles if role != ROUTER) for roles in model.inputs]


def linears_to_keep(
    choice: str, model: Model, input_absmax: Mapping[str, Tensor] | None, settings: SmoothingSettings
) -> tuple[str, ...]:
    """What a user asks for: "auto" is `ruined_linears`, "none" none, else roles, as in "down" or "o,down".

    Raises UserError for a role that the model does not have.
    """
    if choice == "none" or input_absmax is None:
        return ()
    if choice == "auto":
        return ruined_linears(model, input_absmax, settings)
    kinds, asked = {parsed(role).kind for role in model.quantized_roles}, choice.split(",")
    for role in asked:
        if role not in kinds:
            raise UserError(
                f"linears {role!r} to keep in float", expected=f"auto, none, or of {', '.join(sorted(kinds))}"
            )
    groups = [roles for roles in _quantized(model) if any(parsed(role).kind in asked for role in roles)]
    names = (model.linear(layer, role) for layer in range(model.geometry.layers) for roles in groups for role in roles)
    return tuple(dict.fromkeys(names))
