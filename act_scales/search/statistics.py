"""What a search hears of a layer: of every input its second moments and some tokens.

The inputs come from the layers before as they will be stored; the layer itself is still in float.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from smoothquant.layers import FloatLayer, Layer
from smoothquant.listener import Listener
from smoothquant.model import Model
from smoothquant.roles import ROUTER
from smoothquant.rounding import Hessian
from smoothquant.sensitivity import quantized_inputs
from smoothquant.team import Team

SAMPLE = 512  # tokens of each input that are kept as they are
LEAST = 1e-6  # of the mean square of an output: tokens with less count as much as those with this


@dataclass
class Heard:
    """One input, of one or several linears.

    moments: of all tokens; None where nobody asked. parts: sampled tokens, float32 (tokens, in) each. squares: for each
    part by role, the mean squares of their outputs, summed over channels, (tokens,); experts hear a part each. sums,
    tokens: by role, those of all tokens together, and how many these were.
    """

    moments: Hessian | None
    parts: list[Tensor] = field(default_factory=list)
    squares: list[dict[str, Tensor]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    @cached_property
    def x(self) -> Tensor:
        """The sampled tokens, float32 (tokens, in), once the layer has been heard."""
        return torch.cat(self.parts) if self.parts else torch.empty(0, 0)

    def energy(self, role: str) -> float:
        """The mean square of a linear's outputs, summed over channels; 0 where no token came."""
        return self.sums.get(role, 0.0) / max(self.tokens.get(role, 0), 1)

    def signal(self, role: str, weight: Tensor) -> float:
        """The same of the sampled tokens that came to the linear, each by what it counts. weight: by `token_weight`."""
        total = counted = 0.0
        for squares, counts in zip(self.squares, weight.split([len(part) for part in self.parts]), strict=True):
            if role in squares:
                total, counted = total + (squares[role] @ counts).item(), counted + counts.sum().item()
        return total / counted if counted else self.energy(role)

    def token_weight(self, roles: Sequence[str]) -> Tensor:
        """How much each sampled token counts, (tokens,), 1 in all: the less, the larger its outputs are."""
        if not self.parts:
            return torch.empty(0)
        weight = 1 / torch.cat([self._relative(place, roles) for place in range(len(self.parts))]).clamp_min(LEAST)
        return weight / weight.sum()

    def _relative(self, place: int, roles: Sequence[str]) -> Tensor:
        """The squares of a part's outputs over their means, (tokens,); 1 where all outputs are 0."""
        squares = self.squares[place]
        known = [squares[role] / self.energy(role) for role in roles if role in squares and self.energy(role)]
        return torch.stack(known).mean(dim=0) if known else torch.ones(len(self.parts[place]))


class Statistics(Listener):
    """The inputs of one layer after another.

    sample: tokens to keep. tokens: of all sequences. width: channels of a Hessian's blocks; 0 for no Hessians.
    device: that of the sweep.
    heard: by the roles that read it, each input of the layer that was heard last. values: of the attention, of its
    sampled tokens, float32 (tokens, kv_size) each.
    """

    def __init__(self, model: Model, tokens: int, width: int, sample: int = SAMPLE, device: str = "cpu") -> None:
        self.model, self.width, self.device = model, width, device
        self._stride = max(1, tokens // sample)
        self._owner = {role: roles for roles in quantized_inputs(model) for role in roles}

    def enter(self, source: FloatLayer) -> Mapping[str, Layer]:
        self.heard: dict[tuple[str, ...], Heard] = {}
        self.values: list[Tensor] = []
        self._inputs: dict[tuple[str, ...], Tensor] = {}  # by the roles that read it, the last one
        return {}

    def listen(self, role: str, x: Tensor, y: Tensor) -> None:
        flat = x.flatten(0, -2)
        if role == ROUTER:
            return
        roles = self._owner[role]
        moments = Hessian(flat.shape[1], self.width, self.device) if self.width and roles not in self.heard else None
        heard = self.heard.setdefault(roles, Heard(moments))
        if self._inputs.get(roles) is not x:
            self._inputs[roles] = x
            if heard.moments:
                heard.moments.add(flat.float())
            heard.parts.append(flat[:: self._stride].float().cpu())
            heard.squares.append({})
        outputs = y.flatten(0, -2).float()
        if role == "v":
            self.values.append(outputs[:: self._stride].cpu())
        squares = torch.linalg.vecdot(outputs, outputs)
        heard.squares[-1][role] = squares[:: self._stride].cpu()
        heard.sums[role] = heard.sums.get(role, 0.0) + squares.double().sum().item()
        heard.tokens[role] = heard.tokens.get(role, 0) + len(squares)

    def merge(self, team: Team) -> None:
        if not team.linked:
            return
        mine = {roles: (one.parts, one.squares, one.sums, one.tokens) for roles, one in self.heard.items()}
        every = team.gathered((mine, self.values))
        self.values = [part for _, values in every for part in values]
        together: dict[tuple[str, ...], Heard] = {}
        for roles in dict.fromkeys(roles for told, _ in every for roles in told):
            found = Heard(self._moments_of_all(roles, team))
            for parts, squares, sums, tokens in (told[roles] for told, _ in every if roles in told):
                found.parts += parts
                found.squares += squares
                for role in sums:
                    found.sums[role] = found.sums.get(role, 0.0) + sums[role]
                    found.tokens[role] = found.tokens.get(role, 0) + tokens[role]
            together[roles] = found
        self.heard = together

    def _moments_of_all(self, roles: tuple[str, ...], team: Team) -> Hessian | None:
        """The moments of an input over the tokens of all ranks."""
        if not self.width:
            return None
        heard = self.heard.get(roles)
        found = heard.moments if heard else None
        if found is None:
            channels = self.model.family.shape(roles[0], self.model.geometry)[1]
            found = Hessian(channels, self.width, self.device)
        found.merge(team)
        return found

    def leave(self) -> None:
        self._inputs = {}
        for heard in self.heard.values():
            if heard.moments:
                heard.moments.to("cpu")

    def input(self, role: str) -> Heard | None:
        """The input of a linear; None if no token came there."""
        return self.heard.get(self._owner[role])
