"""INT8: definitions, bounds, and the exact linear."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smoothquant import quantization
from smoothquant.scheme import ACTIVATIONS

matrices = st.builds(
    lambda seed, rows, columns, size: (
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**size
    ),
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.integers(1, 64),
    st.integers(-6, 4),
)


@given(matrices)
def test_weights_are_symmetric_and_close(weight: torch.Tensor) -> None:
    quantized, scale = quantization.quantize_weight(weight)
    assert quantized.dtype == torch.int8
    assert scale.dtype == torch.float32
    assert quantized.min() >= -127  # -128 is never used
    assert (quantized.abs().amax(dim=1) == 127).all()  # the whole range is
    error = (quantized.double() * scale.double()[:, None] - weight.double()).abs()
    # half a step, and the float32 rounding of weight / scale: 127 * 2^-24 of a step at most
    assert (error <= scale.double()[:, None] * (0.5 + 127 * 2**-23)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("shape", [(1, 5), (7, 3), (129, 33)])
def test_absmax_is_the_largest_magnitude(shape: tuple[int, int], dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(quantization.absmax(x, dim), x.abs().amax(dim))
    assert torch.equal(quantization.absmax(-x, dim), quantization.absmax(x, dim))
    x[0, 1] = float("-inf")
    x[-1, 2] = -torch.tensor(float("nan"))  # NaN with its sign bit set
    found = quantization.absmax(x, dim)
    assert found.isnan().any()
    assert not found.isfinite()[1 if dim == 0 else 0]
    assert quantization.absmax(torch.full((3, 2), -0.0, dtype=dtype), dim).tolist() in ([0, 0], [0, 0, 0])


def test_rounding_is_half_to_even() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    quantized, scale = quantization.quantize_weight(weight)
    assert scale.item() == 1
    assert quantized.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_zero_rows_and_tokens_have_a_scale_above_zero() -> None:
    quantized, scale = quantization.quantize_weight(torch.zeros(2, 3))
    assert (scale > 0).all()
    assert (quantized == 0).all()
    values, token_scale = quantization.quantize_tokens(torch.zeros(2, 3))
    assert (token_scale > 0).all()
    assert (values == 0).all()
    assert quantization.input_scale(torch.zeros(3)) > 0


@given(matrices)
def test_tokens_are_independent(x: torch.Tensor) -> None:
    """A token's integers do not depend on its neighbours: an outlier spoils its own token only."""
    values, scale = quantization.quantize_tokens(x)
    for row in range(len(x)):
        alone, alone_scale = quantization.quantize_tokens(x[row : row + 1])
        assert torch.equal(alone[0], values[row])
        assert torch.equal(alone_scale[0], scale[row])
    assert (values.abs().amax(dim=-1) == 127).all()
    assert torch.equal(values, values.round())


@given(matrices, st.integers(0, 100), st.booleans())
def test_linear_is_the_integer_computation(x: torch.Tensor, seed: int, static: bool) -> None:
    """Against NumPy: int64 sums of products, scaled in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight, scale = quantization.quantize_weight(torch.randn(5, x.shape[1], generator=generator))
    bias = torch.randn(5, generator=generator)
    input_scale = quantization.input_scale(x.abs().amax(dim=0)) if static else None
    if input_scale is None:
        values, step = quantization.quantize_tokens(x)
    else:
        values, step = quantization.quantize_tensor(x, input_scale)
    sums = values.numpy().astype(numpy.int64) @ weight.numpy().astype(numpy.int64).T
    expected = sums * step.double().numpy() * scale.double().numpy() + bias.double().numpy()
    activations = ACTIVATIONS["per-tensor" if static else "per-token"]
    found = quantization.w8a8_linear(x, weight, scale, activations, input_scale, bias).double().numpy()
    largest = numpy.abs(expected).max() + numpy.abs(bias.numpy()).max()
    # at most 64 * 127 * 127 < 2^24: the sum is exact in float32; three roundings follow
    assert numpy.abs(found - expected).max() <= 4 * 2**-24 * largest


@pytest.mark.parametrize("columns", [4096, 28672])
def test_float64_is_exact_at_real_widths(columns: int) -> None:
    x, weight = torch.full((1, columns), 1.0, dtype=torch.float64), torch.full((1, columns), 127, dtype=torch.int8)
    found = quantization.w8a8_linear(x, weight, torch.ones(1), ACTIVATIONS["per-token"])
    step = torch.tensor(1 / 127, dtype=torch.float32).double()
    assert found.item() == 127 * 127 * columns * step.item()


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("tokens", [(0,), (1,), (2, 7), (33,)])
@pytest.mark.parametrize("rows", [1, 2, 9, 64])
def test_products_of_integers(int8: bool, tokens: tuple, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By instructions for int8 where the processor has them, else in float32: the exact sum, rounded once or often.
    Of whole matrices and of some columns of one, as ranks have them."""
    monkeypatch.setattr(quantization, "_int8_is_fast", lambda: int8)
    generator = torch.Generator().manual_seed(0)
    for columns in (1, 2, 3, 8, 64, 127, 40_000):
        x = torch.randint(-128, 128, (*tokens, columns), generator=generator).float()
        wide = torch.randint(-127, 128, (rows, 2 * columns), generator=generator).to(torch.int8)
        for weight in (wide[:, :columns].contiguous(), wide[:, columns:]):
            exact = x.double() @ weight.double().T
            found = quantization._product(x, weight)
            assert found.dtype == torch.float32
            # one rounding of 2^-24; in float32 those of partial sums, few of which are above sqrt(in) * 127^2
            torch.testing.assert_close(found.double(), exact, rtol=2**-24 if int8 else 1e-5, atol=0 if int8 else 100)
