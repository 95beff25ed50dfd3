"""Read JSON that somebody else may have written: an object in a file, and the type and the range of its values.

Everything that is read from JSON is checked here, so that a wrong value is one line that names it and says what is
expected.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smoothquant.errors import CheckpointError, raise_refusal

LARGEST = 64 * 2**20  # bytes of a file; the index of the largest published models has some 10 MB
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


def read_object(path: Path, *, missing: str = "a JSON file", do: str = "download this file again") -> dict:
    """The object in a JSON file. missing: what should be there. do: what a user can do about a broken one.

    Raises CheckpointError for everything else, OSError for a file that the machine does not let us read.
    """

    def broken(fault: str) -> CheckpointError:
        return CheckpointError(f"{path}: {fault}", expected="a whole, readable file", do=do)

    try:
        if path.exists() and not path.is_file():  # a FIFO would never end, /dev/zero never either
            raise broken("no regular file")
        if path.exists() and path.stat().st_size > LARGEST:
            raise broken(f"{path.stat().st_size} bytes, more than any {path.name} has")
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file", expected=missing, do="check the path") from error
    except (OSError, ValueError, RecursionError) as error:
        raise_refusal(error, path)
        raise broken(f"not readable JSON ({error})") from error
    if not isinstance(content, dict):
        raise broken("not a JSON object")
    return content
