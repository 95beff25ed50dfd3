"""The checkpoint in ModelOpt's form: through our reader, and by numpy alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from exporters.export import export
from exporters.huggingface import ModelOptWriter, W8A8Writer
from recipes.families import open_int8_model
from smoothquant.errors import ActScalesError, UserError
from smoothquant.quantization import w8a8_linear
from smoothquant.scheme import ACTIVATIONS, scheme_of
from smoothquant.stream import quantize_layer, smoothed_layers
from tests.exporters.huggingface.test_huggingface import SETTINGS, source_of
from tests.families.case import Case

LAYOUTS = ("llama", "phi3", "bloom", "falcon-40b", "mixtral", "gemma3", "opt")  # fused, interleaved, experts, biases


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number_is_that_of_the_w8a8_checkpoint(layout: str, tmp_path: Path) -> None:
    """Two formats of one pass: int8 and scales to the bit, the rest in float16."""
    case = Case(layout, tmp_path)
    ours, theirs = (load_file(case.export(form) / "model.safetensors") for form in ("w8a8 static", "modelopt"))
    assert ours.keys() == theirs.keys()
    for name, found in theirs.items():
        end, expected = name.rpartition(".")[2], ours[name]
        if end in ("weight_scale", "input_scale"):
            assert found.dtype == np.float32
            assert found.shape == (expected.shape[:1] if end == "weight_scale" else ())
            assert found.reshape(expected.shape).tobytes() == expected.tobytes()
        elif expected.dtype == np.int8:
            assert found.tobytes() == expected.tobytes()
        else:
            assert found.dtype == np.float16
            assert found.tobytes() == expected.astype(np.float16).tobytes()


def test_numpy_computes_a_linear_from_the_folder(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """As Edge-LLM's INT8SQLinear documents it, in float64: our own arithmetic, to its last digits."""
    source = source_of(make_llama())
    export(source, [ModelOptWriter(tmp_path / "out")])
    tensors = load_file(tmp_path / "out/model.safetensors")
    x = np.random.default_rng(0).normal(size=(5, 64))
    for layer in map(quantize_layer, smoothed_layers(source.model, source.input_absmax, SETTINGS)):
        for role in ("q", "gate"):
            ours = layer.linears[role]
            weight, weight_scale, input_scale = (
                tensors[f"{ours.name}.{part}"].astype(np.float64) for part in ("weight", "weight_scale", "input_scale")
            )
            steps = np.clip(np.rint(x / input_scale), -128, 127)
            expected = (steps * input_scale) @ (weight * weight_scale[:, None]).T
            static = ACTIVATIONS["per-tensor"]
            found = w8a8_linear(torch.tensor(x), ours.weight, ours.weight_scale, static, ours.input_scale)
            np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_it_is_read_back(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    kept = ("model.layers.0.mlp.down_proj",)
    source = source_of(make_llama())
    export(source, [ModelOptWriter(tmp_path / "out", scheme_of("per-tensor", float_linears=kept))])
    found = open_int8_model(tmp_path / "out")
    assert found.scheme == scheme_of("per-tensor", float_linears=kept)
    for smoothed in smoothed_layers(source.model, source.input_absmax, SETTINGS):
        for linear in quantize_layer(smoothed, found.scheme).linears.values():
            read = found.linear(linear.name)
            assert linear.input_scale is not None
            assert torch.equal(read.weight, linear.weight)
            assert torch.equal(read.weight_scale, linear.weight_scale)
            assert read.input_scale == linear.input_scale
            assert read.pre_quant_scale is None
    assert found.model.read(f"{kept[0]}.weight").dtype == torch.float16


def test_what_the_folder_says(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    kept = "model.layers.0.mlp.down_proj"
    export(
        source_of(make_llama(dtype=torch.bfloat16)),
        [ModelOptWriter(tmp_path / "out", scheme_of("per-tensor", float_linears=(kept,)))],
    )
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["dtype"], config["torch_dtype"]) == ("float16", "float16")
    assert config["quantization_config"]["quant_method"] == "modelopt"
    assert config["quantization_config"]["ignore"] == ["lm_head", kept]
    said = json.loads((tmp_path / "out/hf_quant_config.json").read_text())
    assert said == {
        "producer": {"name": "modelopt"},
        "quantization": {
            "quant_algo": "W8A8_SQ_PER_CHANNEL",
            "kv_cache_quant_algo": None,
            "exclude_modules": ["lm_head", kept],
        },
    }


def test_it_is_static(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"per-token activations.*expected .*per-tensor activations"):
        ModelOptWriter(tmp_path / "out", scheme_of("per-token"))
    W8A8Writer(tmp_path / "out", scheme_of("per-token"))  # the control
    source = source_of(make_llama())
    without = type(source)(source.model, SETTINGS)
    with pytest.raises(ActScalesError, match="static activations, and no activation scales"):
        export(without, [ModelOptWriter(tmp_path / "out")])
