"""How JSON is damaged: keys lost, values of another type or out of all proportion, keys of elsewhere added."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from random import Random
from typing import Any

OTHER_TYPES = ("64", "", "\ud800", None, [], [64], {}, {"a": 1}, True, False, 1.5, [None], "NaN")
EXTREMES = (0, -1, 1, 2, 2**31, 2**40, 2**63, 10**30, 10**9, 0.0, -0.5, 1e-300, 1e308)
NO_NUMBERS = (float("inf"), float("-inf"), float("nan"))


def mutate(random: Random, content: dict[str, Any], foreign: Mapping[str, tuple[object, ...]]) -> str:
    """Damage JSON in one place; returns what was done, in a line. foreign: keys that may be added, and values."""
    places = list(_places(content))
    kind = random.choice(("delete", "type", "extreme", "extreme", "scale", "scale", "foreign", "foreign"))
    if kind == "foreign" or not places:
        key = random.choice(sorted(foreign))
        content[key] = copy.deepcopy(random.choice(foreign[key]))  # the next damage may be within it
        return f"{key} = {content[key]!r}"
    where, key = random.choice(places)
    if kind == "delete":
        del where[key]
        return f"{key} deleted"
    if kind == "type":
        value: Any = copy.deepcopy(random.choice(OTHER_TYPES))
    elif kind == "extreme":
        value = random.choice(EXTREMES + NO_NUMBERS)
    else:
        value = _other(random, where[key])
    where[key] = value
    return f"{key} = {value!r}"


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every container within, with each of its keys or indices."""
    keys = content.keys() if isinstance(content, dict) else range(len(content))
    found: list[tuple[Any, Any]] = []
    for key in keys:
        found.append((content, key))
        if isinstance(content[key], dict | list):
            found += _places(content[key])
    return found


def _other(random: Random, value: Any) -> Any:
    """A value of the same type, as plausible as the one before."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice((value * 2, value // 2, value + 1, value - 1, value * 3, -value))
    if isinstance(value, float):
        return random.choice((value * 2, value / 2, value * 10, -value, 1 - value, 1 / value if value else 1.0))
    if isinstance(value, list):
        return random.choice((value[:-1], value + value[:1], value[::-1], value * 2))
    if isinstance(value, dict):
        return dict(list(value.items())[: random.randrange(len(value) + 1)])
    return f"{value}x" if value else "x"
