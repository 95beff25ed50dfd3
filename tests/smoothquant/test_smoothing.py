"""The paper's equation, and what is folded where."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoothquant import smoothing
from smoothquant.norms import Norm

EPSILON = torch.finfo(torch.float32).eps

magnitudes = st.floats(2**-10, 2**10, width=32)
alphas = st.floats(0, 1)


def fold(scale: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found, folded = Norm("rms", gain).fold(scale)
    return found, folded.weight


@st.composite
def ranges(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    size = draw(st.integers(1, 16))
    vector = st.lists(magnitudes, min_size=size, max_size=size).map(torch.tensor)
    return draw(vector), draw(vector)


@given(ranges(), alphas)
def test_equation(pair: tuple[torch.Tensor, torch.Tensor], alpha: float) -> None:
    act, weight = pair
    found = smoothing.smoothing_scale(act, weight, alpha)
    for j, scale in enumerate(found.tolist()):
        expected = max(act[j].item() ** alpha / weight[j].item() ** (1 - alpha), 1e-5)
        assert scale == pytest.approx(expected, rel=EPSILON)


@given(ranges())
def test_alpha_half_gives_both_sides_the_same_range(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    act, weight = pair
    scale = smoothing.smoothing_scale(act, weight, 0.5)
    torch.testing.assert_close(act / scale, weight * scale, rtol=4 * EPSILON, atol=0)


def test_published_code_gives_the_same_numbers() -> None:
    """The released code in its own words: float tensors, pow, division, clamp."""
    act, weight = torch.rand(64) * 30, torch.rand(64).clamp(min=1e-5)
    released = (act.pow(0.85) / weight.pow(1 - 0.85)).clamp(min=1e-5)
    torch.testing.assert_close(smoothing.smoothing_scale(act, weight, 0.85), released, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@given(ranges())
def test_folding_into_a_norm_is_exact(dtype: torch.dtype, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    gain, wanted = pair[0].to(dtype), pair[1]
    scale, folded = fold(wanted, gain)
    assert folded.dtype == dtype
    # folded * scale gives the gain back: one float32 division and one product, half a unit in the last place each
    torch.testing.assert_close(folded.float() * scale, gain.float(), rtol=EPSILON, atol=0)
    # and snapping moves s by no more than the dtype's rounding of the folded gain, where that is a normal number
    exact = gain.float() / wanted
    normal = (exact >= torch.finfo(dtype).tiny) & (exact < torch.finfo(dtype).max)
    torch.testing.assert_close(scale[normal], wanted[normal], rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("gain", [0.0, 1e-30])
def test_a_gain_that_would_vanish_keeps_its_channel(gain: float) -> None:
    scale, folded = fold(torch.tensor([1e3, 2.0]), torch.tensor([gain, 1.0], dtype=torch.float16))
    assert scale.tolist() == [1.0, 2.0]
    assert folded.tolist() == [torch.tensor(gain).half().item(), 0.5]


def test_a_gain_that_would_overflow_keeps_its_channel() -> None:
    scale, folded = fold(torch.tensor([1e-5]), torch.tensor([2.0], dtype=torch.float16))
    assert (scale.item(), folded.item()) == (1.0, 2.0)


def test_dead_channels_keep_their_scale() -> None:
    act = torch.tensor([0.0, 4.0])
    scale = smoothing.smoothing_scale(act, torch.tensor([1.0, 1.0]), 0.5)
    assert scale.tolist() == [pytest.approx(1e-5), 2.0]
    assert smoothing.skip_dead_channels(scale, act).tolist() == [1.0, 2.0]


def test_query_heads_share_their_kv_head() -> None:
    # 4 query heads, 2 kv heads, head_dim 2; heads 0 and 1 read kv head 0
    values = torch.tensor([1.0, 2, 5, 1, 3, 4, 0, 9])
    shared = smoothing.share_over_query_heads(values, kv_heads=2, head_dim=2)
    assert shared.tolist() == [5, 2, 3, 9]
    spread = smoothing.repeat_over_query_heads(shared, heads=4, kv_heads=2, head_dim=2)
    assert spread.tolist() == [5, 2, 5, 2, 3, 9, 3, 9]
