"""Every quantized linear of an exported graph, fed the same input, is the exact integer computation.

The graph's own inputs and outputs of each product are made outputs, onnxruntime runs it, and the integers and results
are compared with `smoothquant.quantization`. The weights of the reference come from the stream, not from the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exporters.export import Source
from exporters.onnx.products import merged_name
from smoothquant.contract import relative_error
from smoothquant.quantization import quantize_tensor, quantize_tokens, quantize_weight, w8a8_linear
from smoothquant.scheme import ACTIVATIONS
from smoothquant.stream import QuantizedLinear, quantize_layer, smoothed_layers
from tests.exporters.onnx.graphs import (
    FORMS,
    SETTINGS,
    W8A8_FORMS,
    export_onnx,
    expose,
    load_graph,
    products,
    source_of,
)
from tests.models import sample_ids
from tests.smoothquant.test_decoder import VARIANTS

# Float32 rounds three times after the exact integer sum (its conversion, two scales): each at most 6e-8
TOLERANCE = 1e-6
HALF = 2.0**-11  # largest relative rounding error of float16
SMALLEST = 2.0**-25  # and its largest error below the normal numbers


def quantized_linears(source: Source) -> dict[str, list[QuantizedLinear]]:
    """By the name of a product: the linears side by side in it; the head's has one dynamic scale per token."""
    model, found = source.model, {}
    for layer in map(quantize_layer, smoothed_layers(model, source.input_absmax, SETTINGS)):
        for roles in model.side_by_side:
            found[merged_name(model, layer.index, roles)] = [layer.linears[role] for role in roles]
    weight, scale = quantize_weight(model.read(model.lm_head))
    return found | {"lm_head": [QuantizedLinear("lm_head", weight, scale, None)]}


def quantize(x: Tensor, linear: QuantizedLinear, per_token: bool) -> tuple[Tensor, Tensor]:
    return quantize_tokens(x) if per_token else quantize_tensor(x, linear.input_scale)


def exact(x: Tensor, linear: QuantizedLinear, per_token: bool) -> Tensor:
    """`w8a8_linear` in float64, without bias, for the integers that float32 gives. x: float32 (batch, tokens, in)."""
    integers, _ = quantize(x, linear, per_token)
    wide, scale = quantize(x.double(), linear, per_token)
    y = integers.double() @ linear.weight.t().double() * scale * linear.weight_scale.double()
    same = (integers == wide).all(dim=-1)  # where float32 and float64 round alike
    assert same.float().mean() > 0.9
    input_scale = None if per_token else linear.input_scale
    activations = ACTIVATIONS["per-token" if per_token else "per-tensor"]
    theirs = w8a8_linear(x.double(), linear.weight, linear.weight_scale, activations, input_scale)
    torch.testing.assert_close(y[same], theirs[same], rtol=1e-12, atol=1e-12)  # the formula above is that function
    return y


@pytest.mark.parametrize("form", W8A8_FORMS)
@pytest.mark.parametrize("variant", ["grouped heads", "biases", "tied embeddings"])
@torch.no_grad()
def test_products_are_exact(form: str, variant: str, make_llama: Callable[..., Path], tmp_path: Path) -> None:
    source, ids = source_of(make_llama(**VARIANTS[variant])), sample_ids(seed=4)
    out = export_onnx(source, tmp_path / "out", **FORMS[form])
    assert check_products(source, out, ids) == 8 + ("int8 head" in form)


@torch.no_grad()
def check_products(source: Source, out: Path, ids: Tensor) -> int:
    """Every quantized product of an export, run on ids (batch, tokens), is exact. Returns how many there are."""
    found, linears = products(load_graph(out).graph), quantized_linears(source)
    names = list(dict.fromkeys(value for p in found for value in (p.x, p.y, p.result, p.rows) if value))
    watched = expose(out, names)
    assert watched.fused["MatMulIntegerToFloat"] == len(found)  # watching leaves the kernels what they were
    values = dict(zip(names, watched.run(ids, outputs=names), strict=True))
    for product in found:
        x, y, result = values[product.x], values[product.y], values[product.result]
        x = x[values[product.rows]] if product.rows else x
        assert x.dtype == y.dtype == torch.float32
        if not x.numel():  # an expert that none of these tokens reached
            continue
        start = 0
        for linear in linears[product.name]:
            columns = slice(start, start + len(linear.weight))
            start = columns.stop
            reference = exact(x, linear, product.per_token)
            assert relative_error(y[..., columns], reference) <= TOLERANCE, linear.name
            check_result(result[..., columns], reference, linear.bias)
        assert start == y.shape[-1]
    return len(found)


def check_result(result: Tensor, reference: Tensor, bias: Tensor | None) -> None:
    """After the cast to the body's dtype and the bias."""
    bias = torch.zeros(1) if bias is None else bias
    if result.dtype == torch.float32:
        assert relative_error(result, reference + bias.double()) <= TOLERANCE
        return
    bias = bias.half().double()
    rounding = HALF * (reference.abs() + (reference + bias).abs()) * (1 + HALF) + 2 * SMALLEST  # the cast, the sum
    allowed = rounding + TOLERANCE * reference.norm()
    assert ((result.double() - reference - bias).abs() <= allowed).all()


@pytest.mark.parametrize("form", W8A8_FORMS)
@torch.no_grad()
def test_integers_are_the_same_to_the_bit(form: str, make_llama: Callable[..., Path], tmp_path: Path) -> None:
    source, ids = source_of(make_llama(**VARIANTS["biases"])), sample_ids(sequences=8, seed=6)
    out = export_onnx(source, tmp_path / "out", **FORMS[form])
    linears = quantized_linears(source)
    found = products(load_graph(out).graph)
    names = list(dict.fromkeys(value for p in found for value in (p.x, p.integers)))
    plain: dict[
        str, str
    ] = {}  # what is watched does not fuse, which fails with the setting for AVX2 (onnxruntime 1.32)
    values = dict(zip(names, expose(out, names, plain).run(ids, outputs=names), strict=True))
    for product in found:
        x, integers = values[product.x], values[product.integers]
        expected, _ = quantize(x, linears[product.name][0], product.per_token)
        assert integers.dtype == torch.int8
        assert torch.equal(integers, expected.to(torch.int8)), product.name
        assert integers.abs().amax() >= 100  # the range is used


@torch.no_grad()
def test_clipping_and_silent_tokens(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """Beyond the calibrated range, and for a token without any signal, the kernels saturate as the formula does."""
    source = source_of(make_llama())
    narrow = {name: absmax / 8 for name, absmax in source.input_absmax.items()}
    rows = source.model.rows
    present = torch.ones(source.model.geometry.vocab_size, 1).index_fill_(0, torch.tensor(0), 0.0)
    source.model.rows = lambda name: (part * present if "embed" in name else part for part in rows(name))  # one part
    source = Source(source.model, SETTINGS, narrow)
    ids = sample_ids(seed=4)
    ids[:, 0] = 0
    for activations in ("per-token", "per-tensor"):
        out = export_onnx(source, tmp_path / activations, activations=activations)
        first = products(load_graph(out).graph)[0]
        x, y = expose(out, (first.x, first.y)).run(ids, outputs=(first.x, first.y))
        linear = quantized_linears(source)[first.name][0]
        integers, _ = quantize(x, linear, first.per_token)
        assert (x[:, 0] == 0).all()
        assert first.per_token or (integers == -128).any()
        y = y[..., : len(linear.weight)]
        assert (y[:, 0] == 0).all()
        assert relative_error(y, exact(x, linear, first.per_token)) <= TOLERANCE
