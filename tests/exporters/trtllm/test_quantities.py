"""The numbers of the format, against what they mean."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from exporters.trtllm import tensors as quantities
from exporters.trtllm.modes import MODES, Mode, choose
from smoothquant import kv_cache
from smoothquant.errors import UserError
from smoothquant.quantization import quantize_weight
from smoothquant.scheme import WEIGHTS
from smoothquant.stream import smooth_layer
from tests.exporters.trtllm.checkpoints import PER_TOKEN, STATIC, make, ranks, write
from tests.models import open_llama, save_llama

POSITIVE = st.floats(2**-20, 2**20, width=32)


@given(POSITIVE, POSITIVE, st.lists(POSITIVE, min_size=1, max_size=4))
def test_static_scales(reach_in: float, reach_out: float, rows: list[float]) -> None:
    """What the plugin multiplies by is X r / 127^2, whatever Y is."""
    weight_scale, input_scale = torch.tensor(rows) / 127, torch.tensor(reach_in) / 127
    act_scale = quantities.act_scale(torch.tensor([reach_out, reach_out / 2]))
    torch.testing.assert_close(act_scale, torch.tensor(reach_out) / 127)
    channel = quantities.static_channel_scale(weight_scale, input_scale, act_scale)
    torch.testing.assert_close(act_scale * channel, weight_scale * input_scale, rtol=1e-6, atol=0)
    expected = torch.tensor([reach_in * row / (127 * reach_out) for row in rows])
    torch.testing.assert_close(channel, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(quantities.scale_to_int(input_scale), torch.tensor([127 / reach_in]), rtol=1e-5, atol=0)


def test_per_token_norms_are_told_one() -> None:
    assert quantities.scale_to_int(None).equal(torch.ones(1))


def test_outputs_that_never_moved() -> None:
    """Y cancels: any number but 0 will do."""
    assert quantities.act_scale(torch.zeros(4)) > 0


@pytest.mark.parametrize("mode", [PER_TOKEN, STATIC], ids=lambda mode: mode.algo)
def test_tiny_rows(mode: Mode, tmp_path: Path) -> None:
    """Rows of 1e-6, far below what float16 can invert (NVIDIA's scales are 0 there), are as exact as any."""
    source = make("llama", tmp_path, dtype=torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    path = source.model.checkpoint.tensors[name].file
    tensors = load_file(path)
    tensors[name][::2] *= 1e-6 / tensors[name][::2].abs().amax(dim=1, keepdim=True)
    save_file(tensors, path, {"format": "pt"})
    source = replace(source, model=open_llama(path.parent))  # as it is now
    (found,) = ranks(write(source, tmp_path / "out", mode))
    prefix = "transformer.layers.0.mlp.gate"
    weight, scale = found[f"{prefix}.weight"], found[f"{prefix}.per_channel_scale"][0].double()
    if mode is STATIC:
        scale = scale * found[f"{prefix}.act_scale"].item() * found["transformer.layers.0.post_layernorm.scale_to_int"]
    expected = smooth_layer(source.model, 0, source.input_absmax, source.settings).weight("up").double()
    assert expected[::2].abs().max() < 1e-3 * expected[1::2].abs().max()
    assert (weight.abs().amax(dim=1) == 127).all()
    assert ((weight.double() * scale[:, None] - expected).abs() <= 0.50001 * scale[:, None]).all()


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000))
def test_one_scale_per_matrix(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    quantized, scale = quantize_weight(weight, WEIGHTS["per-tensor"])
    assert scale.shape == (rows,)
    assert (scale == scale[0]).all()
    assert quantized.abs().max() == 127
    assert ((quantized * scale[:, None] - weight).abs() <= scale[0] / 2 * 1.0001).all()


def test_modes() -> None:
    assert choose().algo == "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN"
    assert len({(mode.scheme, mode.plugin) for mode in MODES}) == len(MODES) == 5
    with pytest.raises(UserError, match="per-channel weights with per-token activations; expected per-channel weights"):
        choose(plugin=False)


def test_keys_after_their_rotation(tmp_path: Path) -> None:
    """No rotated key exceeds the bound, and some pairs reach it."""
    geometry = open_llama(save_llama(tmp_path)).geometry
    reach = torch.rand(geometry.kv_size) + 0.5
    bounds = kv_cache.key_reach(geometry, 0, {}, {"k": reach})
    assert bounds is not None
    bound = bounds.amax()
    first, second = reach.view(geometry.kv_heads, geometry.head_dim).chunk(2, dim=-1)
    angle = torch.linspace(0, 6.3, 1000)[:, None, None]
    seen = torch.maximum((first * angle.cos() - second * angle.sin()).abs(), (second * angle.cos()).abs()).amax()
    assert 0.999 * bound <= seen <= bound * 1.00001


def test_one_scale_for_keys_and_values(tmp_path: Path) -> None:
    """The larger one where they share it; more than 0 even where neither ever moved."""
    geometry = open_llama(save_llama(tmp_path)).geometry
    for k, v in ((1.0, 2.0), (2.0, 1.0), (0.0, 0.0)):
        reach = {"k": torch.full((geometry.kv_size,), k), "v": torch.full((geometry.kv_size,), v)}
        own = kv_cache.cache_scales(geometry, 0, {}, reach, shared=False)
        shared = kv_cache.cache_scales(geometry, 0, {}, reach, shared=True)
        assert own is not None
        assert shared is not None
        assert shared[0] == shared[1] == max(own) > 0


def test_values_reach_as_far_as_keys() -> None:
    scale, values = torch.rand(32) + 0.1, torch.rand(32) * 5
    matched = kv_cache.match(scale, values, torch.tensor(7.0))
    torch.testing.assert_close((values / matched).amax(), torch.tensor(7.0))
    torch.testing.assert_close(matched / scale, (matched / scale)[:1].expand(32))  # one constant
    assert kv_cache.match(scale, torch.zeros(32), torch.tensor(7.0)).equal(scale)
