"""Rotary embeddings out of a config.json, in both spellings, with their scaling applied.

    angle of channel pair i at position p  =  p * inv_freq[i]         q, k -> q, k * rotary_scale, turned by it

    default    inv_freq = theta^(-2i / rotated)
    linear     inv_freq / factor
    llama3     by wavelength: short ones kept, long ones divided by factor, blended between
    yarn       by turns within the original context: the same with other bounds, and rotary_scale = 0.1 ln(factor) + 1
    longrope   inv_freq / short_factor[i], or / long_factor[i] where sequences are longer than the original context;
               rotary_scale = sqrt(1 + ln(factor) / ln(original))

The numbers are those of transformers (modeling_rope_utils), bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from smoothquant.errors import CheckpointError
from smoothquant.family import Attention
from smoothquant.values import RESTORE

ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")  # of config.json


@dataclass(frozen=True)
class Rope:
    """What a scaling is computed from. kind: its name in `SCALINGS`; numbers: its own keys; rotated: channels of a head
    that are turned; positions: tokens that the model takes; original: tokens that it was first trained with."""

    kind: str
    numbers: Mapping
    theta: float
    rotated: int
    positions: int
    original: int

    @property
    def inv_freq(self) -> Tensor:
        """Without scaling, float32 (rotated / 2,)."""
        return 1.0 / self.waves

    @property
    def waves(self) -> Tensor:
        """theta^(2i / rotated), float32 (rotated / 2,)."""
        return self.theta ** (torch.arange(0, self.rotated, 2, dtype=torch.float32) / self.rotated)

    @property
    def stretch(self) -> float:
        """How much longer sequences are than the original ones; a config's own `factor` goes before it."""
        return self.positions / self.original


def rotary(config: Mapping, head_dim: int, theta: float = 10000.0, *, partial: bool = False) -> Attention:
    """The rotary embedding of a config.json, as an `Attention` without a window. The arguments are `read_rope`'s."""
    rope = read_rope(config, head_dim, theta, partial=partial)
    try:
        return SCALINGS[rope.kind](rope)
    except KeyError as error:
        raise CheckpointError(
            f"config.json: the rotary embeddings are of type {rope.kind!r} and have no {error.args[0]}",
            expected="all numbers of the type",
            do=f'add "{error.args[0]}" beside rope_type (the model card names it), or set rope_scaling to null',
        ) from error


def read_rope(config: Mapping, head_dim: int, theta: float = 10000.0, *, partial: bool = False) -> Rope:
    """What a config.json says of its rotary embedding.

    Reads both spellings: `rope_parameters` (transformers >= 5) and `rope_theta` + `rope_scaling`, which goes first.
    theta: where the config names none. partial: whether the family knows a `partial_rotary_factor`, which either
    spelling may give. Raises CheckpointError for a type not in `SCALINGS`.
    """
    numbers = config.get("rope_scaling") or config.get("rope_parameters") or {}
    places = (numbers, config) if partial else ()
    shares = [place["partial_rotary_factor"] for place in places if place.get("partial_rotary_factor")]
    rotated = int(head_dim * (shares or [1.0])[0])
    if rotated % 2 and rotated == head_dim:
        raise CheckpointError(
            f"config.json: rotary embeddings of heads with {head_dim} channels",
            expected="an even number of them, which are turned in pairs",
            do=RESTORE,
        )
    positions = config.get("max_position_embeddings", 2048)
    beside, within = (place.get("original_max_position_embeddings") for place in (config, numbers))
    return Rope(
        _kind(numbers),
        numbers,
        theta=_theta(config, numbers, theta),
        rotated=rotated,
        positions=positions,
        original=beside or within or positions,
    )


def _kind(numbers: Mapping) -> str:
    kind = numbers.get("rope_type") or numbers.get("type") or "default"
    if kind == "su" or (kind == "yarn" and numbers.get("long_factor")):  # what the first Phi-3's called it
        return "longrope"
    if kind == "dynamic":
        raise CheckpointError(
            "config.json: RoPE type 'dynamic' changes its frequencies with every token beyond max_position_embeddings, "
            "which the cached keys of an engine cannot follow",
            do="set rope_scaling to null (or the rope_type of rope_parameters to default): up to "
            "max_position_embeddings it is the same model",
        )
    if kind not in SCALINGS:
        raise CheckpointError(
            f"config.json: RoPE type {kind!r} is not supported",
            expected=f"one of {', '.join(SCALINGS)}",
            do="export a checkpoint with one of these",
        )
    return kind


def _theta(config: Mapping, rope: Mapping, default: float) -> float:
    """The base of the frequencies, which either spelling may name."""
    named = [value for value in (rope.get("rope_theta"), config.get("rope_theta")) if value is not None]
    if len(set(named)) > 1:
        raise CheckpointError(
            f"config.json: rope_theta is {' and '.join(map(str, named))}",
            expected="one number",
            do=RESTORE,
        )
    return named[0] if named else default


def _attention(inv_freq: Tensor, rotary_scale: float = 1.0) -> Attention:
    return Attention(inv_freq=tuple(inv_freq.tolist()), rotary_scale=rotary_scale)


def _default(rope: Rope) -> Attention:
    return _attention(rope.inv_freq)


def _linear(rope: Rope) -> Attention:
    return _attention(rope.inv_freq / rope.numbers["factor"])


def _llama3(rope: Rope) -> Attention:
    inv_freq, numbers = rope.inv_freq, rope.numbers
    low, high, factor = numbers["low_freq_factor"], numbers["high_freq_factor"], numbers["factor"]
    if not low < high:
        raise CheckpointError(
            f"config.json: low_freq_factor is {low} and high_freq_factor is {high}",
            expected="a higher one for high frequencies",
            do=RESTORE,
        )
    wavelength = 2 * math.pi / inv_freq
    blend = ((rope.original / wavelength - low) / (high - low)).clamp(0, 1)  # 0: long waves, slowed; 1: short, kept
    return _attention((1 - blend) * inv_freq / factor + blend * inv_freq)


def _yarn(rope: Rope) -> Attention:
    """Peng et al., ICLR 2024."""
    numbers, factor = rope.numbers, rope.numbers["factor"] or rope.stretch

    def pair_with(turns: float) -> float:
        """The channel pair, a fraction, that turns so often within the original context."""
        return rope.rotated * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(numbers.get("beta_fast") or 32), pair_with(numbers.get("beta_slow") or 1)
    if numbers.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotated - 1)
    high += 0.001 if low == high else 0
    slowed = ((torch.arange(rope.rotated // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - slowed
    inv_freq = 1.0 / (factor * rope.waves) * (1 - kept) + rope.inv_freq * kept
    scale, over, under = (numbers.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if scale is None:
        scale = _mscale(factor, over) / _mscale(factor, under) if over and under else _mscale(factor, 1)
    return _attention(inv_freq, scale)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(rope: Rope) -> Attention:
    """Ding et al., ICML 2024. Its frequencies are chosen by the length of sequences (`Geometry.upto`)."""
    numbers, factor = rope.numbers, rope.numbers.get("factor") or rope.stretch
    scale = numbers.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(rope.original)) if factor > 1 else 1.0
    found = []
    for key in ("short_factor", "long_factor"):
        factors = torch.tensor(numbers[key], dtype=torch.float32)
        if factors.shape != rope.waves.shape:
            raise CheckpointError(
                f"config.json: {key} has {len(factors)} numbers",
                expected=f"{len(rope.waves)}, half of the channels of a head that are rotated",
                do=RESTORE,
            )
        found.append(tuple((1.0 / (factors * rope.waves)).tolist()))
    return Attention(inv_freq=found[0], rotary_scale=scale, long_inv_freq=found[1], short_positions=rope.original)


SCALINGS: Mapping[str, Callable[[Rope], Attention]] = {
    "default": _default,
    "linear": _linear,  # position interpolation
    "llama3": _llama3,  # as in Llama 3.1's reference code
    "yarn": _yarn,
    "longrope": _longrope,
}
