"""Norms: their arithmetic, and folding 1/s into them.

rms     y = x / sqrt(mean(x^2) + eps) * gain                     gain = weight
rms+1   the same                                                 gain = 1 + weight (the disk holds gain - 1)
layer   y = (x - mean(x)) / sqrt(var(x) + eps) * gain + bias     gain = weight
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("rms", "rms+1", "layer")


@dataclass(frozen=True)
class Norm:
    """Weights of a norm. weight: (channels,), as on disk; bias: (channels,), only of layer norms."""

    kind: str
    weight: Tensor
    bias: Tensor | None = None

    @property
    def gain(self) -> Tensor:
        """What the normalized input is multiplied by, (channels,): the weight itself, or 1 + weight in float32."""
        return 1 + self.weight.float() if self.kind == "rms+1" else self.weight

    def __call__(self, x: Tensor, epsilon: float) -> Tensor:
        """Normalize, inside in float32 or wider. x: (..., channels); returns x's dtype."""
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
        """Fold 1/scale in. Returns (smoothing_scale float32 (channels,), the folded norm). scale: (channels,) float32.

        The folded weight is rounded to the weight's dtype. The scale that comes back is what the rounded weight really
        divides by, so that linears multiplied by it (in float32) undo it exactly. A bias becomes float32. A channel
        whose folded gain would vanish or overflow keeps its weight and scale 1.
        """
        folded = self.divided(scale)
        exact = self.gain.float() / folded.gain.float()
        usable = (folded.gain != 0) & folded.weight.isfinite() & exact.isfinite() & (exact > 0)
        exact = torch.where(usable, exact, torch.ones_like(scale))
        weight = torch.where(usable, folded.weight, self.weight)
        return exact, Norm(self.kind, weight, None if self.bias is None else self.bias.float() / exact)
