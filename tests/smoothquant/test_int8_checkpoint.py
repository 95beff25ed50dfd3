"""Reading INT8 folders that other tools wrote, and refusing those whose form is not computed here."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from recipes.families import open_int8_model
from smoothquant.errors import CheckpointError
from smoothquant.int8_model import Int8Model
from smoothquant.scheme import ACTIVATIONS, WEIGHTS
from tests.int8_folders import (
    INPUT_STEP,
    compressed_tensors,
    edit_json,
    linears,
    modelopt,
    rounded,
    save_compressed_tensors,
    save_modelopt,
)

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
MakeLlama = Callable[..., Path]


def floats(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_compressed_tensors(
    strategy: str, static: bool, scale_dtype: torch.dtype, make_llama: MakeLlama, tmp_path: Path
) -> None:
    model = make_llama()
    folder = save_compressed_tensors(model, tmp_path / "int8", strategy, static=static, scale_dtype=scale_dtype)
    found = open_int8_model(folder)
    assert found.scheme.weights == WEIGHTS[f"per-{strategy}"]
    assert found.scheme.activations == ACTIVATIONS["per-tensor" if static else "per-token"]
    assert found.scheme.float_linears == ()
    for name, shape in found.model.linears():
        weight, steps = rounded(floats(model)[f"{name}.weight"], strategy)
        linear = found.linear(name)
        assert torch.equal(linear.weight, weight)
        assert torch.equal(linear.weight_scale, steps.to(scale_dtype).float().expand(shape[0]))
        assert linear.pre_quant_scale is None
        if static:
            assert linear.input_scale is not None
            assert linear.input_scale.shape == ()
            assert linear.input_scale == torch.tensor(INPUT_STEP, dtype=scale_dtype).float()
        else:
            assert linear.input_scale is None
    assert torch.equal(found.model.read("model.norm.weight"), floats(model)["model.norm.weight"])


def test_the_configs_of_the_tests_are_compressed_tensors_own() -> None:
    for static in (False, True):
        config = compressed_tensors(static=static)
        for key in ("version", "sparsity_config", "transform_config"):  # transformers takes these apart
            config.pop(key)
        QuantizationConfig.model_validate(config)


@pytest.mark.parametrize("place", ["hf_quant_config.json", "config.json", "both"])
def test_modelopt(place: str, make_llama: MakeLlama, tmp_path: Path) -> None:
    model = make_llama()
    smoothing = {Q: torch.rand(64).half() + 0.5}
    folder = save_modelopt(model, tmp_path / "int8", smoothing)
    if place != "hf_quant_config.json":
        embedded = {"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL", "ignore": ["lm_head"]}
        edit_json(folder / "config.json", {"quantization_config": embedded})
    if place == "config.json":
        (folder / "hf_quant_config.json").unlink()
    found = open_int8_model(folder)
    assert found.scheme.activations.static
    weight, steps = rounded(floats(model)[f"{Q}.weight"] / smoothing[Q].float())
    linear = found.linear(Q)
    assert torch.equal(linear.weight, weight)
    assert torch.equal(linear.weight_scale, steps)
    assert linear.pre_quant_scale is not None
    assert torch.equal(linear.pre_quant_scale, smoothing[Q].float())
    assert found.linear(DOWN).pre_quant_scale is None


def test_linears_in_float_are_named(make_llama: MakeLlama, tmp_path: Path) -> None:
    model = make_llama()
    folder = save_modelopt(model, tmp_path / "int8")
    tensors = floats(folder)
    del tensors[f"{DOWN}.weight_scale"], tensors[f"{DOWN}.input_scale"]
    tensors[f"{DOWN}.weight"] = floats(model)[f"{DOWN}.weight"]
    save_file(tensors, folder / "model.safetensors")
    found = open_int8_model(folder)
    assert found.scheme.float_linears == (DOWN,)
    assert torch.equal(found.model.read(f"{DOWN}.weight"), tensors[f"{DOWN}.weight"])


def group(**changes: Any) -> dict[str, Any]:
    """Changes to the weights, inputs or outputs of the only group."""
    config = compressed_tensors(static=True)
    for part, values in changes.items():
        config["config_groups"]["group_0"][part] = values and {**config["config_groups"]["group_0"][part], **values}
    return config


def two_groups() -> dict[str, Any]:
    config = compressed_tensors(static=True)
    other = copy.deepcopy(config["config_groups"]["group_0"])
    other["weights"]["strategy"] = "tensor"
    config["config_groups"]["group_1"] = other
    return config


CONFIGS = {  # what is said -> a key of the message
    "int4": (group(weights={"num_bits": 4}), "weights.num_bits is 4"),
    "fp8": (group(weights={"type": "float"}), 'weights.type is "float"'),
    "groups of columns": (group(weights={"strategy": "group", "group_size": 128}), "weights.group_size is 128"),
    "asymmetric weights": (group(weights={"symmetric": False}), "weights.symmetric is false"),
    "asymmetric inputs": (group(input_activations={"symmetric": False}), "input_activations.symmetric is false"),
    "dynamic per tensor": (group(input_activations={"dynamic": True}), "strategy tensor with dynamic true"),
    "static per token": (group(input_activations={"strategy": "token"}), "strategy token with dynamic false"),
    "local": (group(input_activations={"dynamic": "local"}), 'input_activations.dynamic is "local"'),
    "weights alone": (group(input_activations=None), "input_activations is null"),
    "outputs": (group() | {}, "output_activations"),
    "no groups": (compressed_tensors() | {"config_groups": {}}, "config_groups is {}"),
    "groups that are no objects": (compressed_tensors() | {"config_groups": {"W8A8": ["Linear"]}}, "config_groups is"),
    "two groups": (two_groups(), "group_1 differs from group_0"),
    "a KV cache": (compressed_tensors() | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is"),
    "rotations": (compressed_tensors() | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config is"),
    "2:4": (compressed_tensors() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is"),
    "packed": (compressed_tensors() | {"format": "pack-quantized"}, 'format is "pack-quantized"'),
    "a key of the future": (compressed_tensors() | {"smoother": 1}, "smoother: this key is not known"),
    "a strategy of another kind": (group(weights={"strategy": ["channel"]}), 'weights.strategy is ["channel"]'),
    "true for 8": (group(weights={"num_bits": True}), "weights.num_bits is true"),
    "another method": (compressed_tensors() | {"quant_method": "gptq"}, "quant_method 'gptq'"),
    "a list": ([], "quant_method None"),
}
CONFIGS["outputs"][0]["config_groups"]["group_0"]["output_activations"] = {"num_bits": 8}


@pytest.mark.parametrize("said", CONFIGS)
def test_other_forms_are_refused_by_their_key(said: str, make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = save_compressed_tensors(make_llama(), tmp_path / "int8", static=True)
    config, fault = CONFIGS[said]
    edit_json(folder / "config.json", {"quantization_config": config})
    refused(folder, fault)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"quant_algo": "FP8"}, 'quant_algo is "FP8"'),
        ({"quant_algo": "MIXED_PRECISION", "quantized_layers": {Q: {}}}, 'quant_algo is "MIXED_PRECISION"'),
        ({"kv_cache_quant_algo": "INT8"}, 'kv_cache_quant_algo is "INT8"'),
        ({"has_zero_point": True}, "has_zero_point is true"),
        ({"lora_rank": 8}, "lora_rank: this key is not known"),
    ],
)
def test_other_algorithms_of_modelopt_are_refused(
    changes: Mapping[str, Any], fault: str, make_llama: MakeLlama, tmp_path: Path
) -> None:
    folder = save_modelopt(make_llama(), tmp_path / "int8")
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": modelopt()["quantization"] | changes}))
    refused(folder, fault)


def test_two_dialects_at_once_are_refused(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = save_compressed_tensors(make_llama(), tmp_path / "int8", static=True)
    (folder / "hf_quant_config.json").write_text(json.dumps(modelopt()))
    refused(folder, "and there is hf_quant_config.json")


Change = Callable[[dict[str, Tensor]], object]
TENSORS: dict[str, tuple[Change, str]] = {
    "a scale is missing": (lambda t: t.pop(f"{Q}.weight_scale"), f"{Q}.weight_scale is missing"),
    "an input scale is missing": (lambda t: t.pop(f"{Q}.input_scale"), f"{Q}.input_scale is missing"),
    "a scale is left over": (
        lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].float()}),
        "scale belongs to no int8 weight",
    ),
    "a scale too short": (lambda t: t.update({f"{Q}.weight_scale": torch.ones(63)}), "has shape [63]"),
    "a scale for each column": (lambda t: t.update({f"{DOWN}.weight_scale": torch.ones(128)}), "has shape [128]"),
    "groups": (lambda t: t.update({f"{Q}.weight_scale": torch.ones(64, 2)}), "has shape [64, 2]"),
    "a scale of whole numbers": (
        lambda t: t.update({f"{Q}.weight_scale": torch.ones(64, dtype=torch.int8)}),
        "has dtype I8",
    ),
    "two input scales": (lambda t: t.update({f"{Q}.input_scale": torch.ones(2)}), "has shape [2]"),
    "a zero point": (
        lambda t: t.update({f"{Q}.input_zero_point": torch.tensor([3], dtype=torch.int8)}),
        f"{Q}.input_zero_point is not 0",
    ),
    "int32": (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].int()}), "dtype I32"),
    "fp8": (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].to(torch.float8_e4m3fn)}), "dtype F8_E4M3"),
    "an int8 head": (
        lambda t: t.update(
            {
                "lm_head.weight": t["lm_head.weight"].to(torch.int8),
                "lm_head.weight_scale": torch.ones(288),
                "lm_head.input_scale": torch.ones(1),
            }
        ),
        "lm_head is quantized",
    ),
    "an int8 norm": (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "of shape [64]"),
    "other widths": (lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:, :32].contiguous()}), "shape [64, 32]"),
    "scales of the cache": (lambda t: t.update({f"{Q}.k_scale": torch.ones(1)}), "k_scale is not part of"),
    "all in float": (
        lambda t: [t.pop(name) if "scale" in name else t.update({name: t[name].float()}) for name in list(t)],
        "is int8 nowhere",
    ),
}


@pytest.mark.parametrize("fault", TENSORS)
@pytest.mark.parametrize("dialect", ["compressed-tensors", "modelopt"])
def test_tensors_that_do_not_fit_are_refused_by_name(
    dialect: str, fault: str, make_llama: MakeLlama, tmp_path: Path
) -> None:
    folder = saved(dialect, make_llama(), tmp_path / "int8")
    change, message = TENSORS[fault]
    tensors = floats(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, message)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["weight_scale", "input_scale", "pre_quant_scale"])
def test_scales_that_are_no_steps_are_refused_when_they_are_read(
    kind: str, value: float, make_llama: MakeLlama, tmp_path: Path
) -> None:
    folder = save_modelopt(make_llama(), tmp_path / "int8", {Q: torch.ones(64)})
    tensors = floats(folder)
    tensors[f"{Q}.{kind}"].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors")
    found = open_int8_model(folder)
    if (kind, value) == ("weight_scale", -1.0):  # as AutoRound writes it
        assert found.linear(Q).weight_scale[0] == -1
        return
    with pytest.raises(CheckpointError, match=rf"{kind} holds a number that is no step"):
        found.linear(Q)


def test_a_dynamic_folder_has_no_input_scale(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = save_compressed_tensors(make_llama(), tmp_path / "int8", static=True)
    edit_json(folder / "config.json", {"quantization_config": compressed_tensors()})
    refused(folder, "input_scale is there, though the scales of inputs are dynamic")


def test_compressed_tensors_has_no_pre_quant_scale(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = save_compressed_tensors(make_llama(), tmp_path / "int8")
    save_file(floats(folder) | {f"{Q}.pre_quant_scale": torch.ones(64)}, folder / "model.safetensors")
    refused(folder, f"{Q}.pre_quant_scale is there")


def test_zero_points_of_symmetric_weights_are_passed_over(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = save_compressed_tensors(make_llama(), tmp_path / "int8")
    tensors = floats(folder)
    zeros = {f"{name}.weight_zero_point": torch.zeros(64, 1, dtype=torch.int8) for name in linears(tensors)}
    save_file(tensors | zeros, folder / "model.safetensors")
    assert isinstance(open_int8_model(folder), Int8Model)


def saved(dialect: str, model: Path, out: Path) -> Path:
    return save_modelopt(model, out) if dialect == "modelopt" else save_compressed_tensors(model, out, static=True)


def refused(folder: Path, fault: str) -> None:
    """The folder is refused in one line, which names the fault."""
    with pytest.raises(CheckpointError) as caught:
        open_int8_model(folder)
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.do
