"""Smoothed layers are the same function; quantized layers are the smoothed ones in 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smoothquant import decoder
from smoothquant.attention import patterns
from smoothquant.contract import TOLERANCE, Contract, relative_error
from smoothquant.errors import ActScalesError, CheckpointError, ContractError, UserError
from smoothquant.family import SmoothingGroup
from smoothquant.layers import FloatLayer
from smoothquant.model import Model
from smoothquant.scheme import ACTIVATIONS
from smoothquant.settings import SmoothingSettings
from smoothquant.stream import quantize_layer, smooth_layer, smoothed_layers
from tests.models import VOCABULARY, hooked_absmax, open_llama, sample_ids, save_llama
from tests.smoothquant.test_decoder import VARIANTS, float_logits

UP = "model.layers.1.mlp.up_proj"
EVERY = {
    "default": SmoothingSettings(0.5),
    "default, alpha 0.85": SmoothingSettings(0.85),
    "paper": SmoothingSettings(0.5, "paper"),
    "none": SmoothingSettings(groups="none"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_smoothing_leaves_the_logits(variant: str, dtype: torch.dtype, make_llama: Callable[..., Path]) -> None:
    folder, ids = make_llama(dtype=dtype, **VARIANTS[variant]), sample_ids()
    model, absmax = open_llama(folder), hooked_absmax(folder, ids)
    expected = float_logits(model, ids)
    positions = patterns(model, ids.shape[1], torch.float32)
    for settings in EVERY.values():
        hidden = decoder.embed(model, ids, torch.float32)
        for layer in smoothed_layers(model, absmax, settings):
            hidden = decoder.forward(model, layer, hidden, positions)
        assert relative_error(decoder.logits(model, hidden), expected) <= TOLERANCE


def test_groups(llama: Model, input_absmax: dict[str, torch.Tensor]) -> None:
    smoothed = {name: set(smooth_layer(llama, 0, input_absmax, settings).column) for name, settings in EVERY.items()}
    assert smoothed["default"] == {"q", "k", "v", "o", "gate", "up", "down"}
    assert smoothed["paper"] == {"q", "k", "v", "gate", "up"}
    assert smoothed["none"] == set()


def test_paper_scale_is_the_released_formula(llama: Model, input_absmax: dict[str, torch.Tensor]) -> None:
    layer = smooth_layer(llama, 1, input_absmax, SmoothingSettings(0.85, "paper"))
    weights = [layer.source.weights[role] for role in ("q", "k", "v")]
    absmax = torch.cat([weight.abs() for weight in weights]).amax(dim=0).clamp(min=1e-5)
    act = input_absmax["model.layers.1.self_attn.q_proj"]
    released = (act.pow(0.85) / absmax.pow(1 - 0.85)).clamp(min=1e-5)
    torch.testing.assert_close(layer.column["q"], released, rtol=1e-6, atol=0)


@torch.no_grad()
def test_predicted_input_range_is_the_measured_one(
    llama: Model, llama_folder: Path, input_absmax: dict[str, torch.Tensor]
) -> None:
    """Static scales come free: what the stream predicts is what the smoothed model's linears see."""
    ids = sample_ids()
    positions = patterns(llama, ids.shape[1], torch.float32)
    hidden = decoder.embed(llama, ids, torch.float32)
    for layer in smoothed_layers(llama, input_absmax, SmoothingSettings(0.5)):
        seen: dict[str, torch.Tensor] = {}
        listening = FloatLayer(
            layer.index,
            {role: layer.weight(role) for role in llama.roles},
            {},
            layer.norms,
            lambda role, x, y, seen=seen: seen.__setitem__(role, x.abs().flatten(0, 1).amax(dim=0)),
        )
        hidden = decoder.forward(llama, listening, hidden, positions)
        for role, expected in layer.input_absmax.items():
            torch.testing.assert_close(seen[role], expected, rtol=1e-4, atol=1e-6 * expected.max().item())


def test_linears_of_one_input_have_one_scale(llama: Model, input_absmax: dict[str, torch.Tensor]) -> None:
    """Imported act scales may differ within q, k, v; the input is one, so the largest counts."""
    scales = {name: tensor.clone() for name, tensor in input_absmax.items()}
    scales["model.layers.0.self_attn.k_proj"] *= 3
    for settings in EVERY.values():
        linears = quantize_layer(smooth_layer(llama, 0, scales, settings)).linears
        assert linears["q"].input_scale == linears["k"].input_scale == linears["v"].input_scale
    assert torch.equal(
        smooth_layer(llama, 0, scales, EVERY["none"]).input_absmax["q"], scales["model.layers.0.self_attn.k_proj"]
    )


@torch.no_grad()
def test_smoothing_helps(llama: Model, input_absmax: dict[str, torch.Tensor]) -> None:
    """The point of it all, on a model with outlier channels: W8A8 comes closer to float."""
    ids = sample_ids(seed=7)
    expected = float_logits(llama, ids)
    positions = patterns(llama, ids.shape[1], torch.float32)
    error = {}
    for act in ("per-token", "per-tensor"):
        for name, settings in EVERY.items():
            hidden = decoder.embed(llama, ids, torch.float32)
            for layer in smoothed_layers(llama, input_absmax, settings):
                hidden = decoder.forward(llama, quantize_layer(layer).runnable(ACTIVATIONS[act]), hidden, positions)
            error[name, act] = relative_error(decoder.logits(llama, hidden), expected)
        assert error["default", act] < 0.5 * error["none", act]
        assert error["paper", act] < 0.5 * error["none", act]


def test_a_wrong_family_is_caught_and_named(llama: Model, input_absmax: dict[str, torch.Tensor]) -> None:
    """A record that claims the MLP's norm feeds gate alone: up is not compensated, layer 0 differs."""
    groups = tuple(
        SmoothingGroup("mlp", ("gate",)) if group.source == "mlp" else group for group in llama.family.groups
    )
    wrong = Model(llama.checkpoint, replace(llama.family, groups=groups))
    contract = Contract(wrong)
    with pytest.raises(ContractError, match="changed the output of layer 0"):
        contract.check(smooth_layer(wrong, 0, input_absmax, SmoothingSettings(0.5)))


@torch.no_grad()
def test_roundings_of_float32_are_no_change(tmp_path: Path) -> None:
    """Keys with biases as large as Qwen2's: the scores' roundings in float32 change the output by more than the
    contract allows, and float64 tells that smoothing has not. A wrong fold is caught there, too."""
    folder = save_llama(tmp_path / "model", attention_bias=True, rope_theta=1e6)
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith("k_proj.bias")]:
        weights[name].view(-1, 16)[:, [7, 15]] = 3e4  # in the channels that positions turn least
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = open_llama(folder)
    scales = hooked_absmax(folder, sample_ids())
    layers = list(smoothed_layers(model, scales, SmoothingSettings(0.5)))
    before = decoder.embed(model, torch.linspace(0, VOCABULARY - 1, 16).long()[None], torch.float32)
    positions = patterns(model, 16, torch.float32)
    after, stored = (decoder.forward(model, layer, before, positions) for layer in (layers[0], layers[0].source))
    assert relative_error(after, stored) > TOLERANCE
    contract = Contract(model)
    for layer in layers:
        contract.check(layer)
    assert contract.finish() <= TOLERANCE
    layers[0].column.pop("q")
    with pytest.raises(ContractError, match="changed the output of layer 0"):
        Contract(model).check(layers[0])


def test_contract_goes_on_from_its_state(llama: Model, input_absmax: dict[str, torch.Tensor]) -> None:
    layers = list(smoothed_layers(llama, input_absmax, SmoothingSettings(0.5)))
    whole = Contract(llama)
    whole.check(layers[0])
    resumed = Contract(llama, whole.state())
    for contract in (whole, resumed):
        contract.check(layers[1])
    assert whole.finish() == resumed.finish() <= TOLERANCE


def test_settings_are_checked() -> None:
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(UserError, match=r"expected a number in \[0, 1\]"):
            SmoothingSettings(alpha)
    with pytest.raises(UserError, match="expected one of default, paper, none"):
        SmoothingSettings(groups="all")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda scales: scales.pop("model.layers.1.mlp.up_proj"),
            "no activation scales for model.layers.1.mlp.up_proj",
        ),
        (lambda scales: scales.update({"model.layers.9.mlp.up_proj": torch.ones(64)}), "model.layers.9.mlp.up_proj"),
        (
            lambda scales: scales.update({"model.layers.0.mlp.up_proj": torch.ones(65)}),
            r"shape \[65\]; expected \[64\]",
        ),
        (lambda scales: scales["model.layers.0.mlp.up_proj"].fill_(float("nan")), "not finite"),
        (lambda scales: scales["model.layers.0.mlp.up_proj"].fill_(-1), "not finite and >= 0"),
    ],
)
def test_act_scales_are_checked(
    llama: Model, input_absmax: dict[str, torch.Tensor], spoil: Callable, message: str
) -> None:
    scales = {name: tensor.clone() for name, tensor in input_absmax.items()}
    spoil(scales)
    with pytest.raises(ActScalesError, match=message):
        next(smoothed_layers(llama, scales, SmoothingSettings(0.5)))


def test_nan_in_weights_is_named(make_llama: Callable[..., Path], input_absmax: dict[str, torch.Tensor]) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_llama()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or Inf"):
        list(smoothed_layers(open_llama(folder), input_absmax, SmoothingSettings(0.5)))
