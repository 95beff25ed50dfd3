"""Choose how the linears of a layer are rounded, by their outputs on tokens of the text that are kept apart.

    nearest               every weight to the nearest step
    error feedback        `smoothquant.rounding`, by the second moments of the smoothed, rounded input
    ... and bias          the mean error of the outputs is taken off the bias, where there is one

Linears that read one input take the same: the one whose outputs are nearest to those of the float linears.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from act_scales.search.statistics import LEAST, Heard, Statistics
from smoothquant.artifacts.plan import CORRECTED, FEEDBACK, NEAREST, LinearChoice
from smoothquant.fold import Rounded, SmoothedLayer
from smoothquant.layers import float_linear
from smoothquant.quantization import QMAX, absmax, input_scale, quantize_weight, w8a8_linear
from smoothquant.rounding import Feedback
from smoothquant.scheme import Scheme
from smoothquant.team import ALONE, Team

Form = dict[str, Rounded]  # by role


def choose_rounding(
    layer: SmoothedLayer, heard: Statistics, apart: Statistics, scheme: Scheme, team: Team = ALONE
) -> tuple[dict[str, Rounded], tuple[LinearChoice, ...]]:
    """The linears of a smoothed layer that are not rounded to nearest, by role, and the choice for every matrix.

    heard: of the text. apart: of the tokens kept apart. team: the processes that share the linears.
    """
    mine = list(_chosen(layer, heard, apart, scheme, team.turns(layer.model.side_by_side)))
    found: dict[str, Rounded] = {}
    choices: list[LinearChoice] = []
    for rounded, told in team.woven(mine):
        found |= rounded
        choices += told
    return found, tuple(choices)


def _chosen(
    layer: SmoothedLayer, heard: Statistics, apart: Statistics, scheme: Scheme, inputs: Sequence[tuple[str, ...]]
) -> Iterator[tuple[Form, list[LinearChoice]]]:
    """The linears that are not rounded to nearest and the choices, for the linears that read each input."""
    model = layer.model
    feedbacks: dict[int, Feedback] = {}  # by what was heard: experts share one
    for roles in inputs:
        read = heard.input(roles[0])
        if read is not None and read.moments is not None and len(read.x) and id(read) not in feedbacks:
            feedbacks[id(read)] = _feedback(layer, roles[0], read, scheme)
        forms = _Forms(layer, roles, read, apart.input(roles[0]), scheme, feedbacks.get(id(read)))
        chosen, choices = forms.best, []
        for name in dict.fromkeys(model.linear(layer.index, role) for role in roles):
            mine = [role for role in roles if model.linear(layer.index, role) == name]
            errors = {form: sum(by_role[role] for role in mine) / len(mine) for form, by_role in forms.errors.items()}
            numbers = sum(forms.weights[role].numel() for role in mine)
            choices.append(LinearChoice(name, numbers, chosen, errors))
        yield forms.made[chosen] if chosen != NEAREST else {}, choices


def _feedback(layer: SmoothedLayer, role: str, heard: Heard, scheme: Scheme) -> Feedback:
    """Rounding by the second moments of the smoothed, rounded input of a linear, and of all that read it."""
    assert heard.moments is not None
    column = layer.column.get(role, torch.ones(()))
    if scheme.activations.static:
        steps = input_scale(layer.input_absmax[role])
    else:
        steps = absmax(heard.x / column, dim=1) / QMAX
    return heard.moments.feedback(column.expand(heard.x.shape[1]), steps)


@dataclass(frozen=True)
class _Seen:
    """Tokens that linears read. x: smoothed, (tokens, in). outputs: of the float linears by role, (tokens, out)."""

    x: Tensor
    outputs: Mapping[str, Tensor]


class _Forms:
    """The forms of the linears that read one input. made: by their names. errors: by form and role, the square of the
    output's error over that of the output; nothing if no token kept apart came here. feedback: rounding by what was
    heard; None where nothing was."""

    def __init__(
        self,
        layer: SmoothedLayer,
        roles: Sequence[str],
        heard: Heard | None,
        apart: Heard | None,
        scheme: Scheme,
        feedback: Feedback | None,
    ) -> None:
        self.layer, self.roles, self.scheme = layer, roles, scheme
        self.column = layer.column.get(roles[0], torch.ones(()))
        self.static = input_scale(layer.input_absmax[roles[0]]) if scheme.activations.static else None
        self.weights = {role: layer.weight(role) for role in roles}
        self.errors: dict[str, dict[str, float]] = {}
        self.made: dict[str, Form] = {NEAREST: {r: Rounded(*quantize_weight(w)) for r, w in self.weights.items()}}
        if feedback is not None:
            self.made[FEEDBACK] = self._with_feedback(feedback)
        if heard is not None and len(heard.x) and any(layer.bias(role) is not None for role in roles):
            seen = self._seen(heard)
            self.made |= {f"{name}{CORRECTED}": self._corrected(form, seen) for name, form in self.made.items()}
        if apart is not None and len(apart.x):
            seen = self._seen(apart)
            self.errors = {name: self._errors(form, seen) for name, form in self.made.items()}

    @property
    def best(self) -> str:
        """The form with the least error over all linears."""
        if not self.errors:
            return NEAREST
        return min(self.errors, key=lambda form: sum(self.errors[form].values()))

    def _with_feedback(self, feedback: Feedback) -> Form:
        rounded, scale = feedback.quantize(torch.cat(list(self.weights.values())))
        rows = [len(weight) for weight in self.weights.values()]
        return {
            role: Rounded(part.contiguous(), own.contiguous())
            for role, part, own in zip(self.roles, rounded.split(rows), scale.split(rows), strict=True)
        }

    def _corrected(self, form: Form, seen: _Seen) -> Form:
        found: Form = {}
        for role, one in form.items():
            bias = self.layer.bias(role)
            if bias is not None:
                one = replace(one, bias=bias + (seen.outputs[role] - self._output(role, one, seen)).mean(0))
            found[role] = one
        return found

    def _errors(self, form: Form, seen: _Seen) -> dict[str, float]:
        found = {}
        for role, one in form.items():
            wanted, made = seen.outputs[role], self._output(role, one, seen)
            signal = wanted.square().sum(dim=1)
            weight = 1 / signal.clamp_min(LEAST * signal.mean().clamp_min(1e-30))
            found[role] = ((made - wanted).square().sum(dim=1) @ weight / (signal @ weight).clamp_min(1e-30)).item()
        return found

    def _seen(self, heard: Heard) -> _Seen:
        x = heard.x / self.column
        return _Seen(x, {role: float_linear(x, weight, self.layer.bias(role)) for role, weight in self.weights.items()})

    def _output(self, role: str, one: Rounded, seen: _Seen) -> Tensor:
        """The output of a linear in the target's arithmetic, (tokens, out)."""
        bias = self.layer.bias(role) if one.bias is None else one.bias
        return w8a8_linear(seen.x, one.weight, one.weight_scale, self.scheme.activations, self.static, bias)
