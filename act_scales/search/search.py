"""The search for the best W8A8 form of a model that costs nothing at run time.

    trials    each policy on some of the text (`act_scales.search.trials`)
    winner    the policy whose model is nearest to the float one on tokens kept apart; on all of the text
    head      the output head's scale and rounding, where it is to be in INT8; trials have it in float
    curve     linears in float, share by share of the bytes, against the distance from the float model
    rows      the embedding in INT8, where it is to be, behind all else; all before has it in float

In a pass, layers come in order; the inputs of each are those that the layers before it, as they will be stored, give.
The output is a folder (`smoothquant.artifacts.plan`); an interrupted search goes on near where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from act_scales.collect import Maxima, made_from, told_of
from act_scales.search.budget import check_reached, linears_in, measured, nearest, with_losses
from act_scales.search.divergence import Trail, divergence
from act_scales.search.embedding import with_embedding
from act_scales.search.head import choose_head, numbers_of_head, passes_over_head
from act_scales.search.outcome import distances
from act_scales.search.passes import Pass, SearchTarget, packed, unpacked, width_for
from act_scales.search.scales import Policy
from act_scales.search.trials import ALPHAS, Trials
from act_scales.text import Text
from smoothquant.artifacts.plan import ACT_SCALES, HEAD, PLAN, STEP, GroupChoice, PlanFacts, PlanOutcome
from smoothquant.artifacts.record import as_json, read
from smoothquant.artifacts.safetensors_files import save_tensors
from smoothquant.device import choose_device
from smoothquant.errors import UserError
from smoothquant.files import write_json
from smoothquant.fold import SmoothedLayer
from smoothquant.head import PlannedHead
from smoothquant.kv_cache import check_keys
from smoothquant.layers import float_layer
from smoothquant.model import Model
from smoothquant.plan import Plan, layer_file, read_plan
from smoothquant.scheme import FLOAT, PER_TOKEN, Scheme
from smoothquant.settings import SmoothingSettings
from smoothquant.static import numbers_of
from smoothquant.stream import smooth_layer
from smoothquant.sweep import Progress, sweep
from smoothquant.team import ALONE, Team
from smoothquant.workspace import Workspace

TRIALS = "trials"  # in the workspace
LEAST_SEQUENCES = 4  # one of which judges
APART, TRIAL, JUDGES = 8, 4, 4  # sequences that only judge; those that trials are made from, and judged by
POINTS = (0.025, 0.05, 0.1, 0.25)  # of the curve: shares of the bytes of all linears in INT8


@dataclass(frozen=True)
class Wanted:
    """What a search is to find. scheme: what is INT8. settings: the groups; their alpha is the recipe's. budget: the
    share of the INT8 bytes to spend once more on linears in float. target_kl: instead of a budget, the distance from
    the float model that is wanted. memory: for the Hessians of a layer, in bytes. head_limit, embedding_limit: the KL
    that a head, or an embedding, in INT8 may cost; one that costs more stays in float. With a limit, an embedding that
    is tied to a float head stays in float, too: the head keeps the float table."""

    scheme: Scheme = PER_TOKEN
    settings: SmoothingSettings = SmoothingSettings()  # noqa: RUF009 (frozen)
    budget: float = 0.0
    target_kl: float | None = None
    memory: int = 8 << 30
    head_limit: float = math.inf
    embedding_limit: float = math.inf


def search(
    model: Model,
    text: Text,
    out: str | Path,
    wanted: Wanted,
    *,
    device: str = "auto",
    overwrite: bool = False,
    team: Team = ALONE,
    progress: Progress = lambda done, total: None,
) -> Plan:
    """Search on `text` and write the plan to the folder `out`; one made from the same inputs is reused.

    The last sequences of the text, a quarter of them and at most `APART`, only judge. device: "auto", "cpu", "cuda",
    "cuda:N". team: the processes that share the search; all call this. Raises UserError for a text that is too short;
    once the plan is there, for a distance that no share of the curve reaches.
    """
    team.check_enough(len(text.sequences), text.source)
    text, device = text.for_model(model), choose_device(device)
    if wanted.scheme.kv_cache.quantized:
        check_keys(model.family.norms, f"a plan for {model.checkpoint.folder}")
    chosen, apart = split(text)
    target = SearchTarget(model, wanted.scheme, wanted.settings, width_for(model, wanted.memory), device, team)
    inputs = {
        **made_from(model, text, torch.float32, device),
        "settings": as_json(wanted.settings),
        "scheme": as_json(wanted.scheme),
        "budget": wanted.budget,
        "target_kl": wanted.target_kl,
        "width": target.width,
        "head_limit": wanted.head_limit if math.isfinite(wanted.head_limit) else None,
        "embedding_limit": wanted.embedding_limit if math.isfinite(wanted.embedding_limit) else None,
    }
    with Workspace(out, STEP, inputs, overwrite=overwrite, team=team) as work:
        if not work.finished:
            work.require(numbers_of(model) + numbers_of_head(model, wanted.scheme))  # an int8 each
            _Search(target, wanted, text, chosen, apart, work, progress).run()
    plan = read_plan(out)
    if wanted.target_kl is not None:
        check_reached(plan, wanted.target_kl)
    return plan


def split(text: Text) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The sequences that a plan is made from, and those that judge it."""
    count = min(APART, len(text.sequences) // LEAST_SEQUENCES)
    if not count:
        raise UserError(
            f"{text.source}: {len(text.sequences)} sequences are too few to search on some and to judge by others",
            expected=f"at least {LEAST_SEQUENCES} of --length tokens",
            do="give more text, or a smaller --length",
        )
    return text.sequences[:-count], text.sequences[-count:]


class _Search:
    def __init__(
        self,
        target: SearchTarget,
        wanted: Wanted,
        text: Text,
        chosen: tuple[Tensor, ...],
        apart: tuple[Tensor, ...],
        work: Workspace,
        progress: Progress,
    ) -> None:
        self.target, self.wanted, self.text, self.work, self.model = target, wanted, text, work, target.model
        self.team = target.team
        self.chosen, self.apart = chosen, apart
        self.layers = self.model.geometry.layers
        self.trail = Trail()
        self.head: PlannedHead | None = None
        self.passes = passes_over_head(self.model, target.scheme, ALPHAS)
        self.trials = Trials(wanted.settings.alpha, target.scheme.activations.static)
        self._report, self._done, self._total = progress, 0, (4 + self.trials.most) * self.layers + self.passes
        self._total += self.layers if target.scheme.embedding.quantized else 0

    def run(self) -> None:
        self._step(0)
        self.reference = sweep(
            self.model,
            self.apart,
            [self.trail],
            device=self.target.device,
            team=self.team,
            progress=lambda done, _: self._step(done),
        )
        self.reference.whole()
        self._done += self.layers
        self.trials = self._tried()
        policy = self.trials.best
        winner = self._winner(policy)

        def outcome(head: PlannedHead | None = None) -> PlanOutcome:
            [found] = distances(self.model, self.apart, self.reference, [winner.apart], head, self.team)
            return found.outcome(policy.name, 0.0)

        choice = None
        if self.target.scheme.head.quantized:
            head, choice = choose_head(self.target, winner, ALPHAS, outcome, self._step)
            self._done += self.passes
            if choice.in_int8.kl - choice.in_float.kl <= self.wanted.head_limit:
                self.head = head
            if self.head and self.team.leads:
                save_tensors(self.work.path(HEAD), head.tensors(self.model))
            first = choice.in_int8 if self.head else choice.in_float
        else:
            first = outcome()
        facts = PlanFacts(
            model=self.model.checkpoint.fingerprint,
            family=self.model.family.name,
            smoothing=self.wanted.settings,
            scheme=replace(self.wanted.scheme, head=self.wanted.scheme.head if self.head else FLOAT, embedding=FLOAT),
            text=self.text.fingerprint,
            tokens=sum(map(len, self.chosen)),
            apart=sum(map(len, self.apart)),
            trial=sum(map(len, self.chosen[:TRIAL])),
            width=self.target.width,
            groups=winner.choices.groups,
            linears=winner.choices.linears,
            candidates=self.trials.outcomes,
            chosen=policy.name,
            curve=(first,),
            max_positions=self.model.choices.get("max_positions"),
            head=choice,
            caches=winner.choices.caches,
        )
        facts = self._with_curve(facts)
        self._done += self.layers
        smoothed, limit = partial(self._smoothed, facts), self.wanted.embedding_limit
        facts = with_embedding(self.target, facts, smoothed, self.apart, self.reference, self._step, self.head, limit)
        self._report(self._total, self._total)  # sooner, where the best alpha is the recipe's
        if self.team.leads:
            write_json(self.work.path(PLAN), as_json(facts))
        self.work.commit({"kl": facts.curve[0].kl})

    def _step(self, done: int) -> None:
        self._report(self._done + done, self._total)

    def _tried(self) -> Trials:
        """All trials. Those that an interrupted search has made are known."""
        known = self.team.same({**self.work.state(TRIALS), **self.work.state()}.get(TRIALS))
        found = self.trials if known is None else read(Trials, unpacked(known), TRIALS)
        self._done += self.layers * len(found.outcomes)
        while policy := found.next:
            found = found.after(*self._trial(policy))
            self.work.keep(TRIALS, {TRIALS: packed(as_json(found))})
        return found

    @cached_property
    def _reach(self) -> Mapping[str, Tensor]:
        """The maxima of all inputs in the float model on all of the text, where static scales come from them: a trial's
        own few tokens would let scales look good that have less room for others."""
        if not self.target.scheme.activations.static:
            return {}
        maxima = Maxima(self.model, torch.float32)
        sweep(self.model, self.chosen, [maxima], device=self.target.device, team=self.team)
        return maxima.split()[0]

    def _trial(self, policy: Policy) -> tuple[PlanOutcome, tuple[GroupChoice, ...]]:
        alone = replace(policy, compared=policy.fixed is None)  # the winner's pass tells what others would give
        under_way = Pass(self.target, alone, self.chosen[:TRIAL], self.apart[:JUDGES], self._reach)
        for index in range(self.layers):
            under_way.take(float_layer(self.model, index))
            self._step(index + 1)
        self._done += self.layers
        under_way.apart.whole()
        [found] = distances(self.model, self.apart[:JUDGES], self.reference, [under_way.apart], team=self.team)
        return found.outcome(policy.name, 0.0), under_way.choices.groups

    def _winner(self, policy: Policy) -> Pass:
        """A policy on all of the text, with the files of all layers."""
        under_way, start = Pass(self.target, policy, self.chosen, self.apart), self.work.next_layer
        if start:
            under_way.restore(start, self.work.state())
        for index in range(start, self.layers):
            planned = under_way.take(float_layer(self.model, index))
            if self.team.leads:
                save_tensors(self.work.path(layer_file(index)), planned.tensors(self.model, index))
            if self.work.due:
                self.work.mark(index + 1, {TRIALS: packed(as_json(self.trials)), **under_way.state()})
            self._step(index + 1)
        self._done += self.layers
        device = self.target.device
        metadata = made_from(self.model, self.text, torch.float32, device) | told_of(self.text)
        self.scales = under_way.act_scales(metadata)
        if self.team.leads:
            self.scales.save(self.work.path(ACT_SCALES))
        under_way.apart.whole()
        self.team.wait()  # all read what rank 0 has written
        return under_way

    def _with_curve(self, facts: PlanFacts) -> PlanFacts:
        """The facts with what each linear loses, the curve, and the linears in float that were wanted."""
        smoothed = partial(self._smoothed, facts)
        lost = {}
        if self.team.leads:  # one pass backward over one batch, which nobody can share
            lost = divergence(self.target, smoothed, self.trail, self.reference, self._step)
        lost = self.team.same(lost)
        self._done += self.layers
        facts = replace(facts, linears=with_losses(facts.linears, lost))
        shares = sorted({*POINTS, self.wanted.budget} - {0.0})
        buyable = (linears_in(self.model, facts.linears, share) for share in shares)
        points = [names for names in dict.fromkeys(buyable) if names]
        found = measured(self.target, smoothed, points, self.apart, self.reference, self._step, self.head)
        whole = numbers_of(self.model)
        curve = [*facts.curve]
        kept: dict[float, tuple[str, ...]] = {0.0: ()}
        for names, one in zip(points, found, strict=True):
            share = numbers_of(self.model, names) / whole
            kept[share] = names
            curve.append(one.outcome(facts.chosen, share))
        if self.wanted.target_kl is None:
            share = max((share for share in kept if share <= self.wanted.budget), default=0.0)
        else:
            share = nearest(curve, self.wanted.target_kl).share
        return replace(facts, curve=tuple(curve), scheme=replace(facts.scheme, float_linears=kept[share]))

    def _smoothed(self, facts: PlanFacts, index: int) -> SmoothedLayer:
        """A layer by the plan."""
        plan, scales = Plan(self.work.folder, facts, ""), self.scales
        return smooth_layer(self.model, index, scales.input_absmax, facts.smoothing, scales.output_absmax, plan=plan)
