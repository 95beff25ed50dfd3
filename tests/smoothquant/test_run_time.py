"""Smoothing that is left for run time, and what calibration knows of outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from act_scales.collect import collect
from act_scales.text import Text
from recipes.families import open_model
from smoothquant import decoder, kv_cache
from smoothquant.attention import patterns
from smoothquant.contract import TOLERANCE, relative_error
from smoothquant.errors import UserError
from smoothquant.layers import FloatLayer
from smoothquant.model import Model
from smoothquant.settings import GROUPS, RUN_TIME_GROUPS, SmoothingSettings
from smoothquant.stream import QuantizingLayer, quantize_layer, smooth_layer, smoothed_layers
from tests import zoo
from tests.models import sample_ids
from tests.smoothquant.test_decoder import float_logits

LAYOUTS = ("llama-biased", "mixtral", "falcon-7b", "bloom", "opt", "opt-350m", "qwen3", "gemma3")


@pytest.fixture(scope="module", params=LAYOUTS)
def calibrated(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, dict, dict]:
    """A model, its input_absmax and output_absmax."""
    root = tmp_path_factory.mktemp(request.param)
    model = open_model(zoo.save(request.param, root / "model"))
    scales = collect(model, Text(tuple(sample_ids()), "sample"), root / "scales.safetensors", dtype="float32")
    return model, dict(scales.input_absmax), dict(scales.output_absmax)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("groups", RUN_TIME_GROUPS)
def test_the_logits_stay(groups: str, dtype: str, calibrated: tuple[Model, dict, dict]) -> None:
    model, inputs, _ = calibrated
    ids, settings = sample_ids(sequences=2), SmoothingSettings(0.5, groups, smoother_dtype=dtype)
    hidden, positions = decoder.embed(model, ids, torch.float32), patterns(model, ids.shape[1], torch.float32)
    for layer in smoothed_layers(model, inputs, settings):
        hidden = decoder.forward(model, QuantizingLayer(layer, (), lambda rows: None), hidden, positions)
    assert relative_error(decoder.logits(model, hidden), float_logits(model, ids)) <= TOLERANCE


@pytest.mark.parametrize("groups", RUN_TIME_GROUPS)
def test_every_input_is_smoothed(groups: str, calibrated: tuple[Model, dict, dict]) -> None:
    model, inputs, _ = calibrated
    layer = smooth_layer(model, 0, inputs, SmoothingSettings(0.5, groups, smoother_dtype="bfloat16"))
    assert set(layer.column) >= set(model.quantized_roles)
    assert not layer.row
    folded = {role for group in model.groups if group.through == "norm" for role in group.linears}
    assert set(layer.smoother) == set(layer.column) - (folded if groups == "run-time" else set())
    for role, scale in layer.smoother.items():
        held = scale if groups == "run-time" else 1 / scale  # what the engine holds
        torch.testing.assert_close(held.bfloat16().float(), held, rtol=1e-7, atol=0)
        assert layer.column[role] is scale
    if groups == "unfolded":
        assert all(norm is layer.source.norms[role] for role, norm in layer.norms.items())


@torch.no_grad()
def test_the_layer_divides_its_own_input(calibrated: tuple[Model, dict, dict]) -> None:
    """A quantized layer is as near to the float one as 8 bits allow, given inputs that nobody smoothed."""
    model, inputs, _ = calibrated
    layer = smooth_layer(model, 0, inputs, SmoothingSettings(0.5, "unfolded", smoother_dtype="float16"))
    running = quantize_layer(layer).runnable()
    x = torch.randn(8, model.family.shape("down.0" if model.geometry.experts else "down", model.geometry)[1])
    role = "down.0" if model.geometry.experts else "down"
    expected = layer.source.linear(role, x)
    assert relative_error(running.linear(role, x), expected) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("groups", ["default", "run-time"])
@pytest.mark.parametrize("kv", ["float", "int8"])
def test_output_ranges_are_the_measured_ones(groups: str, kv: str, calibrated: tuple[Model, dict, dict]) -> None:
    """output_absmax of a smoothed layer is what its linears give: divided by the row factor, where one is folded in."""
    model, inputs, outputs = calibrated
    ids = sample_ids()
    hidden, positions = decoder.embed(model, ids, torch.float32), patterns(model, ids.shape[1], torch.float32)
    settings = SmoothingSettings(0.5, groups, cache="shared" if kv == "int8" else "none")
    for layer in smoothed_layers(model, inputs, settings, output_absmax=outputs):
        seen: dict[str, Tensor] = {}

        def listen(role: str, _: Tensor, y: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen[role] = y.abs().flatten(0, -2).amax(dim=0)

        weights = {role: layer.weight(role) for role in model.roles}
        for role, scale in layer.smoother.items():
            weights[role] /= scale
        biases = {role: bias for role in model.roles if (bias := layer.bias(role)) is not None}
        hidden = decoder.forward(
            model, FloatLayer(layer.index, weights, biases, layer.norms, listen), hidden, positions
        )
        assert layer.output_absmax.keys() == set(model.quantized_roles)
        for role, expected in layer.output_absmax.items():
            if role in seen:  # an expert that no token reached was not run
                torch.testing.assert_close(seen[role], expected, rtol=2e-4, atol=2e-6 * expected.max().item() + 1e-12)
        if kv == "int8" and "v" in layer.row:
            keys = kv_cache.key_reach(model.geometry, layer.index, layer.norms, layer.output_absmax)
            assert keys is not None
            torch.testing.assert_close(layer.output_absmax["v"].amax(), keys.amax())


def test_a_dead_channel_is_not_divided(calibrated: tuple[Model, dict, dict]) -> None:
    model, inputs, _ = calibrated
    inputs = {name: values.clone() for name, values in inputs.items()}
    for values in inputs.values():
        values[3] = 0
    layer = smooth_layer(model, 0, inputs, SmoothingSettings(0.5, "unfolded"))
    assert all(scale[3] == 1 for scale in layer.smoother.values())


def test_settings() -> None:
    with pytest.raises(UserError, match="smoother dtype 'int4'; expected one of float16"):
        SmoothingSettings(smoother_dtype="int4")
    for groups in GROUPS + RUN_TIME_GROUPS:
        settings = SmoothingSettings(0.7, groups, "float16", "own")
        assert SmoothingSettings(**settings.as_dict()) == settings
