"""Every key of config.json that a record reads has a type and a range, and every other value is one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from recipes.families import FAMILIES
from smoothquant.config import Config
from smoothquant.config_keys import KEYS
from smoothquant.errors import CheckpointError
from smoothquant.family import Geometry
from smoothquant.values import FLAG, NAME, Expectation, listed, number, whole
from tests.zoo import COMMON, ZOO
from tests.zoo.hub_configs import CONFIGS

BY_TYPE = {kind: family for family in FAMILIES for kind in family.model_types}
# What no key takes: JSON's other types, and numbers out of all proportion.
WRONG = ({"a": 1}, [{}], "\ud800", float("nan"), float("inf"), float("-inf"), 10**30, -(10**30), [float("nan")])


def layout_config(name: str) -> dict[str, Any]:
    layout = ZOO[name]
    config = layout.model.config_class(**(COMMON | dict(layout.numbers)))
    return json.loads(config.to_json_string(use_diff=False))


ALL = {**CONFIGS, **{f"layout {name}": layout_config(name) for name in ZOO}}


def read(content: dict[str, Any]) -> tuple[Config, Geometry]:
    config, family = Config(content), BY_TYPE[content["model_type"]]
    record = family.variant(config) if family.variant else family
    return config, record.geometry(config)


@pytest.mark.parametrize("name", ALL)
def test_every_key_that_is_read_has_an_expectation(name: str) -> None:
    config, _ = read(ALL[name])
    assert {path[-1] for path in config.read} <= KEYS.keys()


def test_every_expectation_is_of_a_key_that_is_read() -> None:
    read_by_some = {path[-1] for content in ALL.values() for path in read(content)[0].read}
    everywhere = {"model_type", "architectures"}
    old = {"n_embed", "type"}  # of the first BLOOMs, and of rope_scaling before it had a rope_type
    assert KEYS.keys() - read_by_some == everywhere | old


@pytest.mark.parametrize("name", ALL)
def test_a_value_that_nothing_takes_is_one_line(name: str) -> None:
    tried = 0
    for path, changed, wrong in spoiled(ALL[name]):
        if KEYS[path[-1]].holds(wrong):  # an object without the keys that it should have, or an unknown name
            continue
        with pytest.raises(CheckpointError) as caught:
            read(changed)
        assert f"{'.'.join(path)} is " in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300
        tried += 1
    assert tried > 50


def spoiled(content: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any], object]]:
    """Every path that is read and there, the config with a wrong value at it, and that value."""
    for path in sorted(read(content)[0].read):
        for wrong in WRONG if has(content, path) else ():
            changed = copy.deepcopy(content)
            place = changed
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = wrong
            yield path, changed, wrong


def has(content: Any, path: tuple[str, ...]) -> bool:
    return not path or (isinstance(content, dict) and path[0] in content and has(content[path[0]], path[1:]))


@pytest.mark.parametrize(
    ("rule", "right", "wrong"),
    [
        (whole(1, 9), [1, 9], [0, 10, 1.0, True, "1", None, [1]]),
        (whole(1, 9).or_null(), [1, None], [0, False]),
        (number(0, 1), [0, 0.5, 1], [-0.1, 1.1, float("nan"), float("inf"), False, "0"]),
        (number(0, 1, above=True), [1e-300, 1], [0, 0.0]),
        (listed(whole(1, 9)), [[], [1, 2]], [[0], 1, None, {}, [None]]),
        (FLAG, [True, False], [0, 1, None, "true"]),
        (NAME, ["", "a"], [None, 1, ["a"]]),
    ],
)
def test_what_holds(rule: Expectation, right: list, wrong: list) -> None:
    for value in right:
        rule.check(value, "here")
    for value in wrong:
        with pytest.raises(CheckpointError, match=r"^here is .*; expected "):
            rule.check(value, "here")
