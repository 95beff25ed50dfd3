"""Compute attention and positions like TensorRT-LLM's attention plugin, for whole sequences.

    rope_gpt_neox      halves of the first rotary_dim channels are rotated by position * inv_freq (float32)
    alibi              scores + slope * (key - query)
    alibi_with_scale   scores + slope * (key - query) * the scale of the scores

    INT8 KV cache      k, v = scale * sat(rint(x / scale)), behind the rotation

A token attends to itself and those before it, within the window if there is one.

With an INT8 cache every query reads quantized keys and values, as in generation. (The context phase of an engine reads
the keys and values of its own prompt before they are quantized, so its logits of a prompt are a little better.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from builders.tensorrt_llm.format.architectures import ALIBI, ROPE, SCALED_ALIBI
from builders.tensorrt_llm.format.config import CheckpointConfig
from smoothquant.errors import CheckpointError


@dataclass(frozen=True)
class PositionTerms:
    """The terms of attention that depend on positions alone.

    rotary: cos and sin, (tokens, rotary_dim / 2) each; None without a rotation. slopes: the ALiBi slopes of the heads
    of all ranks, (heads,), already scaled like the scores; None without ALiBi.
    """

    rotary: tuple[Tensor, Tensor] | None
    slopes: Tensor | None


def positions(config: CheckpointConfig, tokens: int, dtype: torch.dtype) -> PositionTerms:
    """The terms for the positions 0 .. tokens - 1. Raises CheckpointError for an unknown rotary_scaling."""
    if config.positions == ROPE:
        inv_freq = inverse_frequencies(config.rotary_dim, config.rotary_base, config.rotary_scaling)
        angle = torch.arange(tokens, dtype=torch.float32)[:, None] * inv_freq
        return PositionTerms((angle.cos().to(dtype), angle.sin().to(dtype)), None)
    if config.positions in (ALIBI, SCALED_ALIBI):
        slopes = alibi_slopes(config.heads).to(dtype)
        return PositionTerms(None, slopes * score_scale(config) if config.positions == SCALED_ALIBI else slopes)
    return PositionTerms(None, None)


def score_scale(config: CheckpointConfig) -> float:
    """The factor of q . k."""
    return 1 / (math.sqrt(config.head_size) * config.score_divisor)


def inverse_frequencies(rotary_dim: int, base: float, scaling: Mapping | None) -> Tensor:
    """The angle per position of each rotated pair, float32 (rotary_dim / 2,).

    scaling: Hugging Face's rope_scaling, of type linear or llama3. Raises CheckpointError for another type.
    """
    inv_freq = 1 / base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim)
    kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"
    if scaling is None or kind == "default":
        return inv_freq
    if kind == "linear":
        return inv_freq / scaling["factor"]
    if kind != "llama3":
        raise CheckpointError(
            f"rotary_scaling of type {kind!r} cannot be run here",
            expected="linear or llama3",
            do="validate the checkpoint's engine on a GPU",
        )
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = (
        scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    )  # the turns within the original context
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: a slow wave, scaled; 1: a quick wave, kept
    return inv_freq * ((1 - smooth) / scaling["factor"] + smooth)


def alibi_slopes(heads: int) -> Tensor:
    """The ALiBi slopes, float32 (heads,): 2^(-8 k / n) for the largest power of two n <= heads, and then every second
    slope for 2 n."""
    n = 2 ** math.floor(math.log2(heads))
    exponents = [-8 * k / n for k in range(1, n + 1)] + [-4 * k / n for k in range(1, 2 * (heads - n), 2)]
    return torch.tensor([2.0**exponent for exponent in exponents], dtype=torch.float32)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys after the rotation, (batch, heads, tokens, head_size). x: the same before it."""
    cos, sin = rotary
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def cached(x: Tensor, scale: Tensor | None) -> Tensor:
    """Keys or values after the cache. scale: the scale of an INT8 cache, one number; None for a float cache."""
    if scale is None:
        return x
    scale = scale.flatten().to(x.dtype)
    return (x * (1 / scale)).round().clamp(-128, 127) * scale


def attend(
    config: CheckpointConfig, qkv: Tensor, places: PositionTerms, first_head: int, kv_scale: Tensor | None
) -> Tensor:
    """The attention of one rank's heads, (batch, tokens, heads of the rank x head_size).

    qkv: (batch, tokens, rank_qkv), the queries, then the keys, then the values. first_head: the index of the rank's
    first head in the model. kv_scale: the scale of an INT8 cache; None for a float cache.
    """
    heads, kv_heads, size = config.rank_heads, config.rank_kv_heads, config.head_size
    parts = qkv.split((heads * size, kv_heads * size, kv_heads * size), dim=-1)
    q, k, v = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in parts)  # (batch, heads, tokens, size)
    if places.rotary:
        q, k = rotate(q, places.rotary), rotate(k, places.rotary)
    k, v = (cached(x, kv_scale).repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * score_scale(config)  # (batch, heads, tokens, tokens)
    tokens = torch.arange(qkv.shape[1])
    distance = tokens - tokens[:, None]  # key position - query position
    if places.slopes is not None:
        slopes = places.slopes[first_head : first_head + heads]
        scores = scores + slopes[:, None, None] * distance.to(scores.dtype)
    unseen = distance > 0
    if config.window is not None:
        unseen |= distance <= -config.window
    scores = scores.masked_fill(unseen, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
