"""Which linears a plan keeps in float, and what each share of the bytes buys.

Linears that read one input stay together. They go by what they add to the KL, per byte (`divergence`). The curve
is measured: tokens kept apart go through the model with as many of them in float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from act_scales.search.outcome import Distance, distances
from act_scales.search.passes import SearchTarget
from smoothquant.artifacts.plan import LinearChoice, PlanOutcome
from smoothquant.embedding import Embedding
from smoothquant.errors import UserError
from smoothquant.fold import SmoothedLayer
from smoothquant.head import PlannedHead
from smoothquant.model import Model
from smoothquant.plan import Plan
from smoothquant.sensitivity import SharedInput, quantized_inputs
from smoothquant.static import budget_of, worth
from smoothquant.stream import runnable
from smoothquant.sweep import Sweep


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


def with_losses(linears: Sequence[LinearChoice], lost: Mapping[tuple[str, ...], float]) -> tuple[LinearChoice, ...]:
    """The choices with their losses. lost: what linears that read one input lose together, by their names: each of
    them as much as it has of their numbers."""
    numbers = {one.name: one.numbers for one in linears}
    losses: dict[str, float] = {}
    for names, loss in lost.items():
        together = sum(numbers[name] for name in names)
        losses |= {name: loss * numbers[name] / together for name in names}
    return tuple(replace(one, loss=losses[one.name]) for one in linears)


def linears_in(model: Model, linears: Sequence[LinearChoice], budget: float) -> tuple[str, ...]:
    """Module names, in order, of the linears that a share of the bytes keeps in float; none where none fits."""
    inputs = shared_inputs(model, linears)
    chosen = worth(inputs, budget)
    return tuple(name for one in inputs if one in chosen for name in one.names)


def linears_asked(plan: Plan, model: Model, asked: str | None) -> tuple[str, ...]:
    """Module names of the linears in float by a plan. asked: "none", or a share of the bytes, as in "5%"; None for the
    plan's own. Raises UserError for anything else."""
    if asked is None or asked == "none":
        return () if asked else plan.float_linears
    budget = budget_of(asked)
    if budget is None:
        raise UserError(
            f"--keep-float {asked} with --plan",
            expected="none, or a share of the bytes, as in 5%: the plan has measured what each linear costs",
            do="leave it away for the plan's own choice",
        )
    return linears_in(model, plan.facts.linears, budget)


def measured(
    target: SearchTarget,
    smoothed: Callable[[int], SmoothedLayer],
    points: Sequence[tuple[str, ...]],
    sequences: tuple[Tensor, ...],
    reference: Sweep,
    progress: Callable[[int], None],
    head: PlannedHead | None = None,
    embedding: Embedding | None = None,
) -> list[Distance]:
    """The distances of models with some linears in float. smoothed: makes a layer by the plan. points: for each model
    the module names of its linears in float; ranks take turns with them. progress: called with the layers done.
    head: of all of them, where it is in INT8. embedding: of all of them, in place of the model's own."""
    model, mine = target.model, target.team.turns(points)
    sweeps = [target.sweep(sequences, embedding=embedding) for _ in mine]
    for index in range(model.geometry.layers if mine else 0):
        layer = smoothed(index)
        for names, sweep in zip(mine, sweeps, strict=True):
            scheme = replace(target.scheme, float_linears=names)
            sweep.take(runnable(layer, scheme).to(target.device))
        progress(index + 1)
    return target.team.woven(distances(model, sequences, reference, sweeps, head) if mine else [])


def nearest(curve: Sequence[PlanOutcome], target_kl: float) -> PlanOutcome:
    """The point of a curve with the least share that reaches a distance; where none does, the nearest to it."""
    reaching = [one for one in curve if one.kl <= target_kl]
    if reaching:
        return min(reaching, key=lambda one: one.share)
    return min(curve, key=lambda one: one.kl)


def check_reached(plan: Plan, target_kl: float) -> None:
    """Raise UserError for a plan that does not reach a distance."""
    best = nearest(plan.facts.curve, target_kl)
    if best.kl > target_kl:
        raise UserError(
            f"no share of linears in float reaches a KL of {target_kl:g}",
            expected=f"at least {math.ceil(best.kl * 1e6) / 1e6:g}, which {best.share:.1%} of the bytes reach: so many "
            f"does the plan in {plan.folder} keep",
            do="take that, or give a greater KL, or more text",
        )
