"""What a value of JSON must be: its type and its range, with the words for who gave another."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

from smoothquant.errors import CheckpointError


@dataclass(frozen=True)
class Expectation:
    """expected: in words. holds: whether a value is so."""

    expected: str
    holds: Callable[[object], bool]

    def or_null(self) -> Expectation:
        """The same, or null."""
        return Expectation(f"{self.expected}, or null", lambda value: value is None or self.holds(value))

    def check(self, value: object, where: str) -> None:
        """Raise CheckpointError unless it holds. where: names the value."""
        if not self.holds(value):
            raise CheckpointError(
                f"{where} is {shown(value)}",
                expected=self.expected,
                do="restore the file that came with the weights",
            )


def whole(low: int, high: int) -> Expectation:
    """A whole number within bounds, themselves included."""
    return Expectation(
        f"a whole number from {low} to {high}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
    )


def number(low: float, high: float, *, above: bool = False) -> Expectation:
    """A finite number within bounds. above: the lower one excluded."""

    def holds(value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            return False
        return math.isfinite(value) and not (above and value == low)

    return Expectation(
        f"a number {'above' if above else 'from'} {low:g} {'and up ' if above else ''}to {high:g}", holds
    )


def listed(rule: Expectation) -> Expectation:
    """A list, of which each value is so."""
    return Expectation(
        f"a list, each of it {rule.expected}",
        lambda value: isinstance(value, list) and all(rule.holds(one) for one in value),
    )


def shown(value: object) -> str:
    """A value as JSON has it, in a line and not long."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."


FLAG = Expectation("true or false", lambda value: isinstance(value, bool))
NAME = Expectation("a name", lambda value: isinstance(value, str))
OBJECT = Expectation("an object", lambda value: isinstance(value, dict))
