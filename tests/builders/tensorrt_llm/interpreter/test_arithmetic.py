"""The kernels' arithmetic, number by number, against whole-number arithmetic written out."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_EVEN, Decimal

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from builders.tensorrt_llm.format.architectures import RUNNABLE_ACTIVATIONS
from builders.tensorrt_llm.interpreter.arithmetic import (
    ACTIVATIONS,
    EnginePrecision,
    activation,
    integer_product,
    normalize,
    quantize_by_scale,
    quantize_per_tensor,
    quantize_per_token,
    rescale,
)
from builders.tensorrt_llm.interpreter.attention import alibi_slopes, cached, inverse_frequencies
from smoothquant.errors import UserError
from tests.zoo import LLAMA3

numbers = st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=8)


def saturated(value: Decimal) -> int:
    return max(-128, min(127, int(value.quantize(Decimal(1), ROUND_HALF_EVEN))))


@given(numbers)
def test_per_token(values: list[float]) -> None:
    x = torch.tensor([values], dtype=torch.float64)
    q, scale = quantize_per_token(x)
    amax = max(1e-6, *(abs(value) for value in values)) if len(values) > 1 else max(1e-6, abs(values[0]))
    assert scale.item() == amax / 127
    assert q.tolist() == [[saturated(Decimal(value * (127 / amax))) for value in values]]
    assert q.abs().max() <= 127


@given(numbers, st.floats(2**-10, 100, width=32))
def test_per_tensor_and_by_scale(values: list[float], factor: float) -> None:
    x = torch.tensor(values, dtype=torch.float64)
    assert quantize_per_tensor(x, torch.tensor([factor])).tolist() == [saturated(Decimal(v * factor)) for v in values]
    assert quantize_by_scale(x, torch.tensor([factor])).tolist() == [saturated(Decimal(v / factor)) for v in values]


def test_ties_go_to_even_and_the_ends_saturate() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 128.5, -128.5, -129.5, 1e9, -1e9])
    expected = [0, 2, 2, 0, -2, 126, 127, 127, -128, -128, 127, -128]
    assert quantize_per_tensor(x, torch.tensor([1.0])).tolist() == expected


def test_a_token_of_zeros() -> None:
    q, scale = quantize_per_token(torch.zeros(1, 4))
    assert q.tolist() == [[0, 0, 0, 0]]
    assert scale.item() == pytest.approx(1e-6 / 127)


@pytest.mark.parametrize("columns", [3, 1024, 1025, 5000])
def test_products_are_exact(columns: int) -> None:
    """Largest numbers of either sign, and random ones: as int64 has them, in float32 rounded once."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randint(-128, 128, (5, columns), generator=generator)
    weight = torch.randint(-128, 128, (7, columns), generator=generator).to(torch.int8)
    x[0], weight[0] = -128, -128
    exact = x @ weight.long().T
    assert integer_product(x.double(), weight).tolist() == exact.tolist()
    assert integer_product(x.float(), weight).equal(exact.to(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_whole_linear_is_the_integer_formula(dtype: torch.dtype, dynamic: bool) -> None:
    """y = (q . w) * activation scale * weight scale, from numpy's int64, to the rounding of the dtype."""
    generator = numpy.random.default_rng(0)
    x, scale = generator.normal(size=(6, 96)), generator.uniform(1e-3, 1e-2, 32).astype(numpy.float32)
    weight = generator.integers(-127, 128, (32, 96))
    amax = numpy.abs(x).max(axis=1, keepdims=True) if dynamic else numpy.full((6, 1), 2.5)
    values = torch.tensor(x).to(dtype)
    if dynamic:
        q, activation = quantize_per_token(values)
    else:
        q, activation = quantize_per_tensor(values, torch.tensor([127 / 2.5])), torch.tensor([[2.5 / 127]])
    whole = numpy.clip(numpy.rint(x * (127 / amax)), -128, 127).astype(numpy.int64)
    assert (q.numpy() == whole).all()
    found = rescale(integer_product(q, torch.tensor(weight, dtype=torch.int8)), activation, torch.tensor(scale))
    expected = (whole @ weight.T) * (amax / 127) * scale
    numpy.testing.assert_allclose(
        found.numpy(), expected, rtol=4e-7 if dtype == torch.float32 or not dynamic else 1e-15
    )


def test_held_numbers_are_the_engine_dtype() -> None:
    x = torch.tensor([1 / 3, 70000.0, 1e-9])
    assert EnginePrecision().hold(x) is x
    held = EnginePrecision(torch.float64, torch.float16).hold(x.double())
    assert held.tolist() == [numpy.float16(1 / 3), math.inf, 0]
    assert held.dtype == torch.float64


def test_gelu_is_the_tanh_form_by_any_name() -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    expected = torch.nn.functional.gelu(x, approximate="tanh")
    for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "geglu"):
        torch.testing.assert_close(activation(name, x), expected, rtol=1e-12, atol=1e-14)


def test_every_activation_that_the_rules_let_through_is_computed() -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    computed = {name: activation(name, x) for name in RUNNABLE_ACTIVATIONS}
    assert set(RUNNABLE_ACTIVATIONS.values()) == set(ACTIVATIONS)
    torch.testing.assert_close(computed["swiglu"], x * torch.sigmoid(x), rtol=1e-12, atol=1e-14)
    assert computed["relu"].equal(x.clamp_min(0))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms(kind: str) -> None:
    x, weight, bias = torch.randn(3, 16).double(), torch.rand(16), torch.rand(16)
    if kind == "rms":
        expected = torch.nn.functional.rms_norm(x, (16,), weight.double(), 1e-5)
        torch.testing.assert_close(normalize(kind, x, weight, None, 1e-5), expected)
    else:
        expected = torch.nn.functional.layer_norm(x, (16,), weight.double(), bias.double(), 1e-5)
        torch.testing.assert_close(normalize(kind, x, weight, bias, 1e-5), expected)


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}, LLAMA3])
def test_frequencies_are_those_of_transformers(scaling: dict | None) -> None:
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        rope_parameters=scaling or {"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=512,
    )
    found = inverse_frequencies(64, 10000.0, scaling)
    if scaling is None:
        expected = 1 / 10000 ** (torch.arange(0, 64, 2).double() / 64)
    else:
        expected = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")[0]
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=0)


def test_a_scaling_in_the_old_spelling_and_an_unknown_one() -> None:
    new = inverse_frequencies(64, 1e4, {"rope_type": "linear", "factor": 2.0})
    assert inverse_frequencies(64, 1e4, {"type": "linear", "factor": 2.0}).equal(new)
    with pytest.raises(UserError, match="'yarn' cannot be run here; expected linear or llama3"):
        inverse_frequencies(64, 1e4, {"rope_type": "yarn", "factor": 2.0})


@pytest.mark.parametrize("heads", [1, 4, 6, 8, 12, 71])
def test_slopes_are_those_of_transformers(heads: int) -> None:
    expected = build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(heads), expected, rtol=1e-6, atol=0)


def test_an_int8_cache() -> None:
    x = torch.tensor([0.0, 0.024, 0.026, 1.0, -7.0], dtype=torch.float64)
    scale = torch.tensor([0.05])
    step = scale.double().item()
    assert cached(x, None) is x
    assert cached(x, scale).tolist() == [0.0, 0.0, step, 20 * step, -128 * step]
