"""What an export folder records is enough to quantize again, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from builders.validate import read_scheme
from exporters.export import Source, export
from smoothquant.errors import UserError
from smoothquant.layers import float_layer
from smoothquant.settings import SmoothingSettings
from smoothquant.stream import quantize_layer, smoothed_layers
from tests.models import hooked_absmax, open_llama, sample_ids
from tests.outputs import made_from, write_manifest
from tests.writers import w8a8_writer

BIASED = {"attention_bias": True, "mlp_bias": True}


@pytest.mark.parametrize("groups", ["default", "paper", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_come_out_as_they_were_exported(
    dtype: torch.dtype, groups: str, make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_llama(dtype=dtype, **BIASED)
    model, absmax, settings = open_llama(folder), hooked_absmax(folder, sample_ids()), SmoothingSettings(0.7, groups)
    export(Source(model, settings, absmax, {"model": "m"}), [w8a8_writer(tmp_path / "out", "per-tensor")])
    scheme = read_scheme(tmp_path / "out")
    assert scheme.scheme.activations.form == "per-tensor"
    with safe_open(tmp_path / "out/model.safetensors", "pt") as exported:
        for layer in smoothed_layers(model, absmax, settings):
            rebuilt = scheme.layer(model, layer.index, float_layer(model, layer.index))
            quantized = quantize_layer(rebuilt)
            for role, linear in quantized.linears.items():
                assert linear.weight.equal(exported.get_tensor(f"{linear.name}.weight")), role
                assert linear.weight_scale[:, None].equal(exported.get_tensor(f"{linear.name}.weight_scale")), role
                assert linear.input_scale is not None
                assert linear.input_scale.reshape(1).equal(exported.get_tensor(f"{linear.name}.input_scale")), role
                expected = layer.bias(role)
                assert linear.bias is not None
                assert expected is not None
                assert linear.bias.equal(expected), role
            for role, norm in quantized.norms.items():
                expected = exported.get_tensor(f"{model.norm(layer.index, role)}.weight")
                if dtype == torch.float32:  # gain / (gain / folded): two roundings of 2^-24
                    torch.testing.assert_close(norm.weight, expected, rtol=2**-22, atol=0)
                else:
                    assert norm.weight.equal(expected)


def test_same_scheme_same_key(folders: Path) -> None:
    keys = {name: read_scheme(folders / name).key for name in ("w8a8", "static", "naive", "hf")}
    assert len(set(keys.values())) == 4
    assert read_scheme(folders / "w8a8").key == keys["w8a8"]


def test_a_folder_that_records_no_smoothing(folders: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path, "export hf", made_from("float"))
    with pytest.raises(UserError, match=r"smoothing\.safetensors: cannot be read"):
        read_scheme(tmp_path)


def test_a_folder_from_another_version(tmp_path: Path) -> None:
    inputs = made_from("per-token")
    inputs["schemes"][0]["activations"]["granularity"] = "per-moon"
    write_manifest(tmp_path, "x", inputs)
    with pytest.raises(UserError, match="activations 'per-moon'; expected one of per-token, per-tensor, float"):
        read_scheme(tmp_path)
