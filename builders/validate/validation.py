"""The result of validating one engine, in plain values that go to JSON and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from builders.validate.layers import LinearError
from builders.validate.metrics import Metrics, Samples
from builders.validate.ranges import Channels, Range
from builders.validate.thresholds import Check

WORST = 5  # linears that are named


@dataclass(frozen=True)
class Exactness:
    """The relative errors of two sets of logits to those of the same W8A8 model in float64.

    engine: the error of the engine. pytorch: the error of PyTorch in float32. Both errors come from activations that
    fall on the other side of a rounding boundary. These are rare: few tokens may have none, and then the ratio says
    nothing.
    """

    engine: float
    pytorch: float

    @property
    def ratio(self) -> float:
        return self.engine / max(self.pytorch, 1e-300)


@dataclass(frozen=True)
class Validation:
    """The comparison of one engine with the reference.

    label: the engine's name in tables. subject: model, text, settings and versions of the run (JSON values).
    checks: one for each threshold. exactness: None if it was not measured.
    linears, hidden_errors (by layer): the W8A8 errors in PyTorch (`builders.validate.layers`); empty for float engines.
    ranges, channels: the activations before and after smoothing. samples: the data of the plots.
    overflow: the place where the engine overflows in float16, though it ran here in float32; empty if it does not.
    unexplained: why a quantized engine has no errors of linears; empty if it has.
    advice: what to change in the export of an engine that misses a threshold; empty for others.
    """

    label: str
    subject: dict
    metrics: Metrics
    checks: tuple[Check, ...]
    exactness: Exactness | None
    linears: tuple[LinearError, ...]
    hidden_errors: tuple[float, ...]
    ranges: tuple[Range, ...]
    channels: Channels
    samples: Samples
    overflow: str = ""
    unexplained: str = ""
    advice: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether every threshold holds, and nothing overflows; None if nothing overflows and no threshold is set."""
        if self.overflow:
            return False
        return all(check.passed for check in self.checks) if self.checks else None

    @property
    def verdict(self) -> str:
        """One line: what overflows, which thresholds are missed and what would have passed, or that all hold."""
        unseen = "; the engine was run here in float32, which does not show it: export in bfloat16 or float32"
        missed = [self.overflow + unseen] if self.overflow else []
        missed += [check.sentence for check in self.checks if not check.passed]
        if missed:
            return "; ".join((f"{self.label}: {missed[0]}", *missed[1:])) + (self.advice and f"; try {self.advice}")
        if not self.checks:
            return f"{self.label}: measured; no threshold was given, so nothing says whether it is good enough"
        return f"{self.label}: all {len(self.checks)} thresholds hold"

    @property
    def worst(self) -> tuple[LinearError, ...]:
        """The linears with the largest errors, worst first."""
        return worst_of(self.linears)

    def as_dict(self) -> dict:
        """All fields as JSON values. Each check also has its verdict, its smallest passing limit and a sentence."""
        checks = [
            {
                **asdict(check),
                "passed": check.passed,
                "smallest_passing": check.smallest_passing,
                "sentence": check.sentence,
            }
            for check in self.checks
        ]
        exactness = {**asdict(self.exactness), "ratio": self.exactness.ratio} if self.exactness else None
        return {**asdict(self), "passed": self.passed, "checks": checks, "exactness": exactness}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Validation:
        """The inverse of `as_dict`."""
        exactness, samples, channels = content["exactness"], content["samples"], content["channels"]
        return cls(
            label=content["label"],
            subject=content["subject"],
            metrics=Metrics(**content["metrics"]),
            checks=tuple(Check(check["name"], check["value"], check["limit"]) for check in content["checks"]),
            exactness=Exactness(exactness["engine"], exactness["pytorch"]) if exactness else None,
            linears=tuple(LinearError(**linear) for linear in content["linears"]),
            hidden_errors=tuple(content["hidden_errors"]),
            ranges=tuple(Range(**_tuples(found)) for found in content["ranges"]),
            channels=Channels(**_tuples(channels)),
            samples=Samples(
                edges=tuple(samples["edges"]),
                histogram=tuple(samples["histogram"]),
                points=tuple((r, e) for r, e in samples["points"]),
            ),
            overflow=content["overflow"],
            unexplained=content["unexplained"],
            advice=content["advice"],
        )


def worst_of(linears: Sequence[LinearError]) -> tuple[LinearError, ...]:
    """The linears with the largest errors, worst first."""
    return tuple(sorted(linears, key=lambda linear: linear.sqnr)[:WORST])


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
