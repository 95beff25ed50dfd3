"""What the page of a plan shows, sorted by kinds of linears: "q, k, v", "o", "gate, up", "down", ...

spike ratio     max_j a_j / median_j a_j, a: maxima of |input| by channel before smoothing, the median of those that
                are not 0: how far one channel reaches beyond the others, which share its step
KL by byte      what the linears of an input in INT8 add to the KL, by MB
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from smoothquant.artifacts.plan import BALANCED, NONE, WHOLE, GroupChoice, LinearChoice, PlanOutcome
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.plan import Plan
from smoothquant.plan_tensors import DO
from smoothquant.roles import parsed
from smoothquant.sensitivity import quantized_inputs

MB = 1e6


@dataclass(frozen=True)
class PlannedInput:
    """The linears of a layer that read one input. names: their module names. numbers: of their weights, a byte each in
    INT8. loss: as in `LinearChoice`, of all together. largest, median: of the input's channels before smoothing, 0
    where no token came. in_float: whether they stay in float."""

    layer: int
    kind: str
    names: tuple[str, ...]
    numbers: int
    loss: float
    largest: float
    median: float
    in_float: bool

    @property
    def spike(self) -> float:
        """The spike ratio; 0 where no token came."""
        return self.largest / self.median if self.median else 0.0

    @property
    def loss_by_mb(self) -> float:
        """What it wins to leave them in float, for each MB."""
        return self.loss / (self.numbers / MB)


class PlanView:
    """A plan beside its model. input_absmax: of every linear, before smoothing, float32 (in,), by module name.

    inputs: all inputs of quantized linears. groups: by kind, the choices for smoothing groups. linears: by kind, those
    for matrices, each with its layer. Raises UserError for a plan whose record is not of this model's linears.
    """

    def __init__(self, plan: Plan, model: Model, input_absmax: Mapping[str, Tensor]) -> None:
        self.plan, self.facts, self.model = plan, plan.facts, model
        self._places: dict[str, tuple[int, tuple[str, ...]]] = {}  # module name -> layer, kinds
        for layer in range(model.geometry.layers):
            for role in model.roles:
                _, before = self._places.get(name := model.linear(layer, role), (layer, ()))
                self._places[name] = layer, (*before, parsed(role).kind)
        _check(plan, self._places, model)
        self.groups: dict[str, list[GroupChoice]] = {}
        for group in self.facts.groups:
            self.groups.setdefault(self._kind(group.linears), []).append(group)
        self.linears: dict[str, list[tuple[int, LinearChoice]]] = {}
        for linear in self.facts.linears:
            self.linears.setdefault(self._kind((linear.name,)), []).append((self._places[linear.name][0], linear))
        self.inputs = tuple(self._inputs(input_absmax))

    @property
    def layers(self) -> int:
        return self.model.geometry.layers

    @property
    def all_bytes(self) -> int:
        """The bytes of all linears in INT8."""
        return sum(linear.numbers for linear in self.facts.linears)

    @property
    def float_share(self) -> float:
        """The INT8 bytes of the linears in float over those of all."""
        return sum(one.numbers for one in self.facts.linears if one.name in self.plan.float_linears) / self.all_bytes

    @property
    def taken(self) -> PlanOutcome:
        """The point of the curve that was chosen."""
        return min(self.facts.curve, key=lambda one: abs(one.share - self.float_share))

    @property
    def by_loss(self) -> list[PlannedInput]:
        """All inputs, those first that win most per byte in float."""
        return sorted(self.inputs, key=lambda one: one.loss_by_mb, reverse=True)

    @property
    def by_spike(self) -> list[PlannedInput]:
        """All inputs, those with the largest spike ratio first."""
        return sorted(self.inputs, key=lambda one: one.spike, reverse=True)

    def _kind(self, names: tuple[str, ...]) -> str:
        return ", ".join(dict.fromkeys(kind for name in names for kind in self._places[name][1]))

    def _inputs(self, input_absmax: Mapping[str, Tensor]) -> Iterator[PlannedInput]:
        choices = {linear.name: linear for linear in self.facts.linears}
        for layer in range(self.layers):
            for roles in quantized_inputs(self.model):
                names = tuple(dict.fromkeys(self.model.linear(layer, role) for role in roles))
                mine = [choices[name] for name in names]
                absmax = torch.stack([input_absmax[name] for name in names]).amax(dim=0)  # an expert may have seen none
                moving = absmax[absmax > 0]
                yield PlannedInput(
                    layer,
                    self._kind(names),
                    names,
                    numbers=sum(one.numbers for one in mine),
                    loss=sum(one.loss for one in mine),
                    largest=absmax.max().item(),
                    median=moving.median().item() if len(moving) else 0.0,
                    in_float=any(name in self.plan.float_linears for name in names),
                )


def candidate_words(name: str) -> str:
    """The name of a candidate for a group's scales, in words."""
    return name if name in (NONE, BALANCED) else f"alpha {name}"


def _check(plan: Plan, places: Mapping[str, object], model: Model) -> None:
    """Raise UserError for a record that is not of this model's linears, or not of numbers."""
    facts, where = plan.facts, plan.folder
    named = [linear.name for linear in facts.linears]
    for name in (*named, *(name for group in facts.groups for name in group.linears)):
        if name not in places:
            raise UserError(f"{where}: choices for {name}", expected="choices for linears of this model", do=DO)
    for name, _ in model.linears():
        if name not in named:
            raise UserError(f"{where}: no choice for {name}", expected="one for every linear", do=DO)
    for group in facts.groups:
        if not 0 <= group.layer < model.geometry.layers:
            raise UserError(f"{where}: choices for layer {group.layer}", expected="layers of this model", do=DO)
    if not facts.candidates or not facts.curve:
        raise UserError(f"{where}: no models were run end to end", expected="candidates and a curve", do=DO)
    numbers = [value for group in facts.groups for value in group.tried.values()]
    for linear in facts.linears:
        numbers += [*linear.errors.values(), linear.loss, linear.numbers - 1]
    head = facts.head
    if head and head.rounding not in head.tried.get(head.scale, {}):
        raise UserError(
            f"{where}: an output head with scale {head.scale} and rounding {head.rounding}",
            expected="those of a head that was tried",
            do=DO,
        )
    for cache in facts.caches:
        if not {f"{cache.chosen:g}", WHOLE} <= cache.tried.keys():
            raise UserError(
                f"{where}: values of layer {cache.layer} that saturate from {cache.chosen} of their maximum on",
                expected="a share that was tried",
                do=DO,
            )
        numbers += [cache.chosen, *cache.tried.values()]
    numbers += [value for tried in head.tried.values() for value in tried.values()] if head else []
    beside = [one for choice in (head, facts.embedding) if choice for one in (choice.in_float, choice.in_int8)]
    for one in (*facts.candidates, *facts.curve, *beside):
        numbers += [one.share, one.kl, one.perplexity_ratio, one.top1]
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise UserError(f"{where}: errors that are no numbers", expected="finite ones, none below 0", do=DO)
