"""Choose the INT8 form of the output head, behind the quantized layers: a scale for its input, and its rounding.

    scale       none, alphas, and one that descends from the best of these (`smoothquant.balance`); folded into the
                final norm, where nothing but the head reads it
    rounding    to nearest, or with error feedback by the second moments of the smoothed, rounded input

Each scale is run with each rounding, in the target's own arithmetic, on tokens that neither has seen. What they cost is
the KL from the float head, which reads the same input. The weight goes by some rows at a time, many times: with p the
probabilities by the float head, and d what a form adds to the logits,

    KL  =  log E_p[exp d] - E_p[d]          two sums over rows, once the normalizer of p is known
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from act_scales.search.passes import Pass, SearchTarget
from act_scales.search.statistics import SAMPLE
from smoothquant import decoder
from smoothquant.artifacts.plan import BALANCED, FEEDBACK, NEAREST, NONE, HeadChoice, PlanOutcome
from smoothquant.balance import Group
from smoothquant.fold import Rounded
from smoothquant.head import INPUT, PlannedHead, is_smoothable
from smoothquant.model import Model
from smoothquant.quantization import QMAX, absmax, quantize_weight, w8a8_linear
from smoothquant.rounding import Feedback, Hessian
from smoothquant.scheme import Scheme
from smoothquant.smoothing import skip_dead_channels, smoothing_scale
from smoothquant.sweep import Sweep

ROWS = 2048  # rows of the weight that the descent looks at
MOST, LEAST = 80.0, 1e-6  # added to a logit, and E_p[exp d]: forms beyond that are of no use, and float32 ends
Tried = dict[str, dict[str, float]]  # by candidate for the scale and by rounding, the KL


def numbers_of_head(model: Model, scheme: Scheme) -> int:
    """The numbers of a head in INT8; 0 for one in float."""
    return model.geometry.vocab_size * model.geometry.embedded_size if scheme.head.quantized else 0


def passes_over_head(model: Model, scheme: Scheme, alphas: Sequence[float]) -> int:
    """How often `choose_head` reads a head that is to be in INT8: to see it, by every candidate, and to round it."""
    return (3 + (len(alphas) + 1 if is_smoothable(model) else 0)) if scheme.head.quantized else 0


def choose_head(
    target: SearchTarget,
    winner: Pass,
    alphas: Sequence[float],
    outcome: Callable[[PlannedHead | None], PlanOutcome],
    progress: Callable[[int], None] = lambda passes: None,
) -> tuple[PlannedHead, HeadChoice]:
    """The head of a model behind its layers, and why. winner: after the last layer. alphas: candidates beside no
    smoothing. outcome: what the whole model computes with a head in INT8, or with a float one. progress: called with
    the number of passes over the head that are done, of `passes_over_head`."""
    search = _HeadSearch(target, winner.text, winner.apart, progress)
    tried = search.tried(alphas)
    name, rounding = _least(tried)
    head = search.head(name, rounding)
    return head, HeadChoice(tried, name, rounding, outcome(None), outcome(head))


class _HeadSearch:
    """text, apart: sequences behind the last quantized layer, those that choose and those that judge."""

    @torch.no_grad()
    def __init__(self, target: SearchTarget, text: Sweep, apart: Sweep, progress: Callable[[int], None]) -> None:
        self.target, self.model, self._progress, self._passes = target, target.model, progress, 0
        channels = self.model.geometry.embedded_size
        self._moments = Hessian(channels, target.width, target.device)
        self._reach = torch.zeros(channels, device=target.device)
        parts = [torch.empty(0, channels, device=target.device)]
        for x in _inputs(text):
            self._moments.add(x)
            self._reach = torch.maximum(self._reach, absmax(x, dim=0))
            parts.append(x[:: _stride(text)])
        self._moments.merge(text.team)
        self._reach = text.team.largest({"": self._reach})[""].to(target.device)
        self._x = torch.cat(text.team.gathered(torch.cat(parts).cpu())).to(target.device)
        self._judging = torch.cat([x[:: _stride(apart)] for x in _inputs(apart)])
        self._scales: dict[str, Tensor | None] = {NONE: None}  # by candidate
        self._look()

    @torch.no_grad()
    def tried(self, alphas: Sequence[float]) -> Tried:
        """What all candidates cost."""
        if is_smoothable(self.model) and self._reach.any():
            self._scales |= {f"{a:g}": self._held(smoothing_scale(self._reach, self._columns, a)) for a in alphas}
        team, names = self.target.team, list(self._scales)
        costs = team.woven([self._costs(self._scales[name]) for name in team.turns(names)])
        found = dict(zip(names, costs, strict=True))
        if len(found) > 1:
            best = self._scales[_least(found)[0]]
            start = torch.ones_like(self._reach) if best is None else best
            self._scales[BALANCED] = self._held(self._group().balanced(start))
            found[BALANCED] = self._costs(self._scales[BALANCED])
        return found

    @torch.no_grad()
    def head(self, name: str, rounding: str) -> PlannedHead:
        """The head with a scale of those tried, and a rounding."""
        scale = self._scales[name]
        rounded = None if rounding == NEAREST else self._rounded(scale)
        return PlannedHead(None if scale is None else scale.cpu(), rounded)

    def _look(self) -> None:
        """Look at the weight as it is: maxima and variances of its columns, float32 (in,), some of its rows, and
        the normalizer of the float head's logits, (tokens,). What moves all logits alike is no noise: so the mean of a
        column does not count."""
        vocabulary = self.model.geometry.vocab_size
        self._columns, squares, sums = (torch.zeros_like(self._reach) for _ in range(3))
        self._normalizer = self._judging.new_full((len(self._judging),), -torch.inf)
        taken = []
        for rows in self._rows(None):
            self._columns = torch.maximum(self._columns, absmax(rows, dim=0))
            squares, sums = squares + rows.square().sum(dim=0), sums + rows.sum(dim=0)
            taken.append(rows[:: max(1, vocabulary // ROWS)].abs())
            logits = decoder.finished(self.model, functional.linear(self._judging, rows))
            self._normalizer = torch.logaddexp(self._normalizer, logits.logsumexp(dim=-1))
        self._taken, self._variance = torch.cat(taken), (squares - sums.square() / vocabulary).clamp_min(0) / vocabulary

    def _group(self) -> Group:
        """The head as rounding sees it: the noise of a mean row, over all tokens alike."""
        tokens, rows = len(self._x), len(self._taken)
        return Group(
            tokens=self._x.abs(),
            token_weight=self._x.new_full((tokens,), 1 / tokens),
            rows=self._taken,
            row_weight=self._x.new_full((rows,), 1 / rows),
            columns=self._variance,
            left_over=self._moments.left_over,
            mean_square=self._moments.mean_square,
        )

    def _held(self, scale: Tensor) -> Tensor:
        """The scale that the final norm can hold, with which the head's input reaches as far as without it: float16
        holds both or neither. scale: (in,)."""
        scale = scale * ((self._reach / scale).max() / self._reach.max())
        norm = self.model.norm_at(self.model.family.final_norm or "").to(self.target.device)
        return norm.fold(skip_dead_channels(scale, self._reach))[0]

    def _costs(self, scale: Tensor | None) -> dict[str, float]:
        """The KL with a scale, by rounding."""
        feedback, x = self._feedback(scale), _divided(self._judging, scale)
        sums = {name: torch.zeros(2, len(x), dtype=torch.float64, device=x.device) for name in (NEAREST, FEEDBACK)}
        for rows in self._rows(scale):
            wanted = decoder.finished(self.model, functional.linear(x, rows))
            share = (wanted - self._normalizer[:, None]).exp()
            forms = {NEAREST: quantize_weight(rows), FEEDBACK: feedback.quantize(rows)}
            for rounding, form in forms.items():
                made = decoder.finished(self.model, w8a8_linear(x, *form, INPUT))
                added = (made - wanted).clamp_max(MOST)
                sums[rounding] += torch.stack([(share * added.expm1()).sum(-1), (share * added).sum(-1)])
        found = {name: grown.clamp_min(LEAST - 1).log1p() - mean for name, (grown, mean) in sums.items()}
        return {name: max(each.mean().item(), 0.0) for name, each in found.items()}

    def _rounded(self, scale: Tensor | None) -> Rounded:
        """The smoothed weight, rounded with error feedback."""
        feedback, parts = self._feedback(scale), []
        for rows in self._rows(scale):
            parts.append([part.cpu() for part in feedback.quantize(rows)])
        return Rounded(*map(torch.cat, zip(*parts, strict=True)))

    def _feedback(self, scale: Tensor | None) -> Feedback:
        """Rounding by the second moments of the smoothed, rounded input."""
        scale = torch.ones_like(self._reach) if scale is None else scale
        steps = absmax(self._x / scale, dim=1) / QMAX
        return self._moments.feedback(scale, steps)

    def _rows(self, scale: Tensor | None) -> Iterator[Tensor]:
        """The smoothed weight, some rows at a time, float32 (rows, in)."""
        yield from PlannedHead(scale).smoothed_rows(self.model, self.target.device)
        self._passes += 1
        self._progress(self._passes)


def _inputs(end: Sweep) -> Iterator[Tensor]:
    """What the head reads behind the last layer, float32 (tokens, in)."""
    for states in end.outputs():
        yield decoder.head_input(end.model, states.to(end.device)).float()


def _stride(end: Sweep) -> int:
    return max(1, end.tokens // SAMPLE)


def _divided(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x / scale


def _least(tried: Mapping[str, Mapping[str, float]]) -> tuple[str, str]:
    """The scale and the rounding with the least KL."""
    return min(((name, rounding) for name in tried for rounding in tried[name]), key=lambda at: tried[at[0]][at[1]])
