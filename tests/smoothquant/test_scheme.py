"""One record says what is INT8; nothing else gets into a manifest, or out of one."""

from __future__ import annotations

import itertools

import pytest

from smoothquant.artifacts.record import as_json, read
from smoothquant.errors import UserError
from smoothquant.scheme import ACTIVATIONS, CACHES, EMBEDDINGS, FLOAT, HEADS, WEIGHTS, Precision, Scheme, scheme_of


@pytest.mark.parametrize("names", list(itertools.product(ACTIVATIONS, WEIGHTS, CACHES, HEADS, EMBEDDINGS)))
def test_every_preset_comes_back(names: tuple[str, str, str, str, str]) -> None:
    if (names[1] == "float") != (names[0] == "float"):
        return
    scheme = scheme_of(*names, float_linears=("layers.0.down",))
    assert read(Scheme, as_json(scheme), "here") == scheme
    assert (scheme.activations.form, scheme.weights.form) == names[:2]


def test_per_token_is_the_only_dynamic_one() -> None:
    assert not ACTIVATIONS["per-token"].static
    assert ACTIVATIONS["per-tensor"].static
    held = [precision for presets in (WEIGHTS, CACHES, HEADS, EMBEDDINGS) for precision in presets.values()]
    assert all(precision.static for precision in held if precision != FLOAT)


def test_a_record_from_before_embeddings() -> None:
    """Has a float one."""
    content = as_json(scheme_of("per-token", head="int8"))
    del content["embedding"]
    assert read(Scheme, content, "here") == scheme_of("per-token", head="int8")


def test_what_is_no_scheme() -> None:
    with pytest.raises(UserError, match="weights 'per-group'; expected one of float, per-channel, per-tensor"):
        scheme_of("per-token", "per-group")
    with pytest.raises(UserError, match="activations 'per-group'; expected one of per-token, per-tensor, float"):
        Scheme(WEIGHTS["per-channel"], Precision("int8", "per-group", static=False))
    with pytest.raises(UserError, match="float weights with per-token activations; expected both"):
        Scheme(FLOAT, ACTIVATIONS["per-token"])
    content = as_json(scheme_of("per-token"))
    with pytest.raises(UserError, match="unknown key 'experts'"):
        read(Scheme, content | {"experts": []}, "here")
    with pytest.raises(UserError, match="key 'weights' is missing"):
        read(Scheme, {key: value for key, value in content.items() if key != "weights"}, "here")
