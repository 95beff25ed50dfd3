"""Roles: strings that know their kind and their expert."""

from __future__ import annotations

import copy
import pickle

import pytest

from smoothquant.roles import Role, parsed


@pytest.mark.parametrize(("text", "kind", "expert"), [("q", "q", None), ("gate.0", "gate", 0), ("up.127", "up", 127)])
def test_a_role_is_its_string(text: str, kind: str, expert: int | None) -> None:
    role = parsed(text)
    for one in (role, Role(kind, expert), copy.deepcopy(role), pickle.loads(pickle.dumps(role))):
        assert (one, one.kind, one.expert) == (text, kind, expert)
        assert {text: 1}[one] == 1
