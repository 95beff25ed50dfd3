"""Compute attention in PyTorch, with the positions and masks of the layers.

    scores = scale * q k^T (+ ALiBi), soft-capped        causal, and within the window of the layer if it has one
    y      = softmax(scores) v

A `Pattern` holds the terms that depend on positions alone. Layers with the same `family.Attention` share one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from smoothquant.family import Alibi, Attention, Geometry
from smoothquant.model import Model


@dataclass(frozen=True)
class Pattern:
    """The terms of attention that depend on positions alone.

    rotary: cos and sin, (tokens, rotated channels / 2) each; None without a rotation. bias: a summand of the scores,
    (heads or 1, tokens, tokens), -inf where a query does not see a key; None if attention is only causal.
    """

    rotary: tuple[Tensor, Tensor] | None
    bias: Tensor | None

    def upto(self, tokens: int) -> Pattern:
        """The pattern of the first `tokens` positions."""
        rotary = self.rotary and (self.rotary[0][:tokens], self.rotary[1][:tokens])
        return Pattern(rotary, None if self.bias is None else self.bias[:, :tokens, :tokens])


@dataclass(frozen=True)
class Patterns:
    """The pattern of every layer. kinds: `Geometry.attention`, one entry per layer. found: the pattern of each kind."""

    kinds: tuple[Attention, ...]
    found: dict[Attention, Pattern]

    def __getitem__(self, layer: int) -> Pattern:
        return self.found[self.kinds[layer]]

    def upto(self, tokens: int) -> Patterns:
        """The patterns of the first `tokens` positions."""
        return Patterns(self.kinds, {kind: pattern.upto(tokens) for kind, pattern in self.found.items()})


def patterns(model: Model, tokens: int, dtype: torch.dtype, device: str = "cpu") -> Patterns:
    """The patterns for positions 0 .. tokens - 1. dtype: the dtype of cos, sin and bias."""
    geometry, alibi = model.geometry, model.family.alibi
    found = {}
    for kind in dict.fromkeys(geometry.attention):
        rotary = None
        if kind.inv_freq:
            angle = torch.arange(tokens, dtype=torch.float32)[:, None] * torch.tensor(kind.inv_freq)
            cos, sin = angle.cos() * kind.rotary_scale, angle.sin() * kind.rotary_scale
            rotary = (cos.to(device, dtype), sin.to(device, dtype))
        window = kind.window if kind.window is not None and kind.window < tokens else None
        bias = None
        if window or alibi or geometry.attention_softcap:
            query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
            seen = (key <= query) & (key > query - window) if window else key <= query
            bias = torch.zeros(1, tokens, tokens, dtype=dtype)
            if alibi:
                slope = alibi_bias(alibi, geometry, torch.arange(tokens)).to(dtype)
                bias = slope[:, None] - slope[:, :, None]  # relative to the query: softmax does not see the difference
            bias = bias.masked_fill(~seen, -math.inf).to(device)
        found[kind] = Pattern(rotary, bias)
    return Patterns(geometry.attention, found)


def attend(geometry: Geometry, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The output of attention, (batch, heads, tokens, head_dim).

    q: (batch, heads, tokens, head_dim). k, v: (batch, kv_heads, tokens, head_dim). bias: a pattern's.
    """
    scale, softcap = geometry.score_scale, geometry.attention_softcap
    if not softcap:
        mask = None if bias is None else bias[None]
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=bias is None, scale=scale, enable_gqa=True
        )
    group = geometry.heads // geometry.kv_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    assert bias is not None, "patterns give soft-capped scores their mask"
    return (capped(scale * q @ k.transpose(-1, -2), softcap) + bias).softmax(dim=-1) @ v


def capped(x: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(x / softcap), or x itself if softcap is 0."""
    return torch.tanh(x / softcap) * softcap if softcap else x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding of x, (..., tokens, head_dim).

    cos, sin: (tokens, n). The first 2 n channels are rotated, channel i with channel i + n; the others stay.
    """
    rotated = 2 * cos.shape[-1]
    first, second = x[..., :rotated].chunk(2, dim=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat(parts if rotated == x.shape[-1] else [*parts, x[..., rotated:]], dim=-1)


def alibi_slopes(heads: int) -> Tensor:
    """The slope of every head, float32 (heads,): powers of 2^(-8/n) for the largest power of two n <= heads, and then
    every second slope for 2n. Source: ALiBi's reference code, which transformers has for BLOOM and Falcon."""
    n = 2 ** math.floor(math.log2(heads))
    base, extra = (torch.tensor(2 ** (-(2 ** -(math.log2(size) - 3)))) for size in (n, 2 * n))
    powers, more = torch.arange(1, n + 1), torch.arange(1, 1 + 2 * (heads - n), 2)
    return torch.cat((base.pow(powers), extra.pow(more)))


def alibi_bias(alibi: Alibi, geometry: Geometry, positions: Tensor) -> Tensor:
    """The bias of keys, float32 (heads, ...), already scaled like the scores. positions: int64 (...)."""
    slopes = alibi_slopes(geometry.heads).to(alibi.dtype)
    bias = (slopes.view(-1, *[1] * positions.dim()) * positions).to(alibi.dtype).float()
    return bias * geometry.score_scale if alibi.scaled else bias
