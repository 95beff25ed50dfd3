"""Mean squares of the inputs: for each linear, how large every channel is on an ordinary token.

    v_j = sum_t w_t x_tj^2 / sum_t w_t        w_t = 1 / sum_j x_tj^2        t: tokens, j: channels

Each token weighs as much as every other. In the plain mean, a token whose spikes make it thousands of times as large
as its neighbours would stand for them all, and its own signal would hide that their values are rounded to nothing: of
SmolLM2-135M's down_proj in layer 11 (alpha .85), the noise is -10 dB on an ordinary token, -40 dB in the plain mean. A
token of zeros says nothing, and counts nothing.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from smoothquant.layers import FloatLayer, Layer
from smoothquant.listener import Listener
from smoothquant.model import Model
from smoothquant.roles import ROUTER
from smoothquant.team import Team

LARGEST = 1e15
TOGETHER = 128  # tokens whose squares are in memory


class MeanSquares(Listener):
    """The mean squares of all inputs, over all tokens that the layers are given.

    found: module name of a linear -> float32 (in,). Those of an expert that no token reached are 0. Sums over a few
    tokens are in float32, and over more in float64.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.found = {name: torch.zeros(columns) for name, (_, columns) in model.linears()}

    def enter(self, source: FloatLayer) -> dict[str, Layer]:
        self._index = source.index
        self._sums: dict[str, Tensor] = {}  # role -> float64 (channels + 1,): the weighted squares, and the weights
        self._last: tuple[Tensor, Tensor] | None = None  # an input and its sums: q, k and v are given the same one
        return {}

    def listen(self, role: str, x: Tensor, y: Tensor) -> None:
        if role == ROUTER:
            return
        if self._last is None or self._last[0] is not x:
            self._last = (x, _weighted(x.flatten(0, -2)))
        sums = self._last[1]
        self._sums[role] = self._sums[role] + sums if role in self._sums else sums

    def merge(self, team: Team) -> None:
        self._sums = team.total(self._sums)

    def leave(self) -> None:
        self._last = None
        for name, roles in self.model.stored.items():
            for sums in [self._sums.pop(role) for role in roles if role in self._sums][:1]:  # one and the same
                if sums[-1] > 0:
                    self.found[self.model.family.module(self._index, name)].copy_(sums[:-1] / sums[-1])

    @property
    def leftover(self) -> Collection[str]:
        return self._sums.keys()

    def state(self) -> dict[str, Tensor]:
        return self.found

    def restore(self, state: dict[str, Tensor]) -> None:
        for name, values in self.found.items():
            values.copy_(state.pop(name))


def _weighted(x: Tensor) -> Tensor:
    """The weighted squares of every channel, and behind them the sum of the weights: float64 (channels + 1,).

    x: (tokens, channels). Values beyond LARGEST count as LARGEST, whose squares float32 can sum.
    """
    sums = torch.zeros(x.shape[1] + 1, dtype=torch.float64, device=x.device)
    for some in x.split(TOGETHER):
        squares = some.float().clamp(-LARGEST, LARGEST).square()
        energy = squares.sum(dim=1)
        weights = torch.where(energy > 0, 1 / energy, 0)
        sums += torch.cat([weights @ squares, weights.sum()[None]])
    return sums
