"""Rotary embeddings: inverse frequencies out of a config.json, in both spellings, with their scaling applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from smoothquant.errors import CheckpointError

ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")  # of config.json


def rope_inv_freq(config: Mapping, head_dim: int, theta: float = 10000.0) -> tuple[float, ...]:
    """Inverse frequencies, float32 numbers, half as many as the channels of a head that are rotated.

    Reads both spellings: `rope_parameters` (transformers >= 5) and `rope_theta` + `rope_scaling`; either may give a
    `partial_rotary_factor`. theta: where the config names none. Raises CheckpointError for a type not in `SCALINGS`.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = _theta(config, rope, theta)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in SCALINGS:
        raise CheckpointError(
            f"config.json: RoPE type {kind!r} is not supported",
            expected=f"one of {', '.join(SCALINGS)}",
            do="export a checkpoint with one of these",
        )
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    rotated = int(head_dim * partial)
    inv_freq = 1.0 / (theta ** (torch.arange(0, rotated, 2, dtype=torch.float32) / rotated))
    return tuple(SCALINGS[kind](inv_freq, rope).tolist())


def _theta(config: Mapping, rope: Mapping, default: float) -> float:
    """The base of the frequencies, which either spelling may name."""
    named = [value for value in (rope.get("rope_theta"), config.get("rope_theta")) if value is not None]
    if len(set(named)) > 1 or not all(value > 0 for value in named):
        raise CheckpointError(
            f"config.json: rope_theta is {' and '.join(map(str, named))}",
            expected="one number above 0",
            do="restore the config.json that came with the weights",
        )
    return named[0] if named else default


def _linear_scaling(inv_freq: Tensor, rope: Mapping) -> Tensor:
    return inv_freq / rope["factor"]


def _llama3_scaling(inv_freq: Tensor, rope: Mapping) -> Tensor:
    original = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    wavelength = 2 * math.pi / inv_freq
    blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)  # 0: long waves, slowed; 1: short, kept
    return (1 - blend) * inv_freq / factor + blend * inv_freq


SCALINGS: Mapping[str, Callable[[Tensor, Mapping], Tensor]] = {
    "default": lambda inv_freq, rope: inv_freq,
    "linear": _linear_scaling,  # position interpolation
    "llama3": _llama3_scaling,  # by frequency, as in Llama 3.1's reference code
}
