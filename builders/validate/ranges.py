"""The ranges of the activations before and after smoothing, on the text of the reference.

    before_j = max over tokens of |x_j|        after_j = before_j / s_j

INT8 spends its 127 steps on the largest channel. A smaller channel uses only its share of them: the ratio of its range
to the largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from builders.validate.scheme import EngineScheme
from smoothquant.layers import FloatLayer, Layer
from smoothquant.listener import Listener
from smoothquant.model import Model
from smoothquant.quantization import absmax
from smoothquant.team import Team

BARS = 256  # the most values of a channel plot; each is the maximum of some neighbours


@dataclass(frozen=True)
class Range:
    """The ranges of one input of a layer: its largest and its median channel, before and after smoothing.

    roles: the roles of the linears that read the input.
    """

    layer: int
    roles: tuple[str, ...]
    before_max: float
    before_median: float
    after_max: float
    after_median: float


@dataclass(frozen=True)
class Channels:
    """All channels of one input, in order. count: the number of channels; more than `BARS` are shown as maxima of
    neighbours."""

    layer: int
    roles: tuple[str, ...]
    count: int
    before: tuple[float, ...]
    after: tuple[float, ...]


class InputMaxima(Listener):
    """A listener that takes the maxima of |input| over all tokens.

    found: for each linear its maxima, float32 (in,). Linears with a common input have one entry, under the first of
    them. An expert that no token reached has no entry.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.found: dict[str, Tensor] = {}
        self._first_of_input = {roles[0] for roles in model.inputs}

    def enter(self, source: FloatLayer) -> dict[str, Layer]:
        self._index = source.index
        self._heard: dict[str, Tensor] = {}  # of this layer
        return {}

    def listen(self, role: str, x: Tensor, y: Tensor) -> None:
        if role in self._first_of_input:
            name, seen = self.model.linear(self._index, role), absmax(x.flatten(0, -2), dim=0).cpu()
            self._heard[name] = torch.maximum(seen, self._heard.get(name, seen))

    def merge(self, team: Team) -> None:
        self._heard = team.largest(self._heard)

    def leave(self) -> None:
        self.found |= self._heard

    def state(self) -> dict[str, Tensor]:
        return self.found

    def restore(self, state: dict[str, Tensor]) -> None:
        self.found = {name: state.pop(name) for name in list(state)}


def activation_ranges(
    model: Model, act_absmax: Mapping[str, Tensor], scheme: EngineScheme
) -> tuple[tuple[Range, ...], Channels]:
    """The ranges of every input of every layer, and the channels of the input with the most prominent outliers.

    act_absmax: the maxima that `InputMaxima` found.
    """
    ranges, worst, channels = [], -1.0, None
    for layer in range(model.geometry.layers):
        for roles in model.inputs:
            before = act_absmax.get(model.linear(layer, roles[0]))
            if before is None:  # an expert that no token reached
                continue
            scale = scheme.column(model, layer, roles[0])
            after = before if scale is None else before / scale
            found = Range(layer, roles, *_largest_and_median(before), *_largest_and_median(after))
            ranges.append(found)
            outstanding = found.before_max / max(found.before_median, 1e-30)
            if outstanding > worst:
                worst, channels = outstanding, channels_of(layer, roles, before, after)
    assert channels is not None, "a model has layers"
    return tuple(ranges), channels


def channels_of(layer: int, roles: tuple[str, ...], before: Tensor, after: Tensor) -> Channels:
    """The channels of one input. before, after: its maxima of |input| before and after smoothing, (in,) each."""
    return Channels(layer, roles, len(before), _bars(before), _bars(after))


def _largest_and_median(values: Tensor) -> tuple[float, float]:
    return values.max().item(), values.median().item()


def _bars(values: Tensor) -> tuple[float, ...]:
    width = -(-len(values) // BARS)
    padded = torch.nn.functional.pad(values, (0, -len(values) % width))
    return tuple(padded.view(-1, width).amax(dim=1).tolist())
