"""Which policies a search tries, in what order, and when it has tried enough.

    by group    scales found for every group
    fixed       one alpha for all groups: that of the least noise, then the recipe's, unless the first is far behind

With static scales fixed alphas alone are tried: scales that fit every group to the tokens that it has heard leave no
room for what lies beyond them, and on SmolLM2-135M they lose to alpha .8 (KL .0165 against .0141, 10 % of the bytes in
float).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from act_scales.search.scales import Policy
from smoothquant.artifacts.plan import GroupChoice, PlanOutcome

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
STATIC_ALPHAS = (0.7, 0.8, 0.9)  # that are tried where one scale holds for all tokens
FAR = 1.25  # times the KL of scales by group: a fixed alpha beyond that makes others needless


@dataclass(frozen=True)
class Trials:
    """What has been tried. recipe: the recipe's alpha. static: whether activations have one scale for all tokens.
    outcomes: of the policies in their order, so far. alphas: those of the fixed policies, once they are known."""

    recipe: float
    static: bool
    outcomes: tuple[PlanOutcome, ...] = ()
    alphas: tuple[float, ...] = ()

    @property
    def policies(self) -> tuple[Policy, ...]:
        """All that are known so far, in their order."""
        if self.static:
            return tuple(map(_fixed, sorted({*STATIC_ALPHAS, self.recipe})))
        return Policy("by group", tuple(sorted({*ALPHAS, self.recipe}))), *map(_fixed, self.alphas)

    @property
    def most(self) -> int:
        """How many can be tried at most."""
        return len(self.policies) if self.static else 3

    @property
    def next(self) -> Policy | None:
        """The policy to try next; None when enough have been tried."""
        left, kls = self.policies[len(self.outcomes) :], [one.kl for one in self.outcomes]
        settled = not self.static and len(kls) > 1 and kls[1] > FAR * kls[0]
        return left[0] if left and not settled else None

    @property
    def best(self) -> Policy:
        """The policy whose model is nearest to the float one."""
        return self.policies[min(range(len(self.outcomes)), key=lambda at: self.outcomes[at].kl)]

    def after(self, outcome: PlanOutcome, groups: Sequence[GroupChoice]) -> Trials:
        """The trials with the outcome of the next policy. groups: its choices, which tell what alphas would give."""
        alphas = self.alphas
        if not self.static and not alphas:
            noise = {alpha: sum(group.tried.get(f"{alpha:g}", 0.0) for group in groups) for alpha in ALPHAS}
            alphas = tuple(dict.fromkeys([min(noise, key=lambda alpha: noise[alpha]), self.recipe]))
        return replace(self, outcomes=(*self.outcomes, outcome), alphas=alphas)


def _fixed(alpha: float) -> Policy:
    return Policy(f"alpha {alpha:g}", tuple(sorted({*ALPHAS, alpha})), balanced=False, fixed=alpha)
