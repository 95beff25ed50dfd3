"""Scales that balance the rounding of activations against that of weights, better than one alpha for all channels.

The linears that read one input x (channels j), with the scales s, compute (s W) (x / s). Both factors are rounded to
steps of 1/127 of their largest value, and the errors of rounding are uniform and independent:

    activations   E |W e|^2  =  1/12 sum_t w_t step_t^2 * sum_j n_j s_j^2         step_t = max_j |x_tj| / s_j / 127
    weights       E |d x|^2  =  1/12 sum_i u_i step_i^2 * sum_j c_j / s_j^2       step_i = max_j |W_ij| s_j / 127

    t: tokens, of the weights w_t        n_j = sum_i u_i W_ij^2
    i: rows, of the weights u_i          c_j: variance of x_j that the channels rounded after it do not foretell
                                         (`rounding.left_over`), since rounding feeds its errors forward; E x_j^2 where
                                         it does not

With one static scale, step_t is the same for all tokens, and a channel of values below half a step is lost as a whole:
step^2 / 12 is then no more than E x_j^2 / s_j^2. SmoothQuant's equation, with any alpha, is one point; from there the
logarithms of s descend along the gradient of the sum. Multiplying all s by one number changes neither of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smoothquant.quantization import QMAX

STEPS, RATE = 24, 0.08  # of the descent, by Adam; each step changes a scale by up to 8 %, at the end by less
MOMENTS = (0.9, 0.99)


@dataclass(frozen=True)
class Group:
    """The linears that read one input, as far as rounding goes.

    tokens: |x| of some tokens, float32 (tokens, in). token_weight: (tokens,). rows: |W| of some rows of all linears,
    float32 (rows, in). row_weight: (rows,). columns: n_j, of all rows, (in,). left_over: c_j, (in,).
    source: int64 (in,), the channel of the scale's source that each input channel comes from; None where these are the
    same. reach: the maxima of |x_j| where activations have one static scale, (in,); None per token. mean_square:
    E x_j^2, (in,).
    """

    tokens: Tensor
    token_weight: Tensor
    rows: Tensor
    row_weight: Tensor
    columns: Tensor
    left_over: Tensor
    mean_square: Tensor
    source: Tensor | None = None
    reach: Tensor | None = None

    def noise(self, scale: Tensor) -> tuple[float, float]:
        """The expected square of the outputs' errors, by activations and by weights. scale: (in,)."""
        found = self._terms(scale)
        return found.activations, found.weights

    def balanced(self, scale: Tensor, steps: int = STEPS) -> Tensor:
        """The scale, (in,), with the least noise on the way from `scale`, (in,)."""
        logs = _gathered(scale.clamp_min(1e-12).log(), self.source)
        first, second = torch.zeros_like(logs), torch.zeros_like(logs)
        least, best = float("inf"), logs
        for step in range(steps + 1):
            spread = logs if self.source is None else logs[self.source]
            found = self._terms(spread.exp())
            if found.total < least:
                least, best = found.total, logs
            slope = _summed(found.slope, self.source, len(logs)) / max(found.total, 1e-300)
            first = MOMENTS[0] * first + (1 - MOMENTS[0]) * slope
            second = MOMENTS[1] * second + (1 - MOMENTS[1]) * slope.square()
            mean = first / (1 - MOMENTS[0] ** (step + 1))
            size = (second / (1 - MOMENTS[1] ** (step + 1))).sqrt()
            logs = logs - RATE * (1 - step / (steps + 1)) * mean / size.clamp_min(1e-12)
        return (best if self.source is None else best[self.source]).exp()

    def _terms(self, scale: Tensor) -> _Terms:
        square = scale.square()
        steps, places = (self.rows * scale).max(dim=1)
        by_row = self.row_weight * steps.square()
        left = self.left_over / square
        weights = by_row.sum() * left.sum()
        slope = 2 * (_summed(by_row, places, len(scale)) * left.sum() - by_row.sum() * left)
        told = self.columns * square
        if self.reach is None:
            largest, at = (self.tokens / scale).max(dim=1)
            by_token = self.token_weight * largest.square()
            activations = by_token.sum() * told.sum()
            slope += 2 * (by_token.sum() * told - _summed(by_token, at, len(scale)) * told.sum())
        else:
            largest, at = (self.reach / scale).max(dim=0)
            lost = 12 * QMAX**2 * self.mean_square / square  # what a channel of nothing but zeros would cost
            kept = lost > largest.square()
            activations = (torch.minimum(largest.square(), lost) * told).sum()
            slope += 2 * torch.where(kept, largest.square() * told, 0)
            slope[at] -= 2 * (largest.square() * told)[kept].sum()
        per_step = 1 / (12 * QMAX**2)
        return _Terms(activations.item() * per_step, weights.item() * per_step, slope * per_step)


@dataclass(frozen=True)
class _Terms:
    """The two parts of the noise, and the slope of their sum by the logarithm of each channel's scale, (in,)."""

    activations: float
    weights: float
    slope: Tensor

    @property
    def total(self) -> float:
        return self.activations + self.weights


def _gathered(values: Tensor, source: Tensor | None) -> Tensor:
    """The values of the source's channels, the last of each, from those of input channels, (in,)."""
    if source is None:
        return values
    found = values.new_zeros(int(source.max()) + 1)
    found[source] = values
    return found


def _summed(values: Tensor, places: Tensor | None, count: int) -> Tensor:
    """The sums of values by place, (count,)."""
    return values if places is None else values.new_zeros(count).index_add_(0, places, values)
