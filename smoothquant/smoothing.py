"""SmoothQuant's equation (Xiao et al., ICML 2023, eq. 4), and the places where its scales can be folded.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)          per input channel j, floor 1e-5
    Y   = (X / s) (s * W)

`1 / s` is folded, without error, into the source of X:

    a norm      into its gain (`norms.Norm.fold`)
    a linear    into its rows, if only positively homogeneous, channel-wise functions follow it
                (up -> down through a gate, fc1 -> fc2 through ReLU)
    v -> o      into the rows of v, through attention: the query heads of one kv head share that head's channels
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-5


def smoothing_scale(act_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """The scale by the paper's equation, with the floors of its released code: float32 (in,), >= 1e-5.

    act_absmax: max |X_j|, (in,). weight_absmax: the maximum of |W_ij| over all consumers, (in,). alpha: the migration
    strength, in [0, 1].
    """
    act, weight = act_absmax.double(), weight_absmax.double().clamp_min(FLOOR)
    return (act.pow(alpha) / weight.pow(1 - alpha)).clamp_min(FLOOR).float()


def skip_dead_channels(scale: Tensor, act_absmax: Tensor) -> Tensor:
    """The scale, with s = 1 for channels that were always 0 in calibration. scale, act_absmax: (in,).

    The equation gives such a channel the floor, 1e-5. Any later value in it would be enlarged 100,000 times.
    """
    return torch.where(act_absmax > 0, scale, torch.ones_like(scale))


def as_divisor(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest scale that `dtype` holds exactly and an engine divides by, float32 (in,). scale: (in,).

    Weights multiplied by this scale undo the division that the engine really does.
    """
    limits = torch.finfo(dtype)
    return scale.clamp(limits.tiny, limits.max).to(dtype).float()


def as_factor(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest scale whose reciprocal `dtype` holds exactly and an engine multiplies by, float32 (in,).

    scale: (in,). The reciprocal lies in [1e-4, 1e4], which are the limits of ModelOpt.
    """
    return 1 / (1 / scale).clamp(1e-4, 1e4).to(dtype).float()


def share_over_query_heads(values: Tensor, kv_heads: int, head_dim: int) -> Tensor:
    """The maximum over the query heads of each kv head, (kv_heads * head_dim,). values: (heads * head_dim,)."""
    return values.view(kv_heads, -1, head_dim).amax(dim=1).reshape(-1)


def repeat_over_query_heads(values: Tensor, heads: int, kv_heads: int, head_dim: int) -> Tensor:
    """The values of each kv head, repeated for its query heads, (heads * head_dim,). values: (kv_heads * head_dim,)."""
    return values.view(kv_heads, 1, head_dim).expand(kv_heads, heads // kv_heads, head_dim).reshape(-1)
