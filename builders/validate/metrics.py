"""Measure the distance of an engine's logits to the reference's, in one pass over the sequences.

    relative error   |e - r| / |r| over all logits;  cosine  e.r / (|e| |r|)
    KL               sum_v p_r(v) (log p_r(v) - log p_e(v))   in nats, for every token
    top-1            the share of tokens whose likeliest successor (the first of equals) is the same for both
    ambiguous        a token whose two best reference logits lie closer than the 99th percentile of the logit error
    perplexity       exp(mean of -log p(next token)) over tokens 2..n of every sequence

r and e are the logits of reference and engine. Everything is computed and summed in float64, some tokens at a time.

The logit error is |e - r - m|, where m is the token's mean of e - r over the vocabulary: a constant changes no
probability. All logits of all tokens are counted, each error rounded to bfloat16 (by at most 0.4 %), so that the
percentile takes no memory and needs no second pass. An error of this size on each of two near logits is enough to
exchange them. So the likeliest successor of an ambiguous token is left to chance, and a mistake there says little.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from smoothquant.errors import ThresholdError, UserError
from smoothquant.team import Team

ELEMENTS = 1 << 18  # the logits in float64 at a time: a few rows, which stay in the cache of one core
POINTS = 5000  # points of the scatter plot
USUAL = 0.99  # the share of the logit errors that the error of an ambiguous token's logits is taken from
BINS = 1 << 15  # bfloat16 numbers that are not negative, in the order of their bits
LARGEST = torch.finfo(torch.bfloat16).max
EDGES_PER_DECADE, LOWEST, HIGHEST = 4, -12, 2  # edges of the KL histogram, in log10 nats


@dataclass(frozen=True)
class Metrics:
    """The measures of one engine. tokens: the number of compared tokens. predicted: the number of tokens with a
    successor. KL is in nats per token. ambiguous: the share of tokens that are. top1_clear: the top-1 agreement on all
    other tokens; None if there are none. logit_error_p99: the logit error that decides which tokens are ambiguous."""

    tokens: int
    predicted: int
    relative_error: float
    max_abs_difference: float
    cosine: float
    kl_mean: float
    kl_p99: float
    top1: float
    top1_clear: float | None
    ambiguous: float
    logit_error_p99: float
    reference_perplexity: float
    perplexity: float
    perplexity_ratio: float


@dataclass(frozen=True)
class Samples:
    """The data of the plots. histogram: the number of tokens by KL, between consecutive `edges` (in nats; the outermost
    bins are open). points: some pairs (reference logit, engine logit)."""

    edges: tuple[float, ...]
    histogram: tuple[int, ...]
    points: tuple[tuple[float, float], ...]


class Comparison:
    """The measures of one engine so far. `add` every sequence, then take `metrics` and `samples`.

    tokens: the number of all tokens to come, so that the plotted points spread evenly.
    """

    def __init__(self, tokens: int) -> None:
        self._share = POINTS / max(tokens, 1)
        self._generator = torch.Generator().manual_seed(0)
        self._sums = torch.zeros(4, dtype=torch.float64)  # |e - r|^2, |r|^2, |e|^2, e.r
        self._losses = torch.zeros(2, dtype=torch.float64)  # reference, engine
        self._predicted, self._largest = 0, 0.0
        self._errors = torch.zeros(BINS, dtype=torch.int64)  # the number of logits by their error
        self._kl: list[Tensor] = []
        self._agreeing: list[Tensor] = []  # whether the likeliest successor is the reference's
        self._gaps: list[Tensor] = []  # between the reference's two best logits
        self._points: list[Tensor] = []

    def add(self, reference: Tensor, engine: Tensor, ids: Tensor) -> None:
        """Add one sequence. reference, engine: its logits, float (tokens, vocab). ids: its tokens, int64 (tokens,)."""
        step = max(1, ELEMENTS // reference.shape[1])
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            self._add(reference[part], engine[part], ids[start + 1 : start + 1 + len(reference[part])])
        self._sample(reference, engine)

    def state(self) -> dict[str, Tensor]:
        """The sums over all sequences so far, by name."""
        return {
            "sums": self._sums,
            "losses": self._losses,
            "predicted": torch.tensor([self._predicted]),
            "largest": torch.tensor([self._largest], dtype=torch.float64),
            "errors": self._errors,
            "kl": torch.cat([torch.zeros(0, dtype=torch.float64), *self._kl]),
            "agreeing": torch.cat([torch.zeros(0, dtype=torch.bool), *self._agreeing]),
            "gaps": torch.cat([torch.zeros(0), *self._gaps]),
            "points": torch.cat([torch.zeros(0, 2), *self._points]),
            "generator": self._generator.get_state(),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the sums that `state` returned."""
        self._sums, self._losses = state["sums"], state["losses"]
        self._predicted, self._largest = int(state["predicted"]), state["largest"].item()
        self._errors, self._kl, self._points = state["errors"], [state["kl"]], [state["points"]]
        self._agreeing, self._gaps = [state["agreeing"]], [state["gaps"]]
        self._generator.set_state(state["generator"])

    def skip(self, lengths: Iterable[int], vocabulary: int) -> None:
        """Draw the plotted points of sequences that another process adds, before any is added. lengths: in tokens."""
        for length in lengths:
            self._places(length, vocabulary)

    def merge(self, team: Team) -> None:
        """Put together what all ranks have added, in their order."""
        first, *others = team.gathered(self.state())
        for name in ("kl", "agreeing", "gaps", "points"):
            first[name] = torch.cat([first[name], *(other[name] for other in others)])
        for other in others:
            first["largest"] = torch.maximum(first["largest"], other["largest"])
            for name in ("sums", "losses", "predicted", "errors"):
                first[name] = first[name] + other[name]
        self.restore(first)

    def metrics(self) -> Metrics:
        """The measures over all sequences so far."""
        difference, reference, engine, product = self._sums.tolist()
        kl, agreeing = torch.cat(self._kl), torch.cat(self._agreeing)
        error = _usual(self._errors)
        clear = torch.cat(self._gaps) >= error
        losses = (self._losses / self._predicted).tolist()
        return Metrics(
            tokens=len(kl),
            predicted=self._predicted,
            relative_error=math.sqrt(difference / max(reference, 1e-300)),
            max_abs_difference=self._largest,
            cosine=product / max(math.sqrt(reference * engine), 1e-300),
            kl_mean=kl.mean().item(),
            kl_p99=percentile(kl, 0.99),
            top1=_share(agreeing),
            top1_clear=_share(agreeing[clear]) if clear.any() else None,
            ambiguous=_share(~clear),
            logit_error_p99=error,
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

    def _add(self, reference: Tensor, engine: Tensor, successors: Tensor) -> None:
        r_best, r_choice = reference.max(dim=-1)
        e_best, e_choice = engine.max(dim=-1)
        self._agreeing.append((r_choice == e_choice).cpu())
        second = reference.scatter(1, r_choice[:, None], -math.inf).amax(dim=-1)
        self._gaps.append((r_best - second).float().cpu())
        r, e = (logits.to(torch.float64, copy=True) for logits in (reference, engine))
        difference = e - r
        squares = [torch.linalg.vector_norm(values).square() for values in (difference, r, e)]
        self._sums += torch.stack([*squares, torch.dot(e.flatten(), r.flatten())]).cpu()
        low, high = difference.aminmax()
        self._largest = max(self._largest, -low.item(), high.item())
        self._errors += _counts(difference).cpu()
        rows = torch.arange(len(successors), device=r.device)
        chosen = [logits[rows, successors.to(r.device)] for logits in (r, e)]
        # log p = logit - log_sum, where log_sum = max + log(sum of exp(logit - max))
        r_weights, r_total = _exponentials(r, r_best)
        _, e_total = _exponentials(e, e_best)
        r_log_sum, e_log_sum = r_best + r_total.log(), e_best + e_total.log()
        products = torch.stack([torch.dot(*pair) for pair in zip(r_weights, difference, strict=True)])
        expected = products / r_total  # the mean of e - r over p_r
        self._kl.append((e_log_sum - r_log_sum - expected).clamp_min(0).cpu())  # below 0 by rounding only
        for side, (logits, log_sum) in enumerate(zip(chosen, (r_log_sum, e_log_sum), strict=True)):
            self._losses[side] += (log_sum[: len(rows)] - logits).sum().item()
        self._predicted += len(successors)

    def _sample(self, reference: Tensor, engine: Tensor) -> None:
        where = self._places(*reference.shape).to(reference.device)
        self._points.append(torch.stack((reference.flatten()[where], engine.flatten()[where]), dim=1).cpu())

    def _places(self, tokens: int, vocabulary: int) -> Tensor:
        """The logits of a sequence that are plotted, by their places among all of them."""
        count = math.ceil(self._share * tokens)
        return torch.randint(tokens * vocabulary, (count,), generator=self._generator)


def check_logits(logits: Tensor, tokens: int, vocabulary: int, sequence: int, overflow: str = "") -> None:
    """Raise UserError unless an engine's logits are (1, tokens, vocabulary), ThresholdError if one is not finite.
    overflow: why that might be, where it is known (`builders.validate.overflow`)."""
    if logits.shape[-1] != vocabulary:
        raise UserError(
            f"the engine has a vocabulary of {logits.shape[-1]}",
            expected=f"{vocabulary}, the vocabulary of the reference",
            do="validate against the checkpoint that the engine was made from",
        )
    if tuple(logits.shape) != (1, tokens, vocabulary):
        raise UserError(f"the engine gave logits {list(logits.shape)}", expected=f"{[1, tokens, vocabulary]}")
    if not logits.sum().isfinite() and not (finite := logits[0].isfinite()).all():  # the sum is ten times quicker
        token, entry = (~finite).nonzero()[0].tolist()
        what = (
            f"the engine's logits hold {logits[0, token, entry].item()}, first at sequence {sequence}, token {token}, "
            f"entry {entry}"
        )
        if overflow:
            raise ThresholdError(f"{what}: {overflow}", do="export in bfloat16 or float32")
        raise ThresholdError(
            what,
            expected="finite logits",
            do="make the engine again; if that does not help, export with a lower alpha or in float32",
        )


def _exponentials(logits: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logits - best), (tokens, vocab), which overwrites the logits, and its sums, (tokens,)."""
    weights = logits.sub_(best[:, None]).exp_()
    return weights, weights.sum(dim=-1)


def _counts(difference: Tensor) -> Tensor:
    """The number of logits by their error, int64 (BINS,). difference: engine less reference, (tokens, vocab)."""
    error = (difference - difference.mean(dim=-1, keepdim=True)).abs_().clamp_max_(LARGEST)
    return torch.bincount(error.to(torch.bfloat16).view(torch.int16).flatten(), minlength=BINS)


def _usual(counts: Tensor) -> float:
    """The smallest error that a share `USUAL` of the logits does not exceed. counts: of `_counts`."""
    upto = counts.cumsum(dim=0)
    place = int(torch.searchsorted(upto, math.ceil(USUAL * upto[-1].item())))
    return torch.tensor(place, dtype=torch.int16).view(torch.bfloat16).item()


def _share(chosen: Tensor) -> float:
    return chosen.sum().item() / len(chosen)


def percentile(values: Tensor, share: float) -> float:
    """The value below which a share of the values lies, interpolated linearly. (torch.quantile takes at most 16 million
    values.)"""
    ordered = values.sort().values
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], place - low).item()


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))  # float64 ends beyond


def _short(value: float) -> float:
    return float(f"{value:.4g}")
