"""How far an engine's logits are from the reference's, in one pass over the sequences.

    relative error   |e - r| / |r| over all logits;  cosine  e.r / (|e| |r|)
    KL               sum_v p_r(v) (log p_r(v) - log p_e(v))   in nats, for every token
    top-1            share of tokens where both have the same likeliest successor (the first of equals)
    perplexity       exp(mean of -log p(next token)) over tokens 2..n of every sequence

r, e: logits of reference and engine. Everything is computed and summed in float64, some tokens at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from smoothquant.errors import ThresholdError, UserError

ELEMENTS = 1 << 22  # logits widened to float64 at a time
POINTS = 5000  # of the scatter plot
EDGES_PER_DECADE, LOWEST, HIGHEST = 4, -12, 2  # of the KL histogram, in log10 nats


@dataclass(frozen=True)
class Metrics:
    """tokens: compared; predicted: those with a successor to predict. KL in nats per token."""

    tokens: int
    predicted: int
    relative_error: float
    max_abs_difference: float
    cosine: float
    kl_mean: float
    kl_p99: float
    top1: float
    reference_perplexity: float
    perplexity: float
    perplexity_ratio: float


@dataclass(frozen=True)
class Samples:
    """For plots. histogram: number of tokens by KL, between consecutive `edges` (nats; the outermost are open);
    points: some (reference logit, engine logit)."""

    edges: tuple[float, ...]
    histogram: tuple[int, ...]
    points: tuple[tuple[float, float], ...]


class Comparison:
    """Accumulates the metrics of one engine. `add` every sequence, then ask for `metrics` and `samples`.

    tokens: number of all tokens to come, so that the plotted points spread evenly.
    """

    def __init__(self, tokens: int) -> None:
        self._share = POINTS / max(tokens, 1)
        self._generator = torch.Generator().manual_seed(0)
        self._sums = torch.zeros(4, dtype=torch.float64)  # |e - r|^2, |r|^2, |e|^2, e.r
        self._losses = torch.zeros(2, dtype=torch.float64)  # reference, engine
        self._agreeing, self._predicted, self._largest = 0, 0, 0.0
        self._kl: list[Tensor] = []
        self._points: list[Tensor] = []

    def add(self, reference: Tensor, engine: Tensor, ids: Tensor) -> None:
        """reference, engine: (tokens, vocab) float; ids: (tokens,) int64, the sequence they are logits of."""
        step = max(1, ELEMENTS // reference.shape[1])
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            r, e = reference[part].double(), engine[part].double()
            self._add_logits(r, e)
            self._add_predictions(r, e, ids[start + 1 : start + 1 + len(r)])
        self._sample(reference, engine)

    def metrics(self) -> Metrics:
        """Of all sequences so far."""
        difference, reference, engine, product = self._sums.tolist()
        kl = torch.cat(self._kl)
        losses = (self._losses / self._predicted).tolist()
        return Metrics(
            tokens=len(kl),
            predicted=self._predicted,
            relative_error=math.sqrt(difference / max(reference, 1e-300)),
            max_abs_difference=self._largest,
            cosine=product / max(math.sqrt(reference * engine), 1e-300),
            kl_mean=kl.mean().item(),
            kl_p99=percentile(kl, 0.99),
            top1=self._agreeing / len(kl),
            reference_perplexity=_exp(losses[0]),
            perplexity=_exp(losses[1]),
            perplexity_ratio=_exp(losses[1] - losses[0]),
        )

    def samples(self) -> Samples:
        edges = torch.arange(LOWEST * EDGES_PER_DECADE, HIGHEST * EDGES_PER_DECADE + 1) / EDGES_PER_DECADE
        bins = torch.bucketize(torch.cat(self._kl).clamp_min(1e-300).log10(), edges[1:-1].double())
        counts = torch.bincount(bins, minlength=len(edges) - 1)
        points = torch.cat(self._points)
        return Samples(
            edges=tuple(10.0**edge for edge in edges.tolist()),
            histogram=tuple(counts.tolist()),
            points=tuple((_short(r), _short(e)) for r, e in points.tolist()),
        )

    def _add_logits(self, r: Tensor, e: Tensor) -> None:
        difference = e - r
        sums = (difference.square().sum(), r.square().sum(), e.square().sum(), (e * r).sum())
        self._sums += torch.stack(sums)
        self._largest = max(self._largest, difference.abs().max().item())
        self._agreeing += int((r.argmax(dim=-1) == e.argmax(dim=-1)).sum())

    def _add_predictions(self, r: Tensor, e: Tensor, successors: Tensor) -> None:
        log_r, log_e = r.log_softmax(dim=-1), e.log_softmax(dim=-1)
        self._kl.append((log_r.exp() * (log_r - log_e)).sum(dim=-1).clamp_min(0))  # below 0 by rounding only
        rows = torch.arange(len(successors))
        self._losses -= torch.stack((log_r[rows, successors].sum(), log_e[rows, successors].sum()))
        self._predicted += len(successors)

    def _sample(self, reference: Tensor, engine: Tensor) -> None:
        count = math.ceil(self._share * len(reference))
        where = torch.randint(reference.numel(), (count,), generator=self._generator)
        self._points.append(torch.stack((reference.flatten()[where], engine.flatten()[where]), dim=1))


def check_logits(logits: Tensor, tokens: int, vocabulary: int, sequence: int) -> None:
    """Raise UserError unless an engine's logits are (1, tokens, vocabulary), ThresholdError if one is not finite."""
    if logits.shape[-1] != vocabulary:
        raise UserError(
            f"the engine has a vocabulary of {logits.shape[-1]}",
            expected=f"{vocabulary}, the reference model's",
            do="validate against the checkpoint that the engine was made from",
        )
    if tuple(logits.shape) != (1, tokens, vocabulary):
        raise UserError(f"the engine gave logits {list(logits.shape)}", expected=f"{[1, tokens, vocabulary]}")
    finite = logits[0].isfinite()
    if not finite.all():
        token, entry = (~finite).nonzero()[0].tolist()
        raise ThresholdError(
            f"the engine's logits hold {logits[0, token, entry].item()}, first at sequence {sequence}, token {token}, "
            f"entry {entry}",
            expected="finite logits",
            do="make the engine again; if it stays, export with a lower alpha or in float32",
        )


def percentile(values: Tensor, share: float) -> float:
    """Linear between the two nearest values. (torch.quantile stops at 16 million.)"""
    ordered = values.sort().values
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], place - low).item()


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # beyond lies the end of float64


def _short(value: float) -> float:
    return float(f"{value:.4g}")
