"""What rounding the linears of each input adds to the KL, measured by one pass backward through the float model.

    KL(p || q)  =  1/2 E_y ( sum over tokens t of  d log p(y) / d o_t  .  e_t )^2           to second order
                =  1/2 E_y sum over t of ( d log p(y) / d o_t  .  e_t )^2                   errors of tokens independent

o_t is the output of a linear for one token, e_t what the W8A8 arithmetic adds to it, and y, the next tokens, are drawn
from the model's own predictions (the Fisher information; Theis et al., 2018, rank channels by it). Errors of linears
that read one input come from the same rounding, so that their products are added before they are squared.

The sum of an error's square over that of the output does not tell what becomes of it behind its layer. On SmolLM2-135M
with static scales, the linears that this names first leave a KL of .0086 with 10 % of the bytes in float, and .0038
with 25 %; those of the largest errors .0116 and .0050. Forward passes with one input rounded at a time name the same
ones, and cost as much as 40 times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor

from act_scales.search.passes import SearchTarget
from smoothquant import decoder
from smoothquant.attention import patterns
from smoothquant.fold import SmoothedLayer
from smoothquant.layers import FloatLayer, Layer, W8A8Layer
from smoothquant.listener import Listener
from smoothquant.model import Model
from smoothquant.roles import ROUTER, parsed
from smoothquant.sensitivity import quantized_inputs
from smoothquant.stream import runnable
from smoothquant.sweep import Sweep
from smoothquant.team import Team

TOKENS = 1024  # of the first sequences; with twice or four times as many, the ranking is the same
ROWS = 256  # of these, whose logits are there at a time
SEED = 0


class Trail(Listener):
    """The inputs of all layers on the first tokens of a sweep: for every layer bfloat16 (sequences, tokens, hidden), a
    tensor for each batch. sequences: how many these are."""

    def __init__(self) -> None:
        self.inputs: list[list[Tensor]] = []
        self._begins = False

    @property
    def sequences(self) -> int:
        return sum(map(len, self.inputs[0]))

    def enter(self, source: FloatLayer) -> Mapping[str, Layer]:
        self.inputs.append([])
        self._begins = True
        return {}

    def residual(self, x: Tensor) -> None:
        kept = self.inputs[-1]
        if self._begins and sum(batch.shape[0] * batch.shape[1] for batch in kept) < TOKENS:
            kept.append(x.to(torch.bfloat16).cpu())
        self._begins = False

    def advance(self, hidden: Mapping[str, Tensor]) -> None:
        self._begins = True

    def merge(self, team: Team) -> None:
        kept: list[Tensor] = []
        for batch in chain(*team.gathered(self.inputs[-1])):
            if sum(one.shape[0] * one.shape[1] for one in kept) < TOKENS:
                kept.append(batch)
        self.inputs[-1] = kept


@torch.enable_grad()
def divergence(
    target: SearchTarget,
    smoothed: Callable[[int], SmoothedLayer],
    trail: Trail,
    reference: Sweep,
    progress: Callable[[int], None],
) -> dict[tuple[str, ...], float]:
    """The KL that each input of a quantized model adds, in nats per token, by the module names of its linears.

    smoothed: makes a layer by the plan. trail: of the float model. reference: its sweep, behind the last layer.
    progress: called with the number of layers done.
    """
    model, device = target.model, target.device
    drawn = torch.Generator().manual_seed(SEED)
    behind = [_slope(model, reference.states(number).to(device), drawn) for number in range(trail.sequences)]
    slopes, start = [], 0
    for batch in trail.inputs[0]:
        slopes.append(torch.stack(behind[start : start + len(batch)]))
        start += len(batch)
    tokens = sum(slope.shape[0] * slope.shape[1] for slope in slopes)
    positions = patterns(model, max(slope.shape[1] for slope in slopes), torch.float32, device)
    found: dict[tuple[str, ...], float] = {}
    for index in reversed(range(model.geometry.layers)):
        layer = smoothed(index)
        errors = _Errors(runnable(layer, target.scheme).to(device))
        felt = replace(layer.in_float().to(device), listen=errors.listen)
        squares = dict.fromkeys(quantized_inputs(model), 0.0)
        for place, batch in enumerate(trail.inputs[index]):
            x = batch.to(device, torch.float32).requires_grad_()
            errors.products.clear()
            decoder.forward(model, felt, x, positions.upto(batch.shape[1])).backward(slopes[place])
            assert x.grad is not None
            slopes[place] = x.grad
            for roles in squares:
                squares[roles] += errors.square(roles)
        for roles, square in squares.items():
            names = tuple(dict.fromkeys(model.linear(index, role) for role in roles))
            found[names] = square / 2 / tokens
        progress(model.geometry.layers - index)
    return found


class _Errors:
    """What one layer's rounding does to log p. products: by role, for each token the product of slope and error."""

    def __init__(self, rounded: W8A8Layer) -> None:
        self._rounded = rounded
        self.products: dict[str, Tensor] = {}

    def listen(self, role: str, x: Tensor, y: Tensor) -> None:
        if role == ROUTER:
            return
        with torch.no_grad():
            error = self._rounded.linear(role, x.detach()) - y.detach()

        def hear(slope: Tensor) -> None:
            self.products[role] = (slope * error).sum(dim=-1)

        y.register_hook(hear)

    def square(self, roles: tuple[str, ...]) -> float:
        """The sum of squares over tokens, for linears that read one input, or experts some of its tokens each."""
        together: dict[int | None, Tensor] = {}
        for role in roles:
            if role in self.products:
                expert, products = parsed(role).expert, self.products[role].double()
                together[expert] = together[expert] + products if expert in together else products
        return sum(products.square().sum().item() for products in together.values())


def _slope(model: Model, hidden: Tensor, drawn: torch.Generator) -> Tensor:
    """d log p(y) / d hidden for tokens y that the model itself would say next, (tokens, hidden)."""
    hidden = hidden.detach().clone().requires_grad_()
    for start in range(0, len(hidden), ROWS):
        log_p = decoder.logits(model, hidden[start : start + ROWS][None])[0].log_softmax(-1)
        y = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=drawn).to(log_p.device)
        log_p.gather(1, y).sum().backward()
    assert hidden.grad is not None
    return hidden.grad
