"""Keys and values in an 8-bit cache, with one static scale of the layer for each of the two.

    key_scale = max |k| rotated / 127           k8 = clamp(round(k / key_scale))
    value_scale = max |v| / 127                 v8 = clamp(round(v / value_scale))

Calibration sees keys before their rotary embedding, which turns a pair of channels (a, b) by some angle. Afterwards
either channel reaches up to sqrt(a^2 + b^2). This bound is taken, so that no key of the calibration saturates. If keys
have a norm, calibration sees its input. Its output has the length sqrt(head_dim) times the gain, and reaches up to
sqrt(head_dim) max |gain| after any rotation. Behind a norm of all heads at once (OLMo 2) one head may be sqrt(kv_heads)
times as long, but hardly ever is. That bound would leave keys only a few steps, so there is no scale. YaRN and LongRoPE
lengthen rotated keys by a constant.

With one scale for all channels of keys, a few large ones (the biases of Qwen2 make such) leave the others a few steps.
But queries may be multiplied by whatever divides keys, where the rotation turns both channels of a pair alike: rows of
q and k take it, or the norms behind them, and nothing is left for run time. Weights have a scale for every row, which
takes it up. So all pairs are made to reach equally far, as if each had a scale of its own. (SmoothAttention, of QServe,
Lin et al., 2024, divides by some power of the reach, for 4 bits.) On real weights, keys in 8 bits alone cost a KL of
.0436 in Qwen2.5-Coder-0.5B without and .0015 with it, and of .0026 and .0010 in SmolLM2-135M.

Values have few large numbers. The search (`act_scales.search`), which sees values, lets some of them saturate: it takes
the share of their maximum that leaves the least squared error, layer by layer. Behind the recipe's smoothing that takes
the cost of an 8-bit cache from a KL of .0023 to .0012 in SmolLM2-135M (8 x 512 tokens), and from .0020 to .0016 in
Qwen2.5-Coder-0.5B (4 x 512). Keys saturate nowhere: those that reach furthest are the ones that attention looks for.
With keys at .7 of their maximum the cache costs .0107 in SmolLM2 (16 x 512).

TensorRT-LLM has one scale for both: the larger.

The fold of v -> o divides values by some power of their own range, so their ranges become far smaller than those of
keys, and one common scale would leave them a few steps of 127. But any constant may be folded along. The constant that
lets values reach as far as keys costs nothing. On the bundled model it takes the KL of an 8-bit cache from 0.0034 to
0.0003 (unfolded: 0.0004), keys as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from smoothquant.errors import UserError
from smoothquant.family import Geometry
from smoothquant.norms import Norm
from smoothquant.quantization import QMAX, quantize_tensor

SHARES = tuple(share / 20 for share in range(20, 7, -1))  # of the maximum of values
FURTHEST = 64.0  # that a channel of keys is divided or multiplied by: float16 holds what becomes of q and k
Scales = tuple[Tensor, Tensor]  # the scale of keys, the scale of values: float32 scalars > 0


def cache_scales(
    geometry: Geometry, layer: int, norms: Mapping[str, Norm], output_absmax: Mapping[str, Tensor], shared: bool
) -> Scales | None:
    """The scales of a layer's cache; None if the ranges are unknown.

    norms: the norms of the layer, by role. output_absmax: the maxima of the smoothed linears' outputs by role, (out,).
    shared: whether keys and values both get the larger scale.
    """
    reach = key_reach(geometry, layer, norms, output_absmax)
    if reach is None or "v" not in output_absmax:
        return None
    keys, values = reach.amax(), output_absmax["v"].float().amax()
    if shared:
        keys = values = torch.maximum(keys, values)
    return _scale(keys), _scale(values)


def key_reach(
    geometry: Geometry, layer: int, norms: Mapping[str, Norm], output_absmax: Mapping[str, Tensor]
) -> Tensor | None:
    """The largest magnitude of every channel of a layer's keys in the cache, float32 (kv_size,), the same for both
    channels of a pair that the rotation turns; None if it is unknown. The arguments are those of `cache_scales`."""
    kind = geometry.attention[layer]
    if "keys" in norms or "k" not in output_absmax:
        return None
    if "key" in norms:
        head = geometry.head_dim**0.5 * norms["key"].gain.float().abs()
        heads, together = head.expand(geometry.kv_heads, -1), torch.maximum
    else:
        heads, together = output_absmax["k"].float().view(geometry.kv_heads, geometry.head_dim), torch.hypot
    rotated = 2 * len(kind.inv_freq)
    first, second = heads[:, :rotated].chunk(2, dim=-1)
    longer = max(1.0, kind.rotary_scale) if "key" in norms else kind.rotary_scale
    pair = together(first, second) * longer
    return torch.cat((pair, pair, heads[:, rotated:]), dim=-1).flatten()


def key_divisor(norms: Mapping[str, Norm], reach: Tensor) -> Tensor | None:
    """The divisor of a layer's keys that lets all of their channels reach equally far, float32 (kv_size,), around 1;
    None where nothing takes it. norms: the norms of the layer, by role. reach: by `key_reach`.

    Behind norms of heads it is a power of two, which changes no digit of their weights.
    """
    used = reach > 0
    mean = reach[used].log().mean().exp() if used.any() else torch.ones(())
    divisor = torch.where(used, reach / mean, 1).clamp(1 / FURTHEST, FURTHEST)
    behind = {role: norm.kind for role, norm in norms.items() if role in ("key", "query", "queries")}
    if not behind:
        return divisor
    return divisor.log2().round().exp2() if behind == {"key": "rms", "query": "rms"} else None


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


def clipping_errors(values: Tensor, scale: Tensor) -> dict[float, float]:
    """By share of the scale, the squared error of values in the cache over their squares; all 0 for no values.

    values: float32 of any shape, some of those that the cache will hold. scale: with which none saturates, a scalar.
    """
    signal = max(values.square().sum().item(), 1e-30)
    return {share: (cached(values, scale * share) - values).square().sum().item() / signal for share in SHARES}


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
