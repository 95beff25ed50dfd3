"""Our checkpoints through others' eyes: safetensors, transformers and compressed-tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from exporters.export import Source, export
from exporters.huggingface import ModelOptWriter, SmoothedWriter, W8A8Writer
from exporters.huggingface.dialects import quantization_config
from smoothquant import decoder, workroom
from smoothquant.artifacts.smoothing_file import SMOOTHING
from smoothquant.attention import patterns
from smoothquant.contract import TOLERANCE, relative_error
from smoothquant.model import Model
from smoothquant.outputs import load_manifest
from smoothquant.scheme import ACTIVATIONS, scheme_of
from smoothquant.settings import SmoothingSettings
from smoothquant.steps import DEFAULT, as_records
from smoothquant.stream import quantize_layer, smoothed_layers
from tests.models import hooked_absmax, open_llama, sample_ids
from tests.outputs import made_from
from tests.smoothquant.test_decoder import VARIANTS, float_logits
from tests.writers import w8a8_writer

SETTINGS = SmoothingSettings(0.5)


def source_of(folder: Path) -> Source:
    return Source(open_llama(folder), SETTINGS, hooked_absmax(folder, sample_ids()), {"model": "m", "act_scales": "a"})


def transformers_logits(folder: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(ids).logits


@torch.no_grad()
def w8a8_logits(model: Model, absmax: Mapping[str, torch.Tensor], ids: torch.Tensor, act: str) -> torch.Tensor:
    """Our own arithmetic, float64."""
    hidden = decoder.embed(model, ids, torch.float64)
    positions = patterns(model, ids.shape[1], torch.float64)
    for layer in smoothed_layers(model, absmax, SETTINGS):
        hidden = decoder.forward(model, quantize_layer(layer).runnable(ACTIVATIONS[act]), hidden, positions)
    return decoder.logits(model, hidden)


@pytest.mark.parametrize("variant", VARIANTS)
def test_smoothed_model_is_the_same_function(variant: str, make_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder, ids = make_llama(**VARIANTS[variant]), sample_ids(seed=3)
    export(source_of(folder), [SmoothedWriter(tmp_path / "out")])
    assert relative_error(transformers_logits(tmp_path / "out", ids), transformers_logits(folder, ids)) <= TOLERANCE
    prompt = "def f(x):"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(prompt) == AutoTokenizer.from_pretrained(folder)(prompt)


def test_smoothed_dtype(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_llama(dtype=torch.bfloat16)
    export(
        source_of(folder), [SmoothedWriter(tmp_path / "as-stored"), SmoothedWriter(tmp_path / "wide", torch.float32)]
    )
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "as-stored").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "wide").dtype == torch.float32
    expected = float_logits(open_llama(folder), sample_ids())
    assert relative_error(transformers_logits(tmp_path / "wide", sample_ids()), expected) <= TOLERANCE


@pytest.mark.parametrize("act", ["per-token", "per-tensor"])
@pytest.mark.parametrize("variant", ["grouped heads", "biases", "tied embeddings"])
def test_w8a8_in_transformers(variant: str, act: str, make_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder, ids = make_llama(**VARIANTS[variant]), sample_ids(sequences=8, seed=5)
    source = source_of(folder)
    export(source, [w8a8_writer(tmp_path / "out", act)])
    found = transformers_logits(tmp_path / "out", ids)
    expected = w8a8_logits(source.model, source.input_absmax, ids, act)
    plain = float_logits(source.model, ids)
    # compressed-tensors rounds activations in steps of 2 * amax / 255 where we take amax / 127: two W8A8 models of the
    # same weights, as near to each other as each is to the float model, and no nearer
    assert relative_error(found, expected) < 1.5 * relative_error(expected, plain)
    assert relative_error(found, plain) < 1.5 * relative_error(expected, plain)


def test_w8a8_weights_are_ours_to_the_bit(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = source_of(make_llama(attention_bias=True, dtype=torch.bfloat16))
    export(source, [w8a8_writer(tmp_path / "out", "per-tensor")])
    model = source.model
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        names = set(file.keys())
        for layer in map(quantize_layer, smoothed_layers(model, source.input_absmax, SETTINGS)):
            for role, norm in layer.norms.items():
                assert torch.equal(file.get_tensor(f"{model.norm(layer.index, role)}.weight"), norm.weight)
            for linear in layer.linears.values():
                assert torch.equal(file.get_tensor(f"{linear.name}.weight"), linear.weight)
                assert torch.equal(file.get_tensor(f"{linear.name}.weight_scale")[:, 0], linear.weight_scale)
                assert file.get_tensor(f"{linear.name}.input_scale").item() == linear.input_scale
                names -= {f"{linear.name}.{part}" for part in ("weight", "weight_scale", "input_scale", "bias")}
        for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            assert torch.equal(file.get_tensor(name), model.read(name))
    assert not {name for name in names if "layers" in name and "norm" not in name}


@pytest.mark.parametrize("settings", [SETTINGS, SmoothingSettings(groups="none")], ids=["smoothed", "as it is"])
def test_linears_that_servers_fuse_share_their_static_scale(
    settings: SmoothingSettings, make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """vLLM has room for one input_scale of q, k and v: of three that differ, the last would count."""
    export(replace(source_of(make_llama()), settings=settings), [w8a8_writer(tmp_path / "out", "per-tensor")])
    scales = load_file(tmp_path / "out/model.safetensors")
    for fused in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        assert len({scales[f"model.layers.0.{name}.input_scale"].item() for name in fused}) == 1


@pytest.mark.parametrize("act", ["per-token", "per-tensor"])
def test_quantization_config_is_complete(act: str) -> None:
    """What we write is what compressed-tensors itself would, default for default."""
    ours = quantization_config(scheme_of(act), ["lm_head"])
    theirs = QuantizationConfig.model_validate(ours).model_dump(mode="json")
    group, their_group = ours.pop("config_groups")["group_0"], theirs["config_groups"]["group_0"]
    assert ours == {key: theirs[key] for key in ours}
    assert group == {key: their_group[key] for key in group}
    assert their_group["input_activations"]["dynamic"] == (act == "per-token")


def test_shards(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder, ids = make_llama(), sample_ids()
    source = source_of(folder)
    export(source, [SmoothedWriter(tmp_path / "one"), SmoothedWriter(tmp_path / "many", max_shard=100_000)])
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert torch.equal(transformers_logits(tmp_path / "many", ids), transformers_logits(tmp_path / "one", ids))


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "too soon to be kept"])
@pytest.mark.parametrize("writer", [SmoothedWriter, W8A8Writer, ModelOptWriter])
def test_interrupted_export_goes_on_and_is_the_same(
    writer: type, kept: bool, make_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workroom, "KEEP_EVERY", -1.0 if kept else 3600.0)
    source = source_of(make_llama(num_hidden_layers=3))
    export(source, [writer(tmp_path / "whole")])
    written: list[int] = []

    class Interrupted(writer):  # type: ignore[misc, valid-type]
        fail_at: int | None = 1

        def write(self, layer: object, quantized: object) -> None:
            if layer.index == self.fail_at:
                raise KeyboardInterrupt
            written.append(layer.index)
            super().write(layer, quantized)

    with pytest.raises(KeyboardInterrupt):
        export(source, [Interrupted(tmp_path / "resumed")])
    assert not (tmp_path / "resumed").exists()
    Interrupted.fail_at = None
    export(source, [Interrupted(tmp_path / "resumed")])
    assert written == ([0, 1, 2] if kept else [0, 0, 1, 2])
    manifest = load_manifest(tmp_path / "whole")
    assert load_manifest(tmp_path / "resumed") == manifest
    for name in manifest.files:
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_manifest_explains(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    source = source_of(make_llama())
    export(source, [W8A8Writer(tmp_path / "out")])
    manifest = load_manifest(tmp_path / "out")
    assert manifest.step == "export w8a8"
    sidecars = source.model.checkpoint.sidecars
    assert manifest.inputs == made_from(
        "per-token", model="m", sidecars=sidecars, act_scales="a", steps=as_records(DEFAULT)
    )
    assert manifest.origin.schemes == (scheme_of("per-token"),)
    assert manifest.origin.smoothing == source.settings
    assert manifest.contract.logits_relative_error <= TOLERANCE
    with safe_open(tmp_path / "out" / SMOOTHING, "pt") as file:
        name = "model.layers.1.mlp.down_proj"
        before = file.get_tensor(f"{name}.smoothing_scale") * file.get_tensor(f"{name}.input_absmax")
    torch.testing.assert_close(before, source.input_absmax[name], rtol=1e-6, atol=0)
