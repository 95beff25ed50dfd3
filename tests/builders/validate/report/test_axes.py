"""Ticks are round and lie within their axis, whatever the values."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies

from builders.validate.report.svg import Axis, layer_axis, linear_axis, log_axis, power_label

values = strategies.lists(strategies.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=5)
positive = strategies.lists(strategies.floats(0, 1e8), min_size=1, max_size=5)


@hypothesis.given(values)
def test_linear_ticks(numbers: list[float]) -> None:
    axis = linear_axis("", numbers)
    ticks = [value for value, _ in axis.ticks()]
    assert 2 <= len(ticks) <= 12
    assert ticks == sorted(set(ticks))
    assert all(axis.low - abs(axis.low) * 1e-6 <= tick <= axis.high + abs(axis.high) * 1e-6 for tick in ticks)
    assert all(0 <= axis.place(number) <= 1 for number in numbers)


@hypothesis.given(positive)
def test_logarithmic_ticks(numbers: list[float]) -> None:
    axis = log_axis("", numbers, floor=1e-9)
    ticks = axis.ticks()
    assert len(ticks) <= 12
    assert all(float(label) == pytest.approx(value) for value, label in ticks)
    assert all(0 <= axis.place(number) <= 1 for number in numbers)


@pytest.mark.parametrize("layers", [1, 2, 4, 7, 32, 80, 126])
def test_layers_are_whole_numbers(layers: int) -> None:
    ticks = layer_axis(layers).ticks()
    assert [label for _, label in ticks] == [str(int(value)) for value, _ in ticks]
    assert ticks[0] == (0, "0")
    assert all(0 <= value < layers for value, _ in ticks)
    assert len(ticks) <= 11


def test_places() -> None:
    assert Axis("", 0, 10).place(2.5) == 0.25
    assert Axis("", 1e-4, 1, log=True).place(1e-2) == pytest.approx(0.5)
    assert Axis("", 1e-4, 1, log=True).place(0) == 0


@pytest.mark.parametrize(
    ("value", "label"), [(0.001, "0.001"), (1000, "1000"), (1e-5, "1e-5"), (2e-12, "2e-12"), (1e6, "1e6")]
)
def test_labels(value: float, label: str) -> None:
    assert power_label(value) == label
