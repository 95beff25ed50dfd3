"""The result of validating one engine: plain values, to JSON and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from builders.validate.layers import LinearError
from builders.validate.metrics import Metrics, Samples
from builders.validate.ranges import Channels, Range
from builders.validate.thresholds import Check


@dataclass(frozen=True)
class Exactness:
    """Relative error of the logits to those of the same W8A8 model in float64: the engine's, and PyTorch's in float32.

    Both come from activations that fall on the other side of a rounding boundary. That is rare: over few tokens
    neither may have met one, and the ratio then says nothing.
    """

    engine: float
    pytorch: float

    @property
    def ratio(self) -> float:
        return self.engine / max(self.pytorch, 1e-300)


@dataclass(frozen=True)
class Validation:
    """One engine against the reference.

    label: the engine's name in tables. subject: what was run: model, text, settings, versions (JSON values).
    checks: one per threshold. exactness: None unless it was asked for.
    linears, hidden_errors (by layer): W8A8 error in PyTorch, see `builders.validate.layers`; empty for float engines.
    ranges, channels: activations before and after smoothing. samples: for the plots.
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

    @property
    def passed(self) -> bool | None:
        """Whether every threshold holds; None where there is none."""
        return all(check.passed for check in self.checks) if self.checks else None

    @property
    def verdict(self) -> str:
        """One line: which thresholds are missed and what would have passed, or that all hold."""
        missed = [check.sentence for check in self.checks if not check.passed]
        if missed:
            return f"{self.label}: " + "; ".join(missed)
        if not self.checks:
            return f"{self.label}: measured; no threshold was given, so nothing says whether it is good enough"
        return f"{self.label}: all {len(self.checks)} thresholds hold"

    def as_dict(self) -> dict:
        """JSON values: all fields, and of every check whether it passed, the smallest passing limit and a sentence."""
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
        )


def _tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
