"""The arithmetic of norms, and the folding of 1/s into them.

rms     y = x / sqrt(mean(x^2) + eps) * gain                     gain = weight
rms+1   y as for rms                                             gain = 1 + weight (the disk holds gain - 1)
layer   y = (x - mean(x)) / sqrt(var(x) + eps) * gain + bias     gain = weight
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("rms", "rms+1", "layer")


@dataclass(frozen=True)
class Norm:
    """A norm. kind: "rms", "rms+1" or "layer". weight: the stored weight, (channels,). bias: (channels,), only in layer
    norms."""

    kind: str
    weight: Tensor
    bias: Tensor | None = None

    @property
    def gain(self) -> Tensor:
        """The factor of the normalized input, (channels,): the weight itself, or 1 + weight in float32."""
        return 1 + self.weight.float() if self.kind == "rms+1" else self.weight

    def __call__(self, x: Tensor, epsilon: float) -> Tensor:
        """The output of the norm, (..., channels), in the dtype of x. It is computed in float32 or wider."""
        wide = x if x.dtype == torch.float64 else x.float()
        if self.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
        wide = wide * self.gain.to(wide.dtype)
        return (wide if self.bias is None else wide + self.bias.to(wide.dtype)).to(x.dtype)

    def to(self, device: str) -> Norm:
        """The same norm on a device."""
        return Norm(self.kind, self.weight.to(device), None if self.bias is None else self.bias.to(device))

    def divided(self, scale: Tensor) -> Norm:
        """The norm whose output is divided by `scale` (channels,) float32. The weight keeps its dtype."""
        weight = self.gain.float() / scale
        if self.kind == "rms+1":  # the gain next to 0, not 0 itself, that weight - 1 can hold
            least = torch.finfo(self.weight.dtype).eps / 2
            weight = torch.where(weight.abs() < least, weight.sign() * least, weight) - 1
        weight = weight.to(self.weight.dtype)
        return Norm(self.kind, weight, None if self.bias is None else self.bias.float() / scale)

    def fold(self, scale: Tensor) -> tuple[Tensor, Norm]:
        """The smoothing_scale, float32 (channels,), and the norm with 1/scale folded in. scale: float32 (channels,).

        The folded weight is rounded to the weight's dtype. The returned scale is the divisor that the rounded weight
        really has, so that linears multiplied by it (in float32) undo it exactly. A bias becomes float32. A channel
        whose folded gain would vanish or overflow keeps its weight, with the scale 1.
        """
        folded = self.divided(scale)
        exact = self.gain.float() / folded.gain.float()
        usable = (folded.gain != 0) & folded.weight.isfinite() & exact.isfinite() & (exact > 0)
        exact = torch.where(usable, exact, torch.ones_like(scale))
        weight = torch.where(usable, folded.weight, self.weight)
        return exact, Norm(self.kind, weight, None if self.bias is None else self.bias.float() / exact)
