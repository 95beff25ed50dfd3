"""Records are read strictly: what is unknown, missing or of another type is one line that names the place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated

import pytest

from smoothquant.artifacts.record import as_json, read
from smoothquant.errors import UserError
from smoothquant.values import whole


@dataclass(frozen=True)
class Inner:
    number: float
    name: str | None = None


@dataclass(frozen=True)
class Outer:
    count: int
    flag: bool
    inner: tuple[Inner, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    limit: float | Mapping[str, float] | None = 1.0
    layers: Annotated[int, whole(1, 9)] | None = None


WHOLE = Outer(3, True, (Inner(1.5), Inner(2.0, "two")), {"a": 1})


def test_there_and_back() -> None:
    assert read(Outer, as_json(WHOLE), "here") == WHOLE
    assert read(Outer, {"count": 1, "flag": False}, "here") == Outer(1, False)
    for layers in (1, 9, None):
        assert read(Outer, as_json(replace(WHOLE, layers=layers)), "here").layers == layers
    for limit in (2.0, {"a": 0.5}, None):
        assert read(Outer, as_json(replace(WHOLE, limit=limit)), "here").limit == limit
    assert read(Inner, {"number": 1}, "here") == Inner(1)  # JSON writes 1.0 as it likes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"more": 1}, "here: unknown key 'more'; expected one of count, flag, inner, sizes, limit, layers"),
        ({"count": None}, "here.count: null; expected a whole number"),
        ({"count": True}, "here.count: true; expected a whole number"),
        ({"count": 1.5}, "here.count: 1.5; expected a whole number"),
        ({"flag": 1}, "here.flag: 1; expected true or false"),
        ({"inner": {}}, "here.inner: {}; expected a list"),
        ({"inner": [{"number": 1.0}, {}]}, "here.inner[1]: key 'number' is missing; expected all of number, name"),
        ({"inner": [{"number": "1"}]}, 'here.inner[0].number: "1"; expected a number'),
        ({"sizes": {"a": "b"}}, 'here.sizes.a: "b"; expected a whole number'),
        ({"layers": 10}, "here.layers: 10; expected a whole number from 1 to 9"),
        ({"layers": "4"}, 'here.layers: "4"; expected a whole number from 1 to 9'),
        ({"sizes": []}, "here.sizes: []; expected an object"),
        ({"limit": "1"}, 'here.limit: "1"; expected an object'),
        ({"limit": {"a": "b"}}, 'here.limit.a: "b"; expected a number'),
    ],
)
def test_what_does_not_fit(changes: dict, said: str) -> None:
    with pytest.raises(UserError) as caught:
        read(Outer, as_json(WHOLE) | changes, "here")
    assert str(caught.value).startswith(said)


def test_no_object() -> None:
    with pytest.raises(UserError, match=r"here: \[\]; expected an object"):
        read(Outer, [], "here")
