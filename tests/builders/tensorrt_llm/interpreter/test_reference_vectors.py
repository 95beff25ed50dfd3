"""What NVIDIA's converter and ModelOpt made of a tiny Llama and a tiny OPT, run here; each README.json says how."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from builders.tensorrt_llm import EnginePrecision, Interpreter, check
from builders.tensorrt_llm.interpreter.interpreter import _Part
from tests.builders.tensorrt_llm import reference
from tests.builders.tensorrt_llm.checkpoints import Linear, Written
from tests.builders.tensorrt_llm.layouts import LLAMA

VECTORS = Path(__file__).parents[1] / "vectors"
EXACT = EnginePrecision(torch.float64)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(0, 128, (16, 12), generator=torch.Generator().manual_seed(0))


def original(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(VECTORS / "inputs" / name / "hf", dtype=torch.float32)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("name", ["llama-tp1", "llama-tp1-static", "llama-tp1-modelopt", "opt-tp1-fp16layout"])
def test_nothing_is_wrong_with_them(name: str) -> None:
    assert check(VECTORS / name) == []


def test_the_unquantized_layout_is_the_model(ids: Tensor) -> None:
    found = Interpreter(VECTORS / "opt-tp1-fp16layout", EXACT).logits(ids)
    assert relative(found, reference.logits(reference.exact(original("opt")), ids)) < 1e-6


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("llama-tp1", 0.07),  # measured: 0.063
        ("llama-tp1-static", 0.27),  # 0.18 to 0.25: one scale for a whole tensor
        ("llama-tp1-modelopt", 0.43),  # 0.40: its alpha is 1, too much for these outliers
    ],
)
def test_quantized_ones_are_near_the_model(name: str, bound: float, ids: Tensor) -> None:
    expected = reference.logits(reference.exact(original("llama")), ids)
    for precision in (EXACT, EnginePrecision(), EnginePrecision(torch.float32, torch.float16)):
        assert relative(Interpreter(VECTORS / name, precision).logits(ids).double(), expected) < bound


ALGORITHMS = {
    "llama-tp1": "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
    "llama-tp1-static": "W8A8_SQ_PER_TENSOR_PLUGIN",
    "llama-tp1-modelopt": "W8A8_SQ_PER_CHANNEL",
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_they_are_transformers_with_their_numbers(name: str, ids: Tensor) -> None:
    """Their int8 weights, scales, smoothers and smoothed norms in transformers' own Llama: the same logits."""
    tensors = load_file(VECTORS / name / "rank0.safetensors")
    linears, model = {}, original("llama").double()
    for layer in range(2):
        prefix = f"transformer.layers.{layer}"
        for norm, theirs in LLAMA.norms.items():
            model.get_submodule(f"model.layers.{layer}.{theirs}").weight.data = tensors[
                f"{prefix}.{norm}.weight"
            ].double()
        for linear in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"):
            linears[layer, linear] = written_by_nvidia(tensors, prefix, linear, ALGORITHMS[name])
    written = Written(VECTORS / name, ALGORITHMS[name], 1, linears, None, LLAMA, [])
    expected = reference.logits(reference.quantized(model, written), ids)
    found = Interpreter(VECTORS / name, EXACT).logits(ids)
    error = (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    assert (error < 1e-6).double().mean() >= 0.75, error.tolist()  # a number half-way may go either way
    assert error.max() < 0.1


def written_by_nvidia(tensors: dict[str, Tensor], prefix: str, name: str, algorithm: str) -> Linear:
    """One linear out of the file. What a static mode multiplies: its act_scale and per_channel_scale."""
    part = {key.removeprefix(f"{prefix}.{name}."): value for key, value in tensors.items() if key.startswith(prefix)}
    weight, rows = part["weight"], (64, 32, 32) if name == "attention.qkv" else (len(part["weight"]),)
    if algorithm == "W8A8_SQ_PER_CHANNEL":
        smoother, scale = 1 / part["prequant_scaling_factor"].double(), part["weights_scaling_factor"].double()
        amax = part["activation_scaling_factor"].item() * 127
        return Linear([], [None], smoother, list(weight.split(rows)), list(scale.split(rows)), amax)
    scale = part["per_channel_scale"].flatten().expand(len(weight)).double()
    amax = 0.0
    if not algorithm.endswith("PER_TOKEN_PLUGIN"):
        source = {
            "attention.qkv": "input_layernorm.scale_to_int",
            "attention.dense": "attention.quantization_scaling_factor",
            "mlp.proj": "mlp.quantization_scaling_factor",
        }.get(name, "post_layernorm.scale_to_int")
        amax = 127 / tensors[f"{prefix}.{source}"].item()
        scale = scale * part["act_scale"].item() * 127 / amax  # y = acc * act_scale * per_channel_scale
    smoother = part["smoother"].flatten().double() if "smoother" in part else torch.ones(weight.shape[1]).double()
    return Linear([], [None], smoother, list(weight.split(rows)), list(scale.split(rows)), amax)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["attention.dense", "mlp.proj", "attention.qkv", "mlp.fc"])
def test_single_linears_by_hand(name: str, static: bool) -> None:
    """The integer formula in numpy, whole numbers and all, to the rounding of float32."""
    interpreter = Interpreter(VECTORS / ("llama-tp1-static" if static else "llama-tp1"), EnginePrecision())
    part = _Part(load_file(VECTORS / ("llama-tp1-static" if static else "llama-tp1") / "rank0.safetensors"), "")
    prefix = f"transformer.layers.1.{name}"
    weight = part[f"{prefix}.weight"].numpy().astype(numpy.int64)
    x = numpy.random.default_rng(1).normal(size=(5, weight.shape[1])).astype(numpy.float32) * 3
    scale = part[f"{prefix}.per_channel_scale"].numpy().astype(numpy.float64)
    smoother = part.get(f"{prefix}.smoother")
    divided = x if smoother is None else x / smoother.numpy()
    layer = _Part(interpreter._ranks[0], "transformer.layers.1.")
    if static:
        multiplier = (
            9.7
            if smoother is None
            else part[f"transformer.layers.1.{name[: name.index('.')]}.quantization_scaling_factor"].item()
        )
        whole = numpy.clip(numpy.rint(divided * numpy.float32(multiplier)), -128, 127).astype(numpy.int64)
        expected = (whole @ weight.T) * part[f"{prefix}.act_scale"].item() * scale
    else:
        amax = numpy.abs(divided).max(axis=1, keepdims=True)
        whole = numpy.clip(numpy.rint(divided * (numpy.float32(127) / amax)), -128, 127).astype(numpy.int64)
        expected = (whole @ weight.T) * (amax.astype(numpy.float64) / 127) * scale
    values = torch.tensor(x)
    if smoother is not None:
        found = interpreter._product(layer, name, interpreter._smooth(layer, name, values))
    else:
        q = torch.tensor(whole, dtype=torch.float32)
        found = interpreter._product(layer, name, (q, None if static else torch.tensor(amax / 127)))
    numpy.testing.assert_allclose(found.numpy(), expected, rtol=5e-7, atol=1e-12)
