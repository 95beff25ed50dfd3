"""What `real_weights` measures of each form, sequence by sequence, and what may be said of the difference of two.

    KL         sum over tokens of sum_v p(v) (log p(v) - log q(v)), in nats    p: the float model; q: the form
    loss       sum over tokens 2..n of -log q(token)
    agreeing   the number of tokens whose likeliest successor is the float model's

The difference of two forms is measured on the same sequences. Its 95 % interval comes from a paired bootstrap:
sequences are drawn with replacement, and the difference per token is computed of each draw.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smoothquant.artifacts.record import as_json, read
from smoothquant.errors import UserError
from smoothquant.reading import read_json

ELEMENTS = 1 << 20  # logits at a time: a few rows, which stay in the processor's cache
RESAMPLES, SEED, INSIDE = 10_000, 0, 0.95
DIGITS = 7  # of a number in the results


@dataclass(frozen=True)
class Measured:
    """The sums of one form for each sequence. share: the numbers of linears in float, as a share of those of all
    linears of the decoder, which is how many more bytes they take in 16 bits; None for a form that nobody stores."""

    label: str
    share: float | None
    kl: tuple[float, ...]
    loss: tuple[float, ...]
    agreeing: tuple[float, ...]


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Results:
    """The results of one model on one text.

    identity: what they were measured on: fingerprints of the model and of both texts. name: the model's folder.
    lengths: the tokens of each sequence. loss: the float model's loss for each sequence. against: the name of the form
    that differences are taken to. alpha: the one of the model's recipe. forms: by name.
    """

    identity: Mapping[str, str]
    name: str
    lengths: tuple[int, ...]
    loss: tuple[float, ...]
    against: str
    alpha: float
    forms: Mapping[str, Measured]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def perplexity(self) -> float:
        """The perplexity of the float model."""
        return math.exp(sum(self.loss) / (self.tokens - len(self.lengths)))

    def kl(self, form: Measured) -> float:
        """The mean KL per token."""
        return sum(form.kl) / self.tokens

    def perplexity_ratio(self, form: Measured) -> Interval:
        """The perplexity over that of the float model."""
        apart = difference(form.loss, self.loss, [length - 1 for length in self.lengths])
        return Interval(*map(math.exp, apart))

    def top1(self, form: Measured) -> float:
        """The share of tokens with the same likeliest successor."""
        return sum(form.agreeing) / self.tokens

    def kl_difference(self, form: Measured, other: Measured) -> Interval:
        """The mean KL per token of one form less that of another."""
        return difference(form.kl, other.kl, self.lengths)

    def with_forms(self, forms: Mapping[str, Measured]) -> Results:
        """These results with some forms new or replaced."""
        return replace(self, forms={**self.forms, **forms})

    def as_details(self) -> dict[str, Any]:
        """The results as JSON values, as `read_results` reads them."""
        return as_json(self)


class Predictions:
    """What the float model predicts for one sequence. loss: the sum of -log p over tokens 2..n.

    logits: float32 (tokens, vocab). ids: int64 (tokens,).
    """

    def __init__(self, logits: Tensor, ids: Tensor) -> None:
        self._ids, self._best = ids, logits.argmax(dim=-1)
        self._log_p = logits.log_softmax(dim=-1)
        self._p = self._log_p.exp()
        self.loss = _loss(self._log_p, ids[1:])

    def compare(self, logits: Tensor) -> tuple[float, float, float]:
        """The KL, the loss and the agreeing tokens of a form's logits, (tokens, vocab)."""
        step = max(1, ELEMENTS // logits.shape[1])
        kl = loss = agreeing = 0.0
        for start in range(0, len(logits), step):
            part = slice(start, start + step)
            log_q = logits[part].log_softmax(dim=-1)
            divergence = torch.linalg.vecdot(self._p[part], self._log_p[part] - log_q)
            kl += divergence.clamp_min(0).double().sum().item()  # below 0 by rounding only
            loss += _loss(log_q, self._ids[start + 1 : start + 1 + len(log_q)])
            agreeing += (logits[part].argmax(dim=-1) == self._best[part]).sum().item()
        return kl, loss, agreeing


def difference(
    one: Sequence[float], other: Sequence[float], weights: Sequence[int], resamples: int = RESAMPLES
) -> Interval:
    """The sum of `one` less that of `other`, over the sum of the weights, with the interval of a paired bootstrap.

    one, other, weights: a number for each sequence.
    """
    apart = torch.tensor(one, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
    size = torch.tensor(weights, dtype=torch.float64)
    drawn = torch.randint(len(apart), (resamples, len(apart)), generator=torch.Generator().manual_seed(SEED))
    found = apart[drawn].sum(dim=1) / size[drawn].sum(dim=1)
    ends = torch.tensor([(1 - INSIDE) / 2, (1 + INSIDE) / 2], dtype=torch.float64)
    low, high = found.quantile(ends).tolist()
    return Interval((apart.sum() / size.sum()).item(), low, high)


def read_results(path: Path, identity: Mapping[str, str], rows: str) -> Results | None:
    """The results in a file; None where there are none, or none that these rows go with.

    rows: the names of the rows that are to be measured; all of them begin a new file where the old one is of something
    else. Raises UserError for single rows of another model or text than the file's.
    """
    if not path.exists():
        return None
    details = read_json(path).get("details", {})
    found = read(Results, details, f"{path}: details")
    if dict(found.identity) == dict(identity):
        return found
    if not rows:
        return None
    name = next(name for name in identity if found.identity.get(name) != identity[name])
    raise UserError(
        f"{path} holds results of {name} {found.identity.get(name)}, and {rows} would be of {identity[name]}",
        expected="one model, one calibration text and one held-out text in a file",
        do="give the same ones and as many tokens, or measure all rows (without --rows)",
    )


def rounded(values: Sequence[float]) -> tuple[float, ...]:
    """The numbers with as many digits as the results keep."""
    return tuple(float(f"{value:.{DIGITS}g}") for value in values)


def _loss(log_q: Tensor, successors: Tensor) -> float:
    """The sum of -log q over the successors of the first rows."""
    return -log_q[: len(successors)].gather(1, successors[:, None]).double().sum().item()
