"""Keys and values in an 8-bit cache, with one static scale of the layer for each of the two.

    key_scale = max |k| rotated / 127           k8 = clamp(round(k / key_scale))
    value_scale = max |v| / 127                 v8 = clamp(round(v / value_scale))

Calibration sees keys before their rotary embedding, which turns a pair of channels (a, b) by some angle. Afterwards
either channel reaches up to sqrt(a^2 + b^2). This bound is taken, so that no key of the calibration saturates. If keys
have a norm, calibration sees its input. Its output has the length sqrt(head_dim) times the gain, and reaches up to
sqrt(head_dim) max |gain| after any rotation. Behind a norm of all heads at once (OLMo 2) one head may be sqrt(kv_heads)
times as long, but hardly ever is. That bound would leave keys only a few steps, so there is no scale. YaRN and LongRoPE
lengthen rotated keys by a constant.

TensorRT-LLM has one scale for both: the larger.

The fold of v -> o divides values by some power of their own range, so their ranges become far smaller than those of
keys, and one common scale would leave them a few steps of 127. But any constant may be folded along. The constant that
lets values reach as far as keys costs nothing. On the bundled model it takes the KL of an 8-bit cache from 0.0034 to
0.0003 (unfolded: 0.0004).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from smoothquant.errors import UserError
from smoothquant.family import Geometry
from smoothquant.norms import Norm
from smoothquant.quantization import QMAX, quantize_tensor

Scales = tuple[Tensor, Tensor]  # the scale of keys, the scale of values: float32 scalars > 0


def cache_scales(
    geometry: Geometry, layer: int, norms: Mapping[str, Norm], output_absmax: Mapping[str, Tensor], shared: bool
) -> Scales | None:
    """The scales of a layer's cache; None if the ranges are unknown.

    norms: the norms of the layer, by role. output_absmax: the maxima of the smoothed linears' outputs by role, (out,).
    shared: whether keys and values both get the larger scale.
    """
    if "k" not in output_absmax or "v" not in output_absmax or "keys" in norms:
        return None
    if "key" in norms:
        longer = max(1.0, geometry.attention[layer].rotary_scale)
        keys = geometry.head_dim**0.5 * longer * norms["key"].gain.float().abs().amax()
    else:
        keys = key_absmax(output_absmax["k"], geometry, layer)
    values = output_absmax["v"].float().amax()
    if shared:
        keys = values = torch.maximum(keys, values)
    return _scale(keys), _scale(values)


def check_keys(norms: Collection[str], what: str) -> None:
    """Raise UserError for a family whose keys have no known range. norms: its roles of norms. what: is to quantize."""
    if "keys" in norms:
        raise UserError(
            f"{what}: an INT8 KV cache of keys that are normed over all heads at once",
            expected="keys whose range calibration sees: linears' outputs, or normed head by head",
            do="take a float cache",
        )


def cached(x: Tensor, scale: Tensor) -> Tensor:
    """Keys or values after an 8-bit cache, in the dtype of x."""
    integers, step = quantize_tensor(x, scale)
    return integers * step


def key_absmax(output_absmax: Tensor, geometry: Geometry, layer: int) -> Tensor:
    """The largest magnitude of a layer's keys in the cache, a scalar.

    output_absmax: the maxima of k before the rotation, (kv_size,). A channel of the first half of the rotated channels
    has its partner in the second half.
    """
    kind = geometry.attention[layer]
    rotated = 2 * len(kind.inv_freq)
    heads = output_absmax.float().view(geometry.kv_heads, geometry.head_dim)
    first, second = heads[:, :rotated].chunk(2, dim=-1)
    return torch.cat((torch.hypot(first, second) * kind.rotary_scale, heads[:, rotated:]), dim=-1).amax()


def match(smoothing_scale: Tensor, value_absmax: Tensor, key_absmax: Tensor) -> Tensor:
    """The divisor of v's rows, times the constant that lets values reach as far as keys, (kv_size,).

    smoothing_scale: the divisor, (kv_size,). value_absmax: the maxima of values before the division, (kv_size,).
    key_absmax: the largest magnitude of keys, a scalar.
    """
    reach = (value_absmax / smoothing_scale).amax()
    usable = (reach > 0) & (key_absmax > 0)
    return smoothing_scale * torch.where(usable, reach / key_absmax, torch.ones_like(reach))


def _scale(reach: Tensor) -> Tensor:
    return torch.where(reach > 0, reach, torch.ones_like(reach)) / QMAX
