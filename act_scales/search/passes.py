"""One way of quantizing a model, layer after layer: what is chosen for a layer is what the next ones are given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from act_scales.collect import Maxima
from act_scales.mean_squares import MeanSquares
from act_scales.search.rounding import choose_rounding
from act_scales.search.scales import Policy, Ranges, ScaleSearch
from act_scales.search.statistics import Statistics
from act_scales.store import ActScales
from smoothquant import kv_cache
from smoothquant.artifacts.plan import CacheChoice, GroupChoice, LinearChoice
from smoothquant.artifacts.record import as_json, read
from smoothquant.embedding import Embedding
from smoothquant.float16 import HeldMaxima
from smoothquant.fold import Scales, SmoothedLayer
from smoothquant.layers import FloatLayer
from smoothquant.model import Model
from smoothquant.plan import PlannedLayer
from smoothquant.ranges import input_ranges, output_ranges
from smoothquant.scheme import Scheme
from smoothquant.sensitivity import quantized_inputs
from smoothquant.settings import SmoothingSettings
from smoothquant.steps import DEFAULT, run_steps
from smoothquant.stream import planned_layer, runnable
from smoothquant.sweep import Sweep
from smoothquant.team import ALONE, Team

LEAST = 64  # channels of a Hessian's blocks
JUDGING, JUDGED = 1024, 256  # tokens of the first sequences kept apart; as many of them judge a layer's forms
CHOICES = "choices"  # in the state of a pass
Sequences = tuple[Tensor, ...]  # ids, (tokens,) each


@dataclass(frozen=True)
class SearchTarget:
    """What is quantized and how. width: channels of a Hessian's blocks. device: of the arithmetic. team: the processes
    that share the search."""

    model: Model
    scheme: Scheme
    settings: SmoothingSettings
    width: int
    device: str = "cpu"
    team: Team = ALONE

    def sweep(
        self,
        sequences: Sequences,
        *listeners: Statistics | Maxima | MeanSquares | HeldMaxima,
        embedding: Embedding | None = None,
        team: Team = ALONE,
    ) -> Sweep:
        """Sequences before the first layer. embedding: in place of the model's own. team: that shares them."""
        found = Sweep(self.model, sequences, listeners, device=self.device, team=team)
        found.embed(embedding)
        return found


@dataclass(frozen=True)
class Choices:
    """What a pass has chosen so far."""

    groups: tuple[GroupChoice, ...] = ()
    linears: tuple[LinearChoice, ...] = ()
    caches: tuple[CacheChoice, ...] = ()

    def after(
        self, groups: tuple[GroupChoice, ...], linears: tuple[LinearChoice, ...], caches: tuple[CacheChoice, ...]
    ) -> Choices:
        """These, and those of one more layer."""
        return Choices(self.groups + groups, self.linears + linears, self.caches + caches)


class Pass:
    """A model under way, by one policy. chosen: the sequences that choose. apart: those that judge. reach: for each
    linear the maxima of its input, float32 (in,), on more text than that; empty where `chosen` is all of it.

    text, apart: under way. choices: those so far.
    """

    def __init__(
        self,
        target: SearchTarget,
        policy: Policy,
        chosen: Sequences,
        apart: Sequences,
        reach: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.target, self.policy, self._reach = target, policy, reach
        model = target.model
        self._maxima, self._held, self._squares = Maxima(model, torch.float32), HeldMaxima(model), MeanSquares(model)
        self._heard = Statistics(model, sum(map(len, chosen)), target.width, device=target.device)
        self._judged = Statistics(model, min(JUDGING, sum(map(len, apart))), 0, JUDGED, target.device)
        self.text = target.sweep(chosen, self._maxima, self._held, self._squares, self._heard, team=target.team)
        self.apart = target.sweep(apart, self._judged, team=target.team)
        self.choices = Choices()

    def take(self, source: FloatLayer) -> PlannedLayer:
        """Choose the next layer, and run all sequences through it."""
        target, index = self.target, source.index
        self.text.hear(source)
        self.apart.hear(source, JUDGING)
        inputs, outputs = self._maxima.split()
        act, reach = (input_ranges(target.model, index, found) for found in (inputs, self._reach))
        act |= {role: torch.maximum(act[role], further) for role, further in reach.items()}
        ranges = Ranges(act, output_ranges(target.model, index, outputs))
        scales, groups = ScaleSearch(
            target.model, source, ranges, self._heard, self._judged, target.scheme, target.settings, target.team
        ).choose(self.policy)
        unrounded = PlannedLayer(scales, rounded={})
        smoothed = run_steps(DEFAULT, planned_layer(target.model, source, unrounded, ranges.output, target.settings))
        smoothed.cache_scales, caches = self._cache_scales(smoothed)
        smoothed.rounded, linears = choose_rounding(smoothed, self._heard, self._judged, target.scheme, target.team)
        self.choices = self.choices.after(groups, linears, caches)
        layer = runnable(smoothed, target.scheme).to(target.device)
        self.text.take(layer)
        self.apart.take(layer)
        planned = Scales(scales.column, smoothed.input_absmax, keys=scales.keys)
        return PlannedLayer(planned, smoothed.rounded, smoothed.cache_scales)

    def _cache_scales(self, smoothed: SmoothedLayer) -> tuple[kv_cache.Scales | None, tuple[CacheChoice, ...]]:
        """The scales of a layer's 8-bit cache, and why; None for a float cache."""
        ranges = smoothed.cache_scales  # with which nothing saturates
        if not self.target.scheme.kv_cache.quantized or ranges is None:
            return None, ()
        if self.target.settings.cache == "shared":
            return ranges, ()
        keys, values = ranges
        errors = kv_cache.clipping_errors(torch.cat(self._heard.values) / smoothed.row.get("v", 1), values)
        share = min(errors, key=lambda share: errors[share])
        tried = {f"{tried:g}": error for tried, error in errors.items()}
        return (keys, values * share), (CacheChoice(smoothed.source.index, tried, share),)

    def act_scales(self, metadata: Mapping[str, str]) -> ActScales:
        """The ranges of the inputs and outputs of all linears, as the layers before them are stored."""
        inputs, outputs = self._maxima.split()
        return ActScales(inputs, outputs, metadata, self._held.with_head(self.text), self._squares.found)

    def state(self) -> dict[str, Tensor]:
        """All that the next layer starts from, by name."""
        kept = {f"text.{name}": values for name, values in self.text.state().items()}
        kept |= {f"apart.{name}": values for name, values in self.apart.state().items()}
        return kept | {CHOICES: packed(as_json(self.choices))}

    def restore(self, index: int, state: Mapping[str, Tensor]) -> None:
        """Go on before layer `index` from the `state` there."""
        self.choices = read(Choices, unpacked(self.target.team.same(state.get(CHOICES))), CHOICES)
        for start, sweep in (("text.", self.text), ("apart.", self.apart)):
            sweep.restore(index, {n.removeprefix(start): v for n, v in state.items() if n.startswith(start)})


def width_for(model: Model, memory: int) -> int:
    """The channels of a Hessian's blocks, such that those of a layer fit into `memory` bytes; 64 at least."""
    inputs = [model.family.shape(roles[0], model.geometry)[1] for roles in quantized_inputs(model)]
    width = max(inputs)
    while width > LEAST and 8 * sum(channels * min(width, channels) for channels in inputs) > memory:
        width = max(LEAST, width // 2)
    return width


def packed(content: object) -> Tensor:
    """JSON values as a tensor, uint8, which a workspace keeps."""
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


def unpacked(values: Tensor | None) -> object:
    """The JSON values that `packed` was given."""
    assert values is not None
    return json.loads(values.numpy().tobytes())
