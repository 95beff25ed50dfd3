"""What a quantized model computes on tokens that it was not made from, against the float model.

The logits of some tokens come by some rows of the head at a time, z of the float model and w of the other one:

    KL  =  log sum exp w - log sum exp z - E_p[w - z]          p: the probabilities by z
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from smoothquant import decoder
from smoothquant.artifacts.plan import PlanOutcome
from smoothquant.head import INPUT, PlannedHead
from smoothquant.model import Model
from smoothquant.quantization import w8a8_linear
from smoothquant.sweep import FLOAT, Sweep
from smoothquant.team import ALONE, Team

TOKENS = 1024  # that are compared at a time; each time reads the whole head


@dataclass(frozen=True)
class Distance:
    """kl: mean of KL(float || quantized) over tokens, in nats. perplexity_ratio: quantized over float. top1: the share
    of tokens with the same likeliest successor."""

    kl: float
    perplexity_ratio: float
    top1: float

    def outcome(self, name: str, share: float) -> PlanOutcome:
        """This, for the record. name: of what was chosen. share: of the bytes, in float."""
        return PlanOutcome(name, share, self.kl, self.perplexity_ratio, self.top1)


@torch.no_grad()
def distances(
    model: Model,
    sequences: tuple[Tensor, ...],
    reference: Sweep,
    found: Sequence[Sweep],
    head: PlannedHead | None = None,
    team: Team = ALONE,
) -> list[Distance]:
    """The distances of models from the reference, each after the last layer. sequences: ids of each, the first of those
    that went through the models. head: the output head in INT8 of all models; None for the float one. team: the
    processes that share the tokens, each of which has the hidden states of all."""
    ids, mine = torch.cat(sequences), []
    ends = torch.tensor([len(sequence) for sequence in sequences]).cumsum(0) - 1
    following = ids.roll(-1).index_fill(0, ends, -1)
    for part in team.turns(torch.arange(len(ids)).split(TOKENS)):
        inputs = [_input(one, part) for one in (reference, *found)]
        true = _True(following[part].to(inputs[0].device))
        others = [_Other(true) for _ in found]
        norm = head.norm(model) if head else None
        read = [decoder.head_input(model, states, norm if place else None) for place, states in enumerate(inputs)]
        for logits, *made in _by_rows(model, read, head):
            true.add(logits)
            for other, theirs in zip(others, made, strict=True):
                other.add(theirs)
        mine.append([other.sums() for other in others])
    sums = [sum(parts, _Sums()) for parts in zip(*team.woven(mine), strict=True)]
    predicted = max(len(ids) - len(ends), 1)
    return [Distance(max(one.kl, 0.0) / len(ids), math.exp(one.losses / predicted), one.top / len(ids)) for one in sums]


def _input(sweep: Sweep, part: Tensor) -> Tensor:
    """The hidden states of some tokens behind the last layer, (tokens, hidden)."""
    return sweep.hidden.before(sweep.index, FLOAT)[part].to(sweep.device)


def _by_rows(model: Model, read: Sequence[Tensor], head: PlannedHead | None) -> Iterator[list[Tensor]]:
    """For some rows of the head at a time, the logits of all models, (tokens, rows) each. read: what the head reads in
    the float model, and then in the others, (tokens, in)."""
    integers = head.int8_rows(model) if head else None
    for stored in model.rows(model.lm_head):
        rows = stored.to(read[0].device, read[0].dtype)
        made = [functional.linear(x, rows) for x in (read[:1] if integers else read)]
        if integers:
            weight, scale = (part.to(rows.device) for part in next(integers))
            made += [w8a8_linear(x, weight, scale, INPUT) for x in read[1:]]
        yield [decoder.finished(model, products) for products in made]


class _True:
    """The logits of some tokens by the float model. following: the next token of each, -1 behind the last one of a
    sequence."""

    def __init__(self, following: Tensor) -> None:
        self.following, self._rows = following, 0
        self.best = torch.full(following.shape, -torch.inf, device=following.device)  # the largest logit
        self.whole = torch.zeros_like(self.best, dtype=torch.float64)  # sum exp(z - best)
        self.normalizer = self.best.double()  # log sum exp z, summed as that of others

    def add(self, logits: Tensor) -> None:
        """Count some more logits, (tokens, rows). What others are compared by is there until the next ones come:

        share: exp(z - best). kept: what sums so far are to be multiplied by, now that there may be a larger logit.
        better: where there is, and at: its place, (tokens, 1). place: that of the next token, and here: whether it is
        among these.
        """
        largest, self.at = logits.max(-1, keepdim=True)
        best = torch.maximum(self.best, largest[:, 0])
        self.logits, self.share = logits, (logits - best[:, None]).exp()
        self.kept, self.better = (self.best - best).double().exp(), best > self.best
        self.best, self.whole = best, self.whole * self.kept + self.share.sum(-1)
        self.normalizer = torch.logaddexp(self.normalizer, logits.logsumexp(-1).double())
        place = self.following[:, None] - self._rows
        self.here = ((place >= 0) & (place < logits.shape[1]))[:, 0]
        self.place = place.clamp(0, logits.shape[1] - 1)
        self._rows += logits.shape[1]


class _Other:
    """The logits of the same tokens by another model."""

    def __init__(self, true: _True) -> None:
        self._true = true
        self._likeliest = self._largest = true.best  # its logit where the float one's is largest; its largest
        self._normalizer = true.normalizer  # log sum exp w
        self._apart = torch.zeros_like(true.whole)  # sum exp(z - best) (w - z)
        self._next = torch.zeros_like(true.best)  # w - z of the next token

    def add(self, logits: Tensor) -> None:
        """Count as many logits as the float model's last ones, which they replace."""
        true = self._true
        self._likeliest = torch.where(true.better, logits.gather(1, true.at)[:, 0], self._likeliest)
        self._largest = torch.maximum(self._largest, logits.amax(-1))
        self._normalizer = torch.logaddexp(self._normalizer, logits.logsumexp(-1).double())
        apart = logits.sub_(true.logits)
        self._apart = self._apart * true.kept + torch.linalg.vecdot(true.share, apart)
        self._next = torch.where(true.here, apart.gather(1, true.place)[:, 0], self._next)

    def sums(self) -> _Sums:
        """Those of all tokens."""
        true = self._true
        grown = self._normalizer - true.normalizer
        return _Sums(
            (grown - self._apart / true.whole).sum().item(),
            (grown - self._next)[true.following >= 0].sum().item(),
            int((self._likeliest >= self._largest).sum()),
        )


@dataclass
class _Sums:
    """Over tokens: of the KL, of losses less the reference's where there is a next token, and of those with the same
    likeliest successor."""

    kl: float = 0.0
    losses: float = 0.0
    top: int = 0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.kl + other.kl, self.losses + other.losses, self.top + other.top)
