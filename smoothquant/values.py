"""The type and the range of values in JSON that somebody else may have written.

A wrong value is one line that names it and says what is expected. Files are read by `smoothquant.reading`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smoothquant.errors import CheckpointError

RESTORE = "restore the file that came with the weights"


@dataclass(frozen=True)
class Expectation:
    """expected: in words. holds: whether a value is so."""

    expected: str
    holds: Callable[[object], bool]

    def or_null(self) -> Expectation:
        """The same, or null."""
        return Expectation(f"{self.expected}, or null", lambda value: value is None or self.holds(value))

    def check(self, value: object, where: str, do: str = RESTORE) -> None:
        """Raise CheckpointError unless it holds. where: names the value. do: what the user can do."""
        if not self.holds(value):
            raise CheckpointError(f"{where} is {shown(value)}", expected=self.expected, do=do)


def whole(low: int, high: int) -> Expectation:
    """A whole number within bounds, themselves included."""
    return Expectation(
        f"a whole number from {low} to {high}", lambda value: WHOLE.holds(value) and low <= _number(value) <= high
    )


def number(low: float, high: float, *, above: bool = False) -> Expectation:
    """A finite number within bounds. above: the lower one excluded."""
    return Expectation(
        f"a number {'above' if above else 'from'} {low:g} {'and up ' if above else ''}to {high:g}",
        lambda value: NUMBER.holds(value) and low <= _number(value) <= high and not (above and value == low),
    )


def one_of(*known: str | int | bool | None) -> Expectation:
    """One of some values, of the same type."""
    return Expectation(
        " or ".join(map(shown, known)), lambda value: any(type(value) is type(one) and value == one for one in known)
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


def _number(value: Any) -> float:
    return value


FLAG = Expectation("true or false", lambda value: isinstance(value, bool))
NAME = Expectation("a name", lambda value: isinstance(value, str))
OBJECT = Expectation("an object", lambda value: isinstance(value, dict))
LIST = Expectation("a list", lambda value: isinstance(value, list))
WHOLE = Expectation("a whole number", lambda value: type(value) is int)
NUMBER = Expectation("a number", lambda value: type(value) in (int, float))
