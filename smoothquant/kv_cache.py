"""Keys and values in 8 bits: what an engine's cache holds, with one static scale for both.

    kv_scale = max(|k| rotated, |v|) / 127          k8 = clamp(round(k / kv_scale))     v8 = clamp(round(v / kv_scale))

Calibration sees keys before their rotary embedding, which turns a pair of channels (a, b) by some angle: afterwards
either of them reaches up to sqrt(a^2 + b^2). That bound is taken, so that no key of the calibration saturates.

The fold of v -> o leaves values with far smaller ranges than keys have (they are divided by some power of their own
range), and what one scale gives them is then a few steps of 127. But any constant may be folded along with it: the one
that lets values reach as far as keys costs nothing, and on the bundled model takes the KL of an 8-bit cache from 0.0034
to 0.0003 (unfolded: 0.0004).
"""

from __future__ import annotations

import torch
from torch import Tensor

from smoothquant.family import Geometry
from smoothquant.quantization import QMAX


def key_absmax(output_absmax: Tensor, geometry: Geometry, layer: int) -> Tensor:
    """How far a key of a layer reaches in the cache, scalar. output_absmax: (kv_size,) of k, before it is rotated: a
    channel of the first half of those that are, with its partner in the second."""
    rotated = 2 * len(geometry.attention[layer].inv_freq)
    heads = output_absmax.float().view(geometry.kv_heads, geometry.head_dim)
    first, second = heads[:, :rotated].chunk(2, dim=-1)
    return torch.cat((torch.hypot(first, second), heads[:, rotated:]), dim=-1).amax()


def match(smoothing_scale: Tensor, value_absmax: Tensor, key_absmax: Tensor) -> Tensor:
    """The scale that v's rows are divided by, times a constant: values then reach as far as keys.

    smoothing_scale, value_absmax: (kv_size,), value_absmax before the division; key_absmax: scalar. Returns (kv_size,).
    """
    reach = (value_absmax / smoothing_scale).amax()
    usable = (reach > 0) & (key_absmax > 0)
    return smoothing_scale * torch.where(usable, reach / key_absmax, torch.ones_like(reach))


def kv_scale(key_absmax: Tensor, value_absmax: Tensor) -> Tensor:
    """The scale of keys and values, float32 scalar > 0. key_absmax: scalar; value_absmax: (kv_size,)."""
    reach = torch.maximum(key_absmax, value_absmax.float().amax())
    return torch.where(reach > 0, reach, torch.ones_like(reach)) / QMAX
