"""Every layout in every mode, read by an independent interpreter of the format: the logits are our stream's.

The interpreter (`builders.tensorrt_llm`) shares no code with the exporter. In float64 nothing is rounded but to int8,
so that it must compute what the quantized layers of the stream compute, biases rounded to float16 as the file has them.
A number that falls half-way between two integers may go either way in the two: sequences are short and many, and most
must be untouched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from builders.tensorrt_llm import EnginePrecision, Interpreter, check
from exporters.export import Source
from exporters.trtllm import MODES, Mode
from smoothquant import decoder
from smoothquant.attention import patterns
from smoothquant.contract import relative_error
from smoothquant.layers import Layer
from smoothquant.norms import Norm
from smoothquant.stream import QuantizedLayer, quantize_layer, smoothed_layers
from tests.builders.onnxruntime.test_model_exactness import WithProductsInFloat32
from tests.exporters.trtllm.checkpoints import PER_TOKEN, makers, settings, write
from tests.models import sample_ids

EXACT = EnginePrecision(torch.float64)
LAYOUTS: dict[str, dict[str, object]] = {
    "llama": {},
    "llama-tied": {},
    "llama-biased": {},
    "llama-scaled": {},
    "mistral-nemo": {},
    "qwen2": {},
    "phi3": {},
    "bloom": {},
    "bloom-6-heads": {},
    "falcon-7b": {"activation": "gelu_pytorch_tanh"},  # TensorRT-LLM's gelu is always that
    "falcon-40b": {"activation": "gelu_pytorch_tanh"},
    "falcon-11b": {"activation": "gelu_pytorch_tanh"},
    "opt": {},
}


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    return makers(tmp_path_factory, LAYOUTS)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return sample_ids(sequences=24, tokens=6, seed=11)


def in_file(layer: QuantizedLayer) -> QuantizedLayer:
    """The layer with its biases in float16, as the file has them."""
    linears = {
        role: replace(linear, bias=None if linear.bias is None else linear.bias.half())
        for role, linear in layer.linears.items()
    }
    norms = {
        role: Norm(norm.kind, norm.weight, None if norm.bias is None else norm.bias.half())
        for role, norm in layer.norms.items()
    }
    return replace(layer, linears=linears, norms=norms)


@torch.no_grad()
def stream_logits(
    source: Source, mode: Mode, groups: str, ids: Tensor, dtype: torch.dtype = torch.float64, tp: int = 1
) -> Tensor:
    """By our own arithmetic, with activations in `dtype`; of float16, quantized products are in float32."""
    model = source.model
    hidden, positions = decoder.embed(model, ids, dtype), patterns(model, ids.shape[1], dtype)
    smoothing = settings(mode, groups)
    for layer in smoothed_layers(model, source.input_absmax, smoothing, output_absmax=source.output_absmax):
        quantized = in_file(quantize_layer(layer, mode.scheme)).runnable(mode.scheme.activations)
        running: Layer = replace(quantized, ranks=tp)
        if dtype == torch.float16:
            running = WithProductsInFloat32(quantized)
        hidden = decoder.forward(model, running, hidden, positions)
    return decoder.logits(model, hidden)


@torch.no_grad()
def float_logits(source: Source, ids: Tensor) -> Tensor:
    model = source.model
    hidden, positions = decoder.embed(model, ids, torch.float32), patterns(model, ids.shape[1], torch.float32)
    for layer in smoothed_layers(model, source.input_absmax, source.settings):
        hidden = decoder.forward(model, layer.source, hidden, positions)
    return decoder.logits(model, hidden)


def assert_same(found: Tensor, expected: Tensor) -> None:
    error = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert (error <= 1e-6).double().mean() >= 0.75, error.tolist()
    assert error.max() < 0.2, error.tolist()


CASES = [
    pytest.param(name, mode, groups, id=f"{name}-{mode.algo}-{groups}")
    for name in LAYOUTS
    for mode in MODES
    for groups in (("default", "run-time") if mode.plugin else ("unfolded",))
    if mode.static or name != "opt"  # refused: test_bad_input
]


@pytest.mark.parametrize(("name", "mode", "groups"), CASES)
def test_the_interpreter_computes_what_the_stream_does(
    name: str, mode: Mode, groups: str, ids: Tensor, source_of: Callable[[str], Source], tmp_path: Path
) -> None:
    source = source_of(name)
    out = write(source, tmp_path / "out", mode, groups=groups)
    assert check(out) == []
    found = Interpreter(out, EXACT).logits(ids)
    assert_same(found, stream_logits(source, mode, groups, ids))
    assert relative_error(found, float_logits(source, ids)) < (0.15 if mode.static else 0.05)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (4, 1), (1, 2), (4, 2)])
@pytest.mark.parametrize("name", ["llama", "llama-biased", "qwen2", "falcon-7b", "falcon-40b"])
def test_ranks_compute_the_same(
    name: str, tp: int, pp: int, ids: Tensor, source_of: Callable[[str], Source], tmp_path: Path
) -> None:
    """With static activations as one rank does; per token, each has a scale of its own for its part of an input."""
    mode, source = MODES[2], source_of(name)
    one = Interpreter(write(source, source.model.checkpoint.folder.parent / "one", mode), EXACT).logits(ids)
    out = write(source, tmp_path / "many", mode, tp=tp, pp=pp)
    assert check(out) == []
    assert_same(Interpreter(out, EXACT).logits(ids), one)
    dynamic = Interpreter(write(source, tmp_path / "dynamic", PER_TOKEN, tp=tp, pp=pp), EXACT).logits(ids)
    assert_same(dynamic, stream_logits(source, PER_TOKEN, "default", ids, tp=tp))


@pytest.mark.parametrize("name", ["llama", "llama-scaled", "bloom", "falcon-40b"])
def test_int8_kv_cache(name: str, ids: Tensor, source_of: Callable[[str], Source], tmp_path: Path) -> None:
    """The folds leave values and keys equally far: an INT8 cache of both costs little, with every kind of smoothing."""
    source = source_of(name)
    for groups in ("default", "paper", "run-time"):
        plain, int8 = (
            Interpreter(write(source, tmp_path / f"{groups}-{kv}", kv=kv, groups=groups), EXACT).logits(ids)
            for kv in ("float", "int8")
        )
        assert relative_error(int8, plain) < 0.05, groups


def test_float16_and_bfloat16_engines(ids: Tensor, source_of: Callable[[str], Source], tmp_path: Path) -> None:
    """With activations rounded wherever an engine holds them, the logits stay where W8A8 has them."""
    source = source_of("llama")
    expected = float_logits(source, ids)
    out = write(source, tmp_path / "out")
    for held in (torch.float16, torch.bfloat16):
        found = Interpreter(out, EnginePrecision(torch.float32, held)).logits(ids)
        assert relative_error(found, expected) < 0.05
