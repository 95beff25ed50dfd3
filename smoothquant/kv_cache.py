"""Keys and values in 8 bits: what an engine's cache holds, with a static scale of the layer for each of them.

    key_scale = max |k| rotated / 127           k8 = clamp(round(k / key_scale))
    value_scale = max |v| / 127                 v8 = clamp(round(v / value_scale))

Calibration sees keys before their rotary embedding, which turns a pair of channels (a, b) by some angle: afterwards
either of them reaches up to sqrt(a^2 + b^2). That bound is taken, so that no key of the calibration saturates. Of keys
with a norm of their own calibration sees what goes into it; what comes out, sqrt(head_dim) long times the gain, reaches
up to sqrt(head_dim) max |gain|, however it is turned. Behind a norm of all heads at once (OLMo 2) one of them may be
sqrt(kv_heads) times as long and hardly ever is: that bound would leave keys a few steps, and there is no scale. YaRN
and LongRoPE lengthen what they turn by a constant.

TensorRT-LLM has one scale for both: the larger.

The fold of v -> o leaves values with far smaller ranges than keys have (they are divided by some power of their own
range), and what one scale gives them is then a few steps of 127. But any constant may be folded along with it: the one
that lets values reach as far as keys costs nothing, and on the bundled model takes the KL of an 8-bit cache from 0.0034
to 0.0003 (unfolded: 0.0004).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from smoothquant.family import Geometry
from smoothquant.norms import Norm
from smoothquant.quantization import QMAX, quantize_tensor

Scales = tuple[Tensor, Tensor]  # of keys, of values: float32 scalars > 0


def cache_scales(
    geometry: Geometry, layer: int, norms: Mapping[str, Norm], output_absmax: Mapping[str, Tensor], shared: bool
) -> Scales | None:
    """The scales of a layer's cache; None where the ranges are not known. norms: of the layer, by role; output_absmax:
    by role (out,), of smoothed linears; shared: both get the larger one."""
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


def cached(x: Tensor, scale: Tensor) -> Tensor:
    """Keys or values as an 8-bit cache gives them back, in the dtype of x."""
    integers, step = quantize_tensor(x, scale)
    return integers * step


def key_absmax(output_absmax: Tensor, geometry: Geometry, layer: int) -> Tensor:
    """How far a key of a layer reaches in the cache, scalar. output_absmax: (kv_size,) of k, before it is rotated: a
    channel of the first half of those that are, with its partner in the second."""
    kind = geometry.attention[layer]
    rotated = 2 * len(kind.inv_freq)
    heads = output_absmax.float().view(geometry.kv_heads, geometry.head_dim)
    first, second = heads[:, :rotated].chunk(2, dim=-1)
    return torch.cat((torch.hypot(first, second) * kind.rotary_scale, heads[:, rotated:]), dim=-1).amax()


def match(smoothing_scale: Tensor, value_absmax: Tensor, key_absmax: Tensor) -> Tensor:
    """The scale that v's rows are divided by, times a constant: values then reach as far as keys.

    smoothing_scale, value_absmax: (kv_size,), value_absmax before the division; key_absmax: scalar. Returns (kv_size,).
    """
    reach = (value_absmax / smoothing_scale).amax()
    usable = (reach > 0) & (key_absmax > 0)
    return smoothing_scale * torch.where(usable, reach / key_absmax, torch.ones_like(reach))


def _scale(reach: Tensor) -> Tensor:
    return torch.where(reach > 0, reach, torch.ones_like(reach)) / QMAX
