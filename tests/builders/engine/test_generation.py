"""The choice of a token is what it says; a cache keeps what is still looked at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import cast

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders.engine.generation import end_tokens, pick, tokens_to_keep
from smoothquant.errors import UserError

few = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40).map(
    lambda values: numpy.array(values, numpy.float32)
)
many = st.tuples(st.integers(0, 2**31), st.integers(200, 3000), st.sampled_from([0.0, 0.1, 3.0, 30.0])).map(
    lambda drawn: (drawn[2] * numpy.random.default_rng(drawn[0]).standard_normal(drawn[1])).astype(numpy.float32)
)
logits = few | many


def softmax(logits: numpy.ndarray) -> numpy.ndarray:
    return torch.softmax(torch.from_numpy(logits).double(), dim=-1).numpy()


@given(logits, st.floats(0.05, 5), st.floats(0.01, 1), st.integers(0, 2**31))
def test_picked_token_is_in_the_nucleus(logits: numpy.ndarray, temperature: float, top_p: float, seed: int) -> None:
    """Likelier tokens have less than top_p together: the token belongs to the smallest set of that mass."""
    token = pick(logits, temperature, top_p, numpy.random.default_rng(seed))
    probabilities = softmax(logits / temperature)
    likelier = probabilities[probabilities > probabilities[token]].sum()
    assert likelier < top_p + 1e-12


@given(logits, st.integers(0, 2**31))
def test_no_temperature_is_greedy(logits: numpy.ndarray, seed: int) -> None:
    generator = numpy.random.default_rng(seed)
    assert logits[pick(logits, 0.0, 0.3, generator)] == logits.max()
    for cold in (1e-3, 1e-30, 1e-300, 5e-324):  # and next to none is finite, and close to it
        picked = logits[pick(logits, cold, 1e-6, generator)].astype(numpy.float64)
        assert logits.max() - picked <= cold * 1e-15  # nearer ones have the same probability in float64


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_frequencies_are_the_probabilities(temperature: float, top_p: float) -> None:
    logits, draws = numpy.array([0.3, -1.0, 1.4, 0.9, -2.5], numpy.float32), 4000
    generator = numpy.random.default_rng(0)
    counts = numpy.zeros(5)
    for _ in range(draws):
        counts[pick(logits, temperature, top_p, generator)] += 1
    expected = softmax(logits / temperature)
    order = (-expected).argsort()
    size = next(n for n in range(1, 6) if expected[order[:n]].sum() >= top_p - 1e-6)
    nucleus = numpy.zeros(5)
    nucleus[order[:size]] = 1.0
    expected = expected * nucleus / (expected * nucleus).sum()
    assert (counts[nucleus == 0] == 0).all()
    # five standard deviations of a binomial count
    assert (abs(counts - draws * expected) <= 5 * numpy.sqrt(draws * expected * (1 - expected)) + 1e-6).all()


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_frequencies_in_a_vocabulary(top_p: float) -> None:
    """Tokens of one in five probabilities, 600 of each: as often as they are likely, wherever they stand."""
    logits = numpy.tile(numpy.log(numpy.array([1, 2, 3, 4, 5], numpy.float32)), 600)
    generator, draws = numpy.random.default_rng(0), 4000
    tokens = numpy.array([pick(logits, 1.0, top_p, generator) for _ in range(draws)])
    kept = numpy.array([1, 2, 3, 4, 5]) * (1.0 if top_p == 1 else numpy.array([0, 0.75, 1, 1, 1]))
    everywhere = numpy.isin(tokens % 5, [2, 3, 4])  # which of the twos are left out is not said
    for found, shares in (
        (numpy.bincount(tokens % 5, minlength=5), kept / kept.sum()),
        (numpy.bincount(tokens[everywhere] // 750, minlength=4), numpy.full(4, 0.25)),
    ):
        count = found.sum()
        assert (abs(found - count * shares) <= 5 * numpy.sqrt(count * shares * (1 - shares))).all()


@pytest.mark.parametrize("top_p", [1.0, 0.999])
def test_the_largest_draw_is_a_possible_token(top_p: float) -> None:
    class Largest:
        def random(self) -> float:
            return math.nextafter(1.0, 0.0)

    logits = numpy.full(1000, -math.inf, numpy.float32)
    logits[[3, 300, 511]] = [0.3, 0.1, 0.2]
    generator = cast("numpy.random.Generator", Largest())
    assert pick(logits, 0.7, top_p, generator) == (511 if top_p == 1 else 300)


@given(st.integers(1, 500), st.integers(1, 100))
def test_window_of_a_cache(cached: int, window: int) -> None:
    kept = tokens_to_keep(cached, window)
    assert kept == cached or window - 1 == kept < cached
    assert kept <= 2 * window
    assert kept >= min(cached, window - 1)  # what the next token sees
    assert tokens_to_keep(cached, None) == cached


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("logits", [[1.0, math.nan], [1.0, math.inf], [-math.inf, -math.inf], [-math.inf, math.nan]])
def test_logits_that_are_no_numbers_are_refused(logits: list[float], temperature: float) -> None:
    with pytest.raises(UserError, match="logits are NaN or infinite"):
        pick(numpy.array(logits, numpy.float32), temperature, 1.0, numpy.random.default_rng(0))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_may_be_impossible(temperature: float) -> None:
    assert pick(numpy.array([-math.inf, 1.0], numpy.float32), temperature, 1.0, numpy.random.default_rng(0)) == 1


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": 1}, {"eos_token_id": 2}, {1}),
        ({"eos_token_id": [1, 3]}, {"eos_token_id": 2}, {1, 3}),
        ({"eos_token_id": None}, {"eos_token_id": 2}, {2}),
        ({"eos_token_id": None}, {"eos_token_id": [2, 3]}, {2, 3}),
        ({}, {"eos_token_id": 2}, {2}),
        (None, {"eos_token_id": 2}, {2}),
        ({"eos_token_id": None}, {"eos_token_id": None}, set()),
        ({"eos_token_id": 0}, {"eos_token_id": 2}, {0}),
    ],
)
def test_tokens_that_end_a_sequence(generation: dict | None, config: dict, ends: set[int], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert end_tokens(tmp_path) == ends


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("wrong", ["2", [2, None], True, {"id": 2}, 2.0, 2**31, -2])
def test_tokens_of_another_type_are_refused(wrong: object, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(json.dumps({"eos_token_id": wrong}))
    with pytest.raises(UserError, match=rf"/{name}: eos_token_id is .*expected a token id, or a list of them"):
        end_tokens(tmp_path)
    (tmp_path / name).write_text(json.dumps({"pad_token_id": wrong}))
    with pytest.raises(UserError, match=rf"/{name}: pad_token_id is .*expected a whole number from -1"):
        end_tokens(tmp_path)
