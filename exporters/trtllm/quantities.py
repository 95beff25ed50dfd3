"""The numbers that the SmoothQuant plugins are given, from the scales of a quantized linear.

With X and Y the largest magnitudes that calibration saw at a linear's (smoothed) input and at its output, r a weight
row's largest magnitude, input_scale = X / 127 and weight_scale = r / 127:

    per token    per_channel_scale = r / 127               y = (x8 . w8) * token_scale * per_channel_scale
    static       scale_to_int      = 127 / X               multiplies the activation before it is rounded
                 act_scale         = Y / 127
                 per_channel_scale = X r / (127 Y)         y = (x8 . w8) * act_scale * per_channel_scale

Y cancels: it is what an INT8 output would be scaled by. Format: TensorRT-LLM's llama converter, of which these are the
formulas in float32 (its own run in float16, where rows below 0.002 overflow).
"""

from __future__ import annotations

import torch
from torch import Tensor

from smoothquant.quantization import QMAX


def scale_to_int(input_scale: Tensor | None) -> Tensor:
    """Factor from activations to int8, float32 (1,). input_scale: scalar; None for per-token activations: 1."""
    return torch.ones(1) if input_scale is None else (1 / input_scale).reshape(1)


def act_scale(output_absmax: Tensor) -> Tensor:
    """float32 scalar > 0. output_absmax: (out,), of all linears that are one for the engine."""
    reach = output_absmax.float().amax()
    return torch.where(reach > 0, reach, torch.ones_like(reach)) / QMAX


def static_channel_scale(weight_scale: Tensor, input_scale: Tensor, act_scale: Tensor) -> Tensor:
    """per_channel_scale of static activations. weight_scale: (out,); input_scale, act_scale: scalars; returns (out,)
    float32. Its product with act_scale is input_scale * weight_scale."""
    return (weight_scale.double() * input_scale.double() / act_scale.double()).float()
