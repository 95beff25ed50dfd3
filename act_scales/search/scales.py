"""Choose a scale for every smoothing group of a layer.

A candidate is no smoothing, the paper's equation with an alpha, or a scale that descends from the best of those
(`smoothquant.balance`). What it costs is the noise of the group's outputs over their signal, summed over its linears:

    activations   measured: tokens that are kept apart, and may reach beyond the others, go through the target's own
                  rounding
    weights       expected, after rounding with error feedback (`smoothquant.balance`)

The signal is that of ordinary tokens, and each token's noise weighs by its own: a few tokens' spikes are most of the
mean square of some outputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from act_scales.search.statistics import Heard, Statistics
from smoothquant.artifacts.plan import BALANCED, NONE, GroupChoice
from smoothquant.balance import Group
from smoothquant.choose import group_ranges, held, shared, spread
from smoothquant.family import SmoothingGroup
from smoothquant.fold import Scales
from smoothquant.layers import FloatLayer
from smoothquant.model import Model
from smoothquant.quantization import input_scale, quantize_input
from smoothquant.roles import ROUTER
from smoothquant.scheme import Precision, Scheme
from smoothquant.settings import SmoothingSettings
from smoothquant.smoothing import smoothing_scale
from smoothquant.team import ALONE, Team

ROWS = 512  # rows of a group's weights that candidates are judged by


@dataclass(frozen=True)
class Policy:
    """What a search may choose from.

    name: in the plan. alphas: the candidates beside no smoothing. balanced: whether a balanced scale is one, too.
    fixed: the alpha that all groups take, whatever the others would give. compared: whether it is found out what
    candidates give; only a fixed alpha can do without.
    """

    name: str
    alphas: tuple[float, ...]
    balanced: bool = True
    fixed: float | None = None
    compared: bool = True


@dataclass(frozen=True)
class Ranges:
    """The maxima of a layer's inputs, float32 (in,), and of its outputs, (out,), by role."""

    act: Mapping[str, Tensor]
    output: Mapping[str, Tensor]


class ScaleSearch:
    """The scales of one layer. source: the layer in float. heard: of the text. apart: of the tokens kept apart. team:
    the processes that share its groups."""

    def __init__(
        self,
        model: Model,
        source: FloatLayer,
        ranges: Ranges,
        heard: Statistics,
        apart: Statistics,
        scheme: Scheme,
        settings: SmoothingSettings,
        team: Team = ALONE,
    ) -> None:
        self.team = team
        self.model, self.source, self.ranges, self.heard = model, source, ranges, heard
        self.apart = apart
        self.scheme, self.settings = scheme, settings

    def choose(self, policy: Policy) -> tuple[Scales, tuple[GroupChoice, ...]]:
        """The scales by a policy, as the folds hold them, and why."""
        choices, wanted = [], {}
        groups = self.settings.chosen(self.model.groups, self.model.quantized_roles)
        found = self.team.woven([self._scale(group, policy) for group in self.team.turns(groups)])
        for group, (choice, scale) in zip(groups, found, strict=True):
            choices.append(choice)
            if scale is not None:
                wanted[group] = scale
        act, output = self.ranges.act, self.ranges.output
        scales = held(self.model, self.source.index, self.source, act, output, self.settings, wanted)
        return scales, tuple(choices)

    def _scale(self, group: SmoothingGroup, policy: Policy) -> tuple[GroupChoice, Tensor | None]:
        """The choice for a group, and its scale for the channels of the source; None for no smoothing."""
        model, act, roles = self.model, self.ranges.act, _quantized(group)
        reach = group_ranges(model, self.source, act, group)
        options = {f"{alpha:g}": smoothing_scale(*reach, alpha) for alpha in policy.alphas}
        tried: dict[str, float] = {}
        heard = self.heard.input(roles[0])
        if heard is None or not act[roles[0]].any() or not any(map(heard.energy, roles)):
            recipe = f"{self.settings.alpha:g}"  # no token came here, or nothing goes in or out
            chosen = recipe if recipe in options else next(iter(options))
        elif policy.compared:
            judge = self._judge(group, heard)
            wide = {name: spread(model, group, scale) for name, scale in options.items()}
            wide[NONE] = torch.ones_like(act[roles[0]])
            tried = {name: judge.noise(scale) for name, scale in wide.items()}
            chosen = min(tried, key=lambda name: tried[name])
            if policy.balanced:
                balanced = judge.whole.balanced(wide[chosen])
                options[BALANCED] = shared(model, group, balanced)
                tried[BALANCED] = judge.noise(balanced)
                chosen = min(tried, key=lambda name: tried[name])
        if policy.fixed is not None:
            chosen = f"{policy.fixed:g}"
        names = tuple(dict.fromkeys(model.linear(self.source.index, role) for role in group.linears))
        choice = GroupChoice(self.source.index, names, group.through, tried, chosen)
        return choice, None if chosen == NONE else options[chosen]

    def _judge(self, group: SmoothingGroup, heard: Heard) -> _Judge:
        roles, apart = _quantized(group), self.apart.input(_quantized(group)[0])
        weights = {role: self.source.weights[role].float() for role in roles}
        judging = apart if apart is not None and len(apart.x) else heard
        step = math.ceil(sum(map(len, weights.values())) / ROWS)  # every so many rows, and each for so many
        rows = {role: weight[::step] for role, weight in weights.items()}
        row_weight = {role: len(weight) / len(rows[role]) for role, weight in weights.items()}
        return _Judge(
            whole=self._group(group, weights, rows, row_weight, heard),
            rows=rows,
            row_weight=row_weight,
            x=judging.x,
            token_weight=judging.token_weight(roles),
            signals=_signals(judging, roles),
            activations=self.scheme.activations,
        )

    def _group(
        self,
        group: SmoothingGroup,
        weights: Mapping[str, Tensor],
        rows: Mapping[str, Tensor],
        row_weight: Mapping[str, float],
        heard: Heard,
    ) -> Group:
        """The group as rounding sees it. weights: of its linears by role, float32 (out, in). rows, row_weight: those of
        `_Judge`."""
        roles = _quantized(group)
        share = {role: 1 / found for role, found in _signals(heard, roles).items() if found}
        token_weight = heard.token_weight(roles)
        ones = torch.ones_like(self.ranges.act[roles[0]])
        squares = token_weight @ heard.x.square()
        places = torch.arange(self.model.geometry.kv_size) if group.through == "attention" else None
        return Group(
            tokens=heard.x.abs(),
            token_weight=token_weight,
            rows=torch.cat([rows[role].abs() for role in share]),
            row_weight=torch.cat(
                [torch.full((len(rows[role]),), each * row_weight[role]) for role, each in share.items()]
            ),
            columns=sum((each * weights[role].square().sum(dim=0) for role, each in share.items()), 0 * ones),
            left_over=squares * heard.moments.unforetold if heard.moments else squares,
            mean_square=squares,
            source=None if places is None else spread(self.model, group, places),
            reach=self.ranges.act[roles[0]] if self.scheme.activations.static else None,
        )


@dataclass(frozen=True)
class _Judge:
    """What the scales of one group cost. rows: of its linears by role, some of the weight, float32 (rows, in), each of
    which counts for as many as its row_weight says. x: tokens that go through the target's rounding, (tokens, in).
    token_weight: (tokens,). signals: by role, what noise is held against."""

    whole: Group
    rows: Mapping[str, Tensor]
    row_weight: Mapping[str, float]
    x: Tensor
    token_weight: Tensor
    signals: Mapping[str, float]
    activations: Precision

    def noise(self, scale: Tensor) -> float:
        """The noise of the outputs over their signal, summed over the linears. scale: (in,)."""
        smoothed, reach = self.x / scale, self.whole.reach
        step = None if reach is None else input_scale(reach / scale)
        integers, found = quantize_input(smoothed, self.activations, step)
        errors, total = (integers * found - smoothed) * scale, self.whole.noise(scale)[1]
        for role, rows in self.rows.items():
            noise = (errors @ rows.T).square().sum(dim=1) * self.row_weight[role]
            total += (noise @ self.token_weight).item() / max(self.signals[role], 1e-30)
        return total


def _signals(heard: Heard, roles: Sequence[str]) -> dict[str, float]:
    """The mean squares of outputs by role, of ordinary tokens."""
    weight = heard.token_weight(roles)
    return {role: heard.signal(role, weight) for role in roles}


def _quantized(group: SmoothingGroup) -> tuple[str, ...]:
    return tuple(role for role in group.linears if role != ROUTER)
