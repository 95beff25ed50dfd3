"""Limits, and the tightest that would have passed."""

from __future__ import annotations

import math

import hypothesis
import pytest
from hypothesis import strategies

from builders.validate import Check, Thresholds
from builders.validate.thresholds import AT_LEAST, MEASURES
from smoothquant.errors import UserError

MEASURED = {
    "kl_mean": 0.02,
    "kl_p99": 0.3,
    "top1": 0.95,
    "perplexity_ratio": 1.0042,
    "relative_error": 0.1,
    "exactness_ratio": 1.2,
}


def test_no_limits_no_checks() -> None:
    assert Thresholds().check(MEASURED) == ()


@pytest.mark.parametrize("name", MEASURED)
def test_a_limit_is_compared_in_its_direction_and_may_be_met_exactly(name: str) -> None:
    value, better = MEASURED[name], -1 if name in AT_LEAST else 1
    for limit, passed in ((value, True), (value + 0.001 * better, True), (value - 0.001 * better, False)):
        (check,) = Thresholds(**{name: limit}).check(MEASURED)
        assert (check.name, check.value, check.limit, check.passed) == (name, value, limit, passed)


@hypothesis.given(
    strategies.sampled_from(sorted(MEASURES)), strategies.floats(1e-12, 1e6, allow_nan=False, allow_infinity=False)
)
def test_tightest_limit_passes_and_is_tight(name: str, value: float) -> None:
    """It passes when it is set, in the digits that are printed, and is within one of four digits of the value."""
    suggested = Check(name, value, 0).smallest_passing
    assert suggested is not None
    assert Check(name, value, float(f"{suggested:g}")).passed
    assert suggested == pytest.approx(value, rel=1.001e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_passes_nothing(value: float) -> None:
    check = Check("kl_mean", value, 1.0)
    assert not check.passed
    assert check.smallest_passing is None
    assert "no threshold would have passed" in check.sentence


def test_zero_passes_at_zero() -> None:
    assert Check("kl_mean", 0.0, 0.0).passed
    assert Check("kl_mean", 0.0, 0.0).smallest_passing == 0


def test_sentences_can_be_printed() -> None:
    assert Check("kl_mean", 0.0123456, 0.01).sentence == (
        "mean KL to the reference (nats per token) is 0.01235, at most 0.01 wanted: missed; "
        "kl_mean 0.01235 would have passed"
    )
    assert Check("top1", 0.912345, 0.95).sentence.endswith(
        "at least 0.95 wanted: missed; top1 0.9123 would have passed"
    )
    assert Check("top1", 0.96, 0.95).sentence.endswith("passed")


@pytest.mark.parametrize(
    "limits", [{"kl_mean": -0.1}, {"top1": 1.5}, {"kl_p99": math.nan}, {"relative_error": math.inf}]
)
def test_impossible_limits_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(limits))):
        Thresholds(**limits)


def test_a_limit_on_what_was_not_measured_is_refused() -> None:
    with pytest.raises(UserError, match="exactness_ratio: not measured"):
        Thresholds(exactness_ratio=1.5).check({"kl_mean": 0.1})
