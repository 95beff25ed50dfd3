"""The decoder that a family record describes, in PyTorch, one layer at a time.

The record is executed here once, for everybody: calibration listens to the linears, the contract compares two
runs, validation runs it in float and in W8A8. What a linear does with its input is the caller's: a `Layer`
supplies `linear(role, x)` and the folded norms, the decoder supplies what lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from smoothquant.family import ACTIVATIONS, Geometry
from smoothquant.model import Model
from smoothquant.quantization import w8a8_linear


class Layer(Protocol):
    """What one layer is to the decoder."""

    def linear(self, role: str, x: Tensor) -> Tensor:
        """x: (batch, tokens, in) -> (batch, tokens, out), bias added."""
        ...

    def gain(self, role: str) -> Tensor:
        """Weight (hidden,) of the norm with this role."""
        ...


def forward(geometry: Geometry, layer: Layer, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """One decoder layer over whole sequences, causal. hidden: (batch, tokens, hidden) float; returns the same shape."""
    batch, tokens, _ = hidden.shape
    x = rms_norm(hidden, layer.gain("attention"), geometry.norm_epsilon)
    q, k, v = (
        layer.linear(role, x).view(batch, tokens, heads, geometry.head_dim).transpose(1, 2)
        for role, heads in (("q", geometry.heads), ("k", geometry.kv_heads), ("v", geometry.kv_heads))
    )  # (batch, heads, tokens, head_dim)
    q, k = rotate(q, *rotary), rotate(k, *rotary)
    attention = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    hidden = hidden + layer.linear("o", attention.transpose(1, 2).reshape(batch, tokens, geometry.query_size))
    x = rms_norm(hidden, layer.gain("mlp"), geometry.norm_epsilon)
    gated = ACTIVATIONS[geometry.activation](layer.linear("gate", x)).mul_(layer.linear("up", x))
    return hidden + layer.linear("down", gated)


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * gain, inside in float32 or wider. x: (..., hidden); gain: (hidden,); returns x's dtype."""
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (wide * gain.to(wide.dtype)).to(x.dtype)


def rotary(geometry: Geometry, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin for positions 0 .. tokens - 1, each (tokens, head_dim / 2)."""
    angle = torch.arange(tokens, dtype=torch.float32)[:, None] * geometry.inv_freq
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the halves. x: (..., tokens, head_dim); cos, sin: (tokens, head_dim / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def logits(model: Model, hidden: Tensor) -> Tensor:
    """Final norm and lm_head. hidden: (batch, tokens, hidden); returns (batch, tokens, vocab) in its dtype."""
    gain = model.read(f"{model.family.final_norm}.weight").to(hidden.device)
    return model.logits(rms_norm(hidden, gain, model.geometry.norm_epsilon))


@dataclass(frozen=True)
class FloatLayer:
    """A layer with float weights, computed in the dtype of its input.

    weights, biases, gains: by role. `listen(role, x, y)` sees every linear's input and output.
    """

    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    gains: Mapping[str, Tensor]
    listen: Callable[[str, Tensor, Tensor], None] | None = None

    def linear(self, role: str, x: Tensor) -> Tensor:
        bias = self.biases.get(role)
        y = functional.linear(x, self.weights[role].to(x.dtype), None if bias is None else bias.to(x.dtype))
        if self.listen:
            self.listen(role, x, y)
        return y

    def gain(self, role: str) -> Tensor:
        return self.gains[role]


@dataclass(frozen=True)
class W8A8Layer:
    """A quantized layer, computed with `quantization.w8a8_linear` in the dtype of its input.

    weights: int8 (out, in) by role; weight_scales: (out,); input_scales: scalars, empty for per-token activations.
    """

    weights: Mapping[str, Tensor]
    weight_scales: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    gains: Mapping[str, Tensor]
    input_scales: Mapping[str, Tensor]
    listen: Callable[[str, Tensor, Tensor], None] | None = None

    def linear(self, role: str, x: Tensor) -> Tensor:
        bias, input_scale = self.biases.get(role), self.input_scales.get(role)
        y = w8a8_linear(x, self.weights[role], self.weight_scales[role], bias, input_scale)
        if self.listen:
            self.listen(role, x, y)
        return y

    def gain(self, role: str) -> Tensor:
        return self.gains[role]


def float_layer(
    model: Model,
    index: int,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    listen: Callable[[str, Tensor, Tensor], None] | None = None,
) -> FloatLayer:
    """Read one layer of a checkpoint. dtype: of its linears; None keeps the dtype on disk."""
    roles = model.family.linears
    return FloatLayer(
        weights={role: model.read(f"{model.linear(index, role)}.weight").to(device, dtype) for role in roles},
        biases={
            role: model.read(f"{model.linear(index, role)}.bias").to(device, dtype)
            for role in roles
            if role in model.geometry.biased
        },
        gains={role: model.read(f"{model.norm(index, role)}.weight").to(device) for role in model.family.norms},
        listen=listen,
    )
