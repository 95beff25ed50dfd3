"""Which linears a plan keeps in float, and what each share of the bytes buys.

Linears that read one input stay together. They go by the noise that they put on the residual stream, per byte, as the
search measured it. The curve is measured: tokens kept apart go through the model with as many of them in float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from act_scales.search.outcome import Distance, distance
from act_scales.search.passes import Target, runnable
from smoothquant.artifacts.plan import LinearChoice
from smoothquant.fold import SmoothedLayer
from smoothquant.model import Model
from smoothquant.scheme import Scheme
from smoothquant.sensitivity import SharedInput, quantized_inputs
from smoothquant.static import worth


def shared_inputs(model: Model, linears: Sequence[LinearChoice]) -> tuple[SharedInput, ...]:
    """All inputs of a plan's linears, in order, with what their linears lose."""
    by_name = {one.name: one for one in linears}
    found = []
    for layer in range(model.geometry.layers):
        for roles in quantized_inputs(model):
            names = tuple(dict.fromkeys(model.linear(layer, role) for role in roles))
            mine = [by_name[name] for name in names]
            found.append(SharedInput(names, sum(one.numbers for one in mine), sum(one.loss for one in mine)))
    return tuple(found)
