"""Rotary embeddings are transformers' own, number by number, over random settings."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from smoothquant.errors import CheckpointError
from smoothquant.rope import SCALINGS, rotary

HEAD_DIMS = (16, 24, 64, 96, 128)


def yarn(pick: random.Random, half: int) -> dict:
    numbers: dict = {"rope_type": "yarn", "factor": pick.choice((1.0, 2.0, 4.0, 7.5, 32.0))}
    optional = {
        "attention_factor": pick.uniform(0.5, 2.0),
        "beta_fast": pick.choice((8, 32, 64.0)),
        "beta_slow": pick.choice((1, 2.0)),
        "mscale": pick.choice((0.7, 1.0)),
        "mscale_all_dim": pick.choice((0.5, 1.0)),
        "truncate": pick.choice((True, False)),
        "original_max_position_embeddings": pick.choice((64, 4096, 32768)),
    }
    return numbers | {key: value for key, value in optional.items() if pick.random() < 0.5}


def longrope(pick: random.Random, half: int) -> dict:
    numbers = {
        "rope_type": "longrope",
        "short_factor": [pick.uniform(1, 2) for _ in range(half)],
        "long_factor": [pick.uniform(1, 64) for _ in range(half)],
        "original_max_position_embeddings": pick.choice((64, 2048, 4096)),
    }
    optional = {"factor": pick.choice((1.0, 32.0)), "attention_factor": pick.uniform(0.5, 2.0)}
    return numbers | {key: value for key, value in optional.items() if pick.random() < 0.3}


def llama3(pick: random.Random, half: int) -> dict:
    return {
        "rope_type": "llama3",
        "factor": pick.choice((2.0, 8.0, 32.0)),
        "low_freq_factor": pick.choice((0.5, 1.0)),
        "high_freq_factor": pick.choice((4.0, 6.0)),
        "original_max_position_embeddings": pick.choice((64, 8192)),
    }


def linear(pick: random.Random, half: int) -> dict:
    return {"rope_type": "linear", "factor": pick.choice((1.0, 2.0, 3.7))}


SETTINGS = {"yarn": yarn, "longrope": longrope, "llama3": llama3, "linear": linear}


def test_every_scaling_is_compared() -> None:
    assert set(SETTINGS) == set(SCALINGS) - {"default"} == set(ROPE_INIT_FUNCTIONS) - {"dynamic", "proportional"}


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("kind", SETTINGS)
def test_numbers_are_those_of_transformers(kind: str, seed: int, spelling: str) -> None:
    pick = random.Random(seed)
    head_dim, partial = pick.choice(HEAD_DIMS), pick.choice((1.0, 1.0, 0.5, 0.75))
    rope = SETTINGS[kind](pick, int(head_dim * partial) // 2)
    theta = pick.choice((10000.0, 500000.0, 1e6, 1234.5))
    config = {"head_dim": head_dim, "hidden_size": 4 * head_dim, "num_attention_heads": 4}
    config["max_position_embeddings"] = pick.choice((4096, 32768, 131072))
    if spelling == "rope_parameters":
        config["rope_parameters"] = rope | {"rope_theta": theta, "partial_rotary_factor": partial}
    else:
        old = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
        config |= {"rope_theta": theta, "partial_rotary_factor": partial, "rope_scaling": old}
    found = rotary(config, head_dim, partial=True)

    theirs = LlamaConfig(**config)  # after: it changes the dictionaries that it is given
    expected, scale = ROPE_INIT_FUNCTIONS[kind](theirs)
    assert torch.equal(torch.tensor(found.inv_freq), expected)
    assert found.rotary_scale == scale
    if kind == "longrope":
        original = theirs.rope_parameters["original_max_position_embeddings"]
        expected, scale = ROPE_INIT_FUNCTIONS[kind](theirs, seq_len=original + 1)
        assert (found.short_positions, found.rotary_scale) == (original, scale)
        assert torch.equal(torch.tensor(found.long_inv_freq), expected)


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_longrope_by_the_names_of_the_first_phi3(name: str) -> None:
    """Its original length lies beside the scaling, not in it. (transformers 5.23 stumbles over "su" without it.)"""
    factors = {"short_factor": [1.0 + n / 10 for n in range(8)], "long_factor": [2.0 + n for n in range(8)]}
    config = {"head_dim": 16, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 131072}
    config |= {"original_max_position_embeddings": 4096}
    found = rotary(config | {"rope_scaling": {"type": name, **factors}}, 16)
    theirs = Phi3Config(**config, rope_scaling={"type": "longrope", **factors})
    expected, scale = ROPE_INIT_FUNCTIONS["longrope"](theirs)
    assert torch.equal(torch.tensor(found.inv_freq), expected)
    assert (found.rotary_scale, found.short_positions) == (scale, 4096)


def test_dynamic_scaling_is_refused_with_what_to_do() -> None:
    with pytest.raises(CheckpointError, match=r"'dynamic' changes its frequencies with every token .* to null"):
        rotary({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 16)


def test_longrope_with_factors_for_other_heads() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0] * 12}
    with pytest.raises(CheckpointError, match="long_factor has 12 numbers; expected 8, half of the channels"):
        rotary({"rope_scaling": {"rope_type": "longrope", **factors}}, 16)


@pytest.mark.parametrize("head_dim", [1, 15])
def test_heads_that_have_no_pairs(head_dim: int) -> None:
    with pytest.raises(CheckpointError, match=f"heads with {head_dim} channels; expected an even number"):
        rotary({}, head_dim)


def test_a_part_of_a_head_that_has_no_pairs_is_rounded_up() -> None:
    """As in transformers."""
    assert len(rotary({"partial_rotary_factor": 0.3125}, 16, partial=True).inv_freq) == 3
