"""How much of a linear's output is rounding noise where its input has one static scale.

The input is rounded to multiples of one step, each row of the weight to multiples of its weight_scale:

    step = max_j a_j / 127          xq = x + e          Wq = W + d          yq - y = W e + d x + d e

    signal        E |y|^2    =  sum_j v_j |W_j|^2               v_j = E x_j^2, W_j: column j, smoothed
    activations   E |W e|^2  =  sum_j n_j |W_j|^2               n_j = min(step^2 / 12, v_j)
    weights       E |d x|^2  =  sum_i weight_scale_i^2 / 12 * sum_j v_j

n_j: the error of a value that is spread over steps is uniform in [-step / 2, step / 2], with the mean square
step^2 / 12. A channel of values far below half a step is rounded to 0, and its error is itself. Of any values within
the range, |e| <= min(|x|, step / 2), so that E e^2 <= min(v_j, step^2 / 4) <= 3 n_j: noise is never more than 4.8 dB
above this. Of normal values it is .77 to 1 times n_j, of Laplace's .57 to 1.

Channels, and the errors of different weights, are taken as uncorrelated, and d e as small. The errors are so: on
SmolLM2-135M, both noises are within 0.3 dB of what the arithmetic gives wherever values are not spikes. Its signals are
correlated: behind norms they are up to 5 dB larger than this says, elsewhere within 2 dB: the
ratio errs to the safe side.

Per token, the step is that token's own maximum / 127. Act scales do not say how it is distributed: this is for static
scales alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from smoothquant.quantization import absmax, input_scale, weight_scale

PEAK = 4.0  # maximum over root mean square of a channel where no act scales say it: that of normal values


@dataclass(frozen=True)
class Noise:
    """Mean squares of a linear's output, summed over its channels: of the signal, and of the noise that rounding of
    activations and of weights puts on it."""

    signal: float
    activations: float
    weights: float

    @property
    def share(self) -> float:
        """Noise over signal; 0 where there is no signal."""
        return (self.activations + self.weights) / self.signal if self.signal else 0.0


def static_noise(weight: Iterable[Tensor], input_absmax: Tensor, input_mean_square: Tensor) -> Noise:
    """The expected noise of a linear with one static scale for its input and one scale per row of its weight.

    weight: smoothed, (out, in), some rows at a time. input_absmax, input_mean_square: of the smoothed input, float32
    (in,).
    """
    columns = torch.zeros(len(input_absmax), dtype=torch.float64)
    squares = torch.zeros((), dtype=torch.float64)  # of the steps of weights
    for rows in weight:
        columns += rows.float().square().sum(dim=0)
        squares += weight_scale(absmax(rows, dim=1)).double().square().sum()
    mean_square, step = input_mean_square.double(), input_scale(input_absmax).double()
    return Noise(
        signal=(columns * mean_square).sum().item(),
        activations=(columns * mean_square.clamp_max(step.square() / 12)).sum().item(),
        weights=(squares / 12 * mean_square.sum()).item(),
    )


def guessed_mean_square(input_absmax: Tensor) -> Tensor:
    """Mean squares where only maxima are known: (min(a_j, median of a) / PEAK)^2, (in,).

    A channel that reaches beyond the median one is taken to do so in spikes, which are no signal of an ordinary token.
    input_absmax: of the smoothed input, (in,); the median is of those that move.
    """
    moving = input_absmax[input_absmax > 0]
    return (input_absmax.clamp_max(moving.median()) / PEAK).square() if len(moving) else torch.zeros_like(input_absmax)
