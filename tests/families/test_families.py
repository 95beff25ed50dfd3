"""The table: every layout, every property. `python -m tests.families.table` makes the README's table of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.families.case import Case
from tests.families.properties import PROPERTIES
from tests.zoo import ZOO


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory):
    root: Path = tmp_path_factory.mktemp("families")
    return cache(lambda name: Case(name, root / name))


@pytest.mark.parametrize("name", PROPERTIES)
@pytest.mark.parametrize("layout", ZOO)
def test_property(layout: str, name: str, cases) -> None:
    PROPERTIES[name](cases(layout))
