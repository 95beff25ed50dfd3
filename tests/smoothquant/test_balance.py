"""Balanced scales: the noise is that of real rounding, its slope is its derivative, and the descent never loses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smoothquant.balance import Group
from smoothquant.quantization import input_scale, quantize_tensor, quantize_tokens, quantize_weight

STATIC, GROUPED = "static", "grouped"


def example(seed: int, channels: int = 12, *kinds: str, tokens: int = 9, rows: int = 7) -> Group:
    """Random statistics, float64, with channels that reach differently far. kinds: STATIC activations; GROUPED: every
    two channels have one source, as two query heads have one kv head."""
    random = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=random, dtype=torch.float64)

    reach = 10 ** (2 * some(channels) - 1)
    x, weight, left = some(tokens, channels) * reach, some(rows, channels), some(channels)
    return Group(
        tokens=x,
        token_weight=some(tokens),
        rows=weight,
        row_weight=some(rows),
        columns=weight.square().sum(dim=0) + some(channels),
        left_over=left * x.square().mean(dim=0),
        # so that some channels lie below half a static step, and none is near to it
        mean_square=x.square().mean(dim=0) * torch.where(torch.arange(channels) % 3 == 0, 1e-9, 1),
        source=torch.arange(channels) // 2 if GROUPED in kinds else None,
        reach=x.amax(dim=0) if STATIC in kinds else None,
    )


def scale_of(group: Group, seed: int) -> Tensor:
    """A random scale, equal where channels have one source."""
    found = torch.exp(torch.randn(len(group.columns), generator=torch.Generator().manual_seed(seed)).double())
    return found if group.source is None else found[group.source]


def formula(group: Group, scale: Tensor) -> tuple[float, float]:
    """The sums of the docstring, one term at a time."""
    s, n, c, count = scale.tolist(), group.columns.tolist(), group.left_over.tolist(), range(len(scale))
    activations, weights = 0.0, 0.0
    if group.reach is None:
        for x, w in zip(group.tokens.tolist(), group.token_weight.tolist(), strict=True):
            step = max(x[j] / s[j] for j in count) / 127
            activations += w * sum(step**2 / 12 * n[j] * s[j] ** 2 for j in count)
    else:
        step = max(group.reach.tolist()[j] / s[j] for j in count) / 127
        mean = group.mean_square.tolist()
        activations = sum(min(step**2 / 12, mean[j] / s[j] ** 2) * n[j] * s[j] ** 2 for j in count)
    for row, u in zip(group.rows.tolist(), group.row_weight.tolist(), strict=True):
        step = max(row[j] * s[j] for j in count) / 127
        weights += u * sum(step**2 / 12 * c[j] / s[j] ** 2 for j in count)
    return activations, weights


kinds = pytest.mark.parametrize("kinds", [(), (STATIC,), (GROUPED,), (STATIC, GROUPED)], ids="-".join)
seeds = st.integers(0, 10**6)


@kinds
@given(seed=seeds)
@settings(max_examples=25)
def test_the_noise_is_the_formula(kinds: tuple[str, ...], seed: int) -> None:
    group = example(seed, 12, *kinds)
    scale = scale_of(group, seed)
    assert group.noise(scale) == pytest.approx(formula(group, scale), rel=1e-9)


@kinds
@given(seed=seeds)
@settings(max_examples=25)
def test_the_slope_is_the_derivative(kinds: tuple[str, ...], seed: int) -> None:
    """By central differences in float64, where no other channel becomes the largest within them."""
    group = example(seed, 12, *kinds)
    scale = scale_of(group, seed)
    found, width = group._terms(scale), 1e-6
    for j in range(len(scale)):
        there, back = (scale.log().index_add(0, torch.tensor([j]), torch.tensor([d]).double()) for d in (width, -width))
        expected = (sum(group.noise(there.exp())) - sum(group.noise(back.exp()))) / (2 * width)
        # each difference is rounded to 1e-16 of the noise, over 1e-6; the third derivative adds 1e-12
        assert found.slope[j].item() == pytest.approx(expected, rel=1e-5, abs=1e-8 * found.total)


@kinds
@given(seed=seeds, factor=st.floats(1e-3, 1e3))
@settings(max_examples=25)
def test_one_factor_for_all_changes_nothing(kinds: tuple[str, ...], seed: int, factor: float) -> None:
    group = example(seed, 12, *kinds)
    scale = scale_of(group, seed)
    assert group.noise(factor * scale) == pytest.approx(group.noise(scale), rel=1e-9)
    once, again = group.balanced(scale), group.balanced(factor * scale)
    assert sum(group.noise(again)) == pytest.approx(sum(group.noise(once)), rel=1e-6)
    assert group._terms(scale).slope.sum().item() == pytest.approx(0, abs=1e-9 * sum(group.noise(scale)))


@kinds
@given(seed=seeds)
@settings(max_examples=25)
def test_the_descent_never_loses(kinds: tuple[str, ...], seed: int) -> None:
    group = example(seed, 12, *kinds)
    scale = scale_of(group, seed)
    found = group.balanced(scale)
    assert found.shape == scale.shape
    assert found.isfinite().all()
    assert (found > 0).all()
    assert sum(group.noise(found)) <= sum(group.noise(scale)) * (1 + 1e-12)
    if group.source is not None:
        assert found.equal(found[::2].repeat_interleave(2))
    assert sum(group.noise(group.balanced(found))) <= sum(group.noise(found)) * (1 + 1e-12)


@kinds
def test_the_descent_wins(kinds: tuple[str, ...]) -> None:
    """Where one channel spoils every token, from the square roots of what channels reach. From 1 it would not come far
    enough, and with a static scale not at all: the noise of channels that are lost has no slope."""
    group = example(1, 12, *kinds)
    spoiled = replace(group, tokens=group.tokens.clone())
    spoiled.tokens[:, 4] = 300 * group.tokens.max()
    start = spoiled.tokens.amax(dim=0).sqrt()
    start = start if group.source is None else start.view(-1, 2).amax(dim=1)[group.source]
    if group.reach is not None:
        spoiled = replace(spoiled, reach=spoiled.tokens.amax(dim=0), mean_square=spoiled.tokens.square().mean(dim=0))
    ones = torch.ones(12).double()
    found = sum(spoiled.noise(spoiled.balanced(start)))
    assert found < sum(spoiled.noise(start))
    assert found < 0.4 * sum(spoiled.noise(ones))


def test_query_heads_share_their_kv_heads_scale() -> None:
    """Four query heads of two channels read two kv heads: the sources repeat by head, not by channel."""
    source = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    group = replace(example(3, 8), source=source)
    start = torch.tensor([2.0, 1.0, 0.5, 3.0]).double()
    found = group.balanced(start[source])
    for place in range(4):
        assert len(found[source == place].unique()) == 1
    assert not found.allclose(start[source])
    assert sum(group.noise(found)) <= sum(group.noise(start[source]))


def test_a_channel_of_zeros_and_one_channel() -> None:
    group = example(5, 3)
    for field in ("tokens", "rows", "columns", "left_over", "mean_square"):
        getattr(group, field)[..., 1] = 0
    scale = scale_of(group, 5)
    assert group.balanced(scale).isfinite().all()
    one = example(6, 1)  # nothing to balance
    assert one.balanced(torch.tensor([7.0]).double()).item() == pytest.approx(7, rel=1e-3)


def uniform(random: torch.Generator, *shape: int) -> Tensor:
    return 2 * torch.rand(*shape, generator=random) - 1


@pytest.mark.parametrize("act", ["per-token", "per-tensor"])
def test_it_is_what_real_rounding_does(act: str) -> None:
    """Independent channels of uniform numbers: errors of rounding are uniform, and nothing foretells anything.

    The mean over thousands of errors is within a few per cent of the expected one. Channels that are 1, or a half, of
    the largest span at least 63 steps.
    """
    random = torch.Generator().manual_seed(0)
    tokens, channels, rows = 400, 64, 96
    size = torch.where(torch.arange(channels) % 2 == 0, 1.0, 0.5)
    x, weight, scale = uniform(random, tokens, channels) * size, uniform(random, rows, channels), size.sqrt()
    static = act == "per-tensor"
    group = Group(
        tokens=x.abs(),
        token_weight=torch.full((tokens,), 1 / tokens),
        rows=weight.abs(),
        row_weight=torch.ones(rows),
        columns=weight.square().sum(dim=0),
        left_over=x.square().mean(dim=0),
        mean_square=x.square().mean(dim=0),
        reach=x.abs().amax(dim=0) if static else None,
    )
    smoothed = x / scale
    integers, step = (
        quantize_tensor(smoothed, input_scale(smoothed.abs().amax(dim=0))) if static else quantize_tokens(smoothed)
    )
    by_activations = ((integers * step - smoothed) @ (weight * scale).T).square().sum(dim=1).mean().item()
    rounded, weight_scale = quantize_weight(weight * scale)
    by_weights = (smoothed @ (rounded * weight_scale[:, None] - weight * scale).T).square().sum(dim=1).mean().item()
    # each is a mean of at least 64 x 96 squared errors: 1 / sqrt(6144) of it and some, five times over
    assert group.noise(scale) == pytest.approx((by_activations, by_weights), rel=0.07)


def test_a_channel_below_half_a_static_step_is_lost_as_a_whole() -> None:
    random = torch.Generator().manual_seed(1)
    x, weight = uniform(random, 300, 32), uniform(random, 48, 32)
    x[:, 0] *= 1000  # its step is 8: all others are rounded to 0
    group = Group(
        tokens=x.abs(),
        token_weight=torch.full((300,), 1 / 300),
        rows=weight.abs(),
        row_weight=torch.ones(48),
        columns=weight.square().sum(dim=0),
        left_over=x.square().mean(dim=0),
        mean_square=x.square().mean(dim=0),
        reach=x.abs().amax(dim=0),
    )
    integers, step = quantize_tensor(x, input_scale(x.abs().amax(dim=0)))
    assert not integers[:, 1:].any()
    found = ((integers * step - x) @ weight.T).square().sum(dim=1).mean().item()
    assert group.noise(torch.ones(32))[0] == pytest.approx(found, rel=0.1)
    assert step.item() ** 2 / 12 * group.columns.sum().item() > 10 * found  # if half a step were lost everywhere
