"""Thresholds for the measures of an engine, and for a missed threshold the smallest one that would have passed.

A limit holds if  value <= limit  (`top1`: value >= limit).  No limit holds for NaN. The suggested limit is the measured
value rounded outwards to four digits, so that it really passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from smoothquant.errors import UserError

MEASURES: Mapping[str, str] = {
    "kl_mean": "mean KL to the reference (nats per token)",
    "kl_p99": "99th-percentile KL to the reference (nats per token)",
    "top1": "top-1 agreement with the reference",
    "perplexity_ratio": "perplexity over the reference's",
    "relative_error": "relative error of the logits",
    "exactness_ratio": "distance to the exact W8A8 logits over PyTorch's own",
}
AT_LEAST = frozenset({"top1"})  # measures with a lower limit; all others have an upper limit


@dataclass(frozen=True)
class Thresholds:
    """The limits on a validation's measures; None stands for no limit.

    kl_mean, kl_p99: the largest KL(reference || engine), in nats per token.
    top1: the smallest share of tokens whose likeliest successor is the reference's.
    perplexity_ratio: the largest ratio of the engine's perplexity to the reference's.
    relative_error: the largest ratio of the norm of the logits' difference to the norm of the reference's logits.
    exactness_ratio: the largest ratio of the engine's distance to the float64 W8A8 logits to the distance of PyTorch in
        float32. It needs a validation with `exact=True`.
    """

    kl_mean: float | None = None
    kl_p99: float | None = None
    top1: float | None = None
    perplexity_ratio: float | None = None
    relative_error: float | None = None
    exactness_ratio: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            limit = getattr(self, field.name)
            if limit is not None and not 0 <= limit < math.inf:
                raise UserError(f"threshold {field.name} is {limit}", expected="a number >= 0")
        if self.top1 is not None and self.top1 > 1:
            raise UserError(f"threshold top1 is {self.top1}", expected="a share in [0, 1]", do="write 93 % as 0.93")

    def check(self, measured: Mapping[str, float]) -> tuple[Check, ...]:
        """One `Check` for each limit that is set. Raises UserError for a limit on a measure that was not taken."""
        checks = []
        for name, limit in asdict(self).items():
            if limit is None:
                continue
            if name not in measured:
                raise UserError(f"threshold {name}: not measured for this engine", do=f"drop the threshold on {name}")
            checks.append(Check(name, measured[name], limit))
        return tuple(checks)


@dataclass(frozen=True)
class Check:
    """One threshold and the measured value. name: the field of `Thresholds`."""

    name: str
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.value >= self.limit if self.name in AT_LEAST else self.value <= self.limit

    @property
    def smallest_passing(self) -> float | None:
        """The tightest limit of four digits that the measured value passes; None if no limit passes."""
        return _outwards(self.value, up=self.name not in AT_LEAST)

    @property
    def sentence(self) -> str:
        """The verdict in one sentence, for people."""
        bound = "at least" if self.name in AT_LEAST else "at most"
        verdict = f"{MEASURES[self.name]} is {self.value:.4g}, {bound} {self.limit:g} wanted"
        if self.passed:
            return f"{verdict}: passed"
        if self.smallest_passing is None:
            return f"{verdict}: missed, and no threshold would have passed"
        return f"{verdict}: missed; {self.name} {self.smallest_passing:g} would have passed"


def _outwards(value: float, up: bool) -> float | None:
    """The number of four significant digits next to `value`, not below it (up) or not above it."""
    if not math.isfinite(value):
        return None
    if value == 0:
        return 0.0
    digits = 3 - math.floor(math.log10(abs(value)))
    rounded = round(value, digits)
    if (rounded < value) if up else (rounded > value):
        rounded = round(rounded + (1 if up else -1) * 10.0**-digits, digits)
    return rounded
