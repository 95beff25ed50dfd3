"""The expected noise of a static scale: beside the real W8A8 arithmetic, on random data with outliers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smoothquant.noise import guessed_mean_square, static_noise
from smoothquant.quantization import input_scale, quantize_tensor, quantize_weight, w8a8_linear
from smoothquant.scheme import PER_TENSOR

TOKENS, IN, OUT = 2048, 96, 192


def data(seed: int, spread: float, spike: float) -> tuple[Tensor, Tensor]:
    """Normal values whose channels differ by up to exp(spread), one of them larger still; and a weight. In float64."""
    generator = torch.Generator().manual_seed(seed)
    channels = (spread * torch.rand(IN, generator=generator, dtype=torch.float64)).exp()
    channels[3] = channels.max() * spike
    x = torch.randn(TOKENS, IN, generator=generator, dtype=torch.float64) * channels
    return x, torch.randn(OUT, IN, generator=generator, dtype=torch.float64) / channels**0.5


def mean(y: Tensor) -> float:
    return y.square().sum(dim=1).mean().item()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.floats(0, 3), spike=st.floats(1, 300))
def test_the_noise_is_that_of_the_real_arithmetic(seed: int, spread: float, spike: float) -> None:
    """Normal values give .766 to 1 times the formula of a channel. What is left is chance: products of different
    channels' errors have mean 0, and the mean square of 2,048 tokens of 96 channels a standard deviation of
    sqrt(2 / 2048) of itself, 3.2 %, even where one channel is all of it; five of those."""
    x, weight = data(seed, spread, spike)
    quantized, weight_scale = quantize_weight(weight)
    absmax = x.abs().amax(dim=0)
    expected = static_noise(weight.split(5), absmax, x.square().mean(dim=0))
    scale = input_scale(absmax)
    integers, _ = quantize_tensor(x, scale)
    error = integers * scale.double() - x
    activations = mean(error @ weight.T)
    assert 0.766 * 0.84 <= activations / expected.activations <= 1.16
    rounded = quantized.double() * weight_scale.double()[:, None]
    # 18,432 errors of weights, uniform: their sum over rows and channels weighted by v, one channel all of it: 192 of
    # them, with a standard deviation of sqrt(4 / 5 / 192) = 6.5 %; five of those. max |W| of a row is exact
    assert mean(x @ (rounded - weight).T) == pytest.approx(expected.weights, rel=0.33)
    assert mean(x @ weight.T) == pytest.approx(expected.signal, rel=0.5)  # 96 channels of chance correlation
    whole = w8a8_linear(x, quantized, weight_scale, PER_TENSOR.activations, scale) - x @ weight.T
    both = expected.activations + expected.weights
    assert 0.6 <= mean(whole) / both <= 1.4


def test_noise_never_exceeds_three_times_the_formula() -> None:
    """Any values within the range: |e| <= min(|x|, step / 2). Values of half a step are the worst."""
    absmax = torch.full((8,), 127.0)
    x = torch.full((4, 8), 0.4999, dtype=torch.float64)
    weight = torch.eye(8, dtype=torch.float64)
    integers, scale = quantize_tensor(x, input_scale(absmax))
    noise = static_noise(weight.split(5), absmax, x.square().mean(dim=0))
    assert mean(integers * scale - x) / noise.activations == pytest.approx(3, rel=1e-3)


def test_a_spike_ruins_the_others_and_a_fold_saves_them() -> None:
    x, weight = data(0, 0.0, 1.0)
    absmax, square = x.abs().amax(dim=0), x.square().mean(dim=0)
    plain = static_noise([weight], absmax, square).share
    spiked = absmax.clone()
    spiked[7] *= 1000  # what one rare token does: the mean square of an ordinary one stays
    ruined = static_noise([weight], spiked, square)
    assert plain < 1e-3 < 0.9 < ruined.activations / ruined.signal
    factor = torch.ones(IN, dtype=torch.float64)
    factor[7] = 1000
    folded = static_noise([weight * factor], spiked / factor, square / factor**2)
    others = torch.arange(IN) != 7
    saved = static_noise(
        [weight[:, others]], torch.full((IN - 1,), (spiked / factor).max().item()), square[others]
    ).activations
    itself = (
        weight[:, 7].square().sum() * square[7]
    ).item()  # an ordinary value of the spiking channel is rounded to 0
    assert folded.activations == pytest.approx(saved + itself, rel=1e-6)


def test_without_mean_squares_a_spike_is_no_signal() -> None:
    """The guess: 10 dB where the largest channel reaches 110 / sqrt(10) = 34 times the median one."""
    absmax = torch.ones(65)
    absmax[0] = 127 * 12**0.5 / 4 / 10**0.5
    guessed = guessed_mean_square(absmax)
    torch.testing.assert_close(guessed, torch.full((65,), 1 / 16))
    noise = static_noise([torch.eye(65)], absmax, guessed)
    assert noise.activations / noise.signal == pytest.approx(0.1, rel=1e-5)
    assert not guessed_mean_square(torch.zeros(4)).any()
    assert static_noise([torch.eye(4)], torch.zeros(4), torch.zeros(4)).share == 0
