"""The zoo itself: what it saves loads, its outliers change nothing, its old forms are the same models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.models import OUTLIER, sample_ids
from tests.zoo import MULTIPLIERS, WINDOW, YARN, ZOO, build, save
from tests.zoo.forms import OLD_FORMS

IDS = sample_ids(2, 24)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits


def loaded_logits(folder: Path) -> torch.Tensor:
    """Loading must leave nothing to chance: no tensor may be missing."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    return logits(model)


@pytest.mark.parametrize("name", ZOO)
def test_saved_and_loaded_is_the_same(name: str, tmp_path: Path) -> None:
    assert torch.equal(loaded_logits(save(name, tmp_path)), logits(build(name)))


@pytest.mark.parametrize("name", ZOO)
def test_outliers_do_not_change_the_function(name: str) -> None:
    plain, model = build(name, outlier=1), build(name)
    expected = logits(plain)
    assert (logits(model) - expected).abs().max() <= 1e-4 * expected.abs().max()
    offset = ZOO[name].gain_offset
    for norm in ZOO[name].consumers:
        gain = model.get_submodule(f"{ZOO[name].layers}.0.{norm}").weight.detach() + offset
        assert gain[3::17].min() > OUTLIER / 2.1
        gain[3::17] /= OUTLIER
        assert gain.max() <= 1.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    save("gemma3", tmp_path, dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == dtype
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


# What makes a layout its own: another value, with the same tensors, must be another function.
MATTERS = [
    ("llama-scaled", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": WINDOW + 1}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("mixtral-sliding", {"sliding_window": None}),
    ("falcon-rw", {"alibi": False}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("opt-350m", {"activation_function": "gelu"}),
    ("qwen2-sliding", {"max_window_layers": 0}),
    ("qwen2-sliding", {"use_sliding_window": False}),
    ("qwen3", {"rms_norm_eps": 1.0}),
    ("qwen3-yarn", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("qwen3-yarn", {"rope_parameters": YARN | {"attention_factor": 1.0}}),
    ("qwen3-yarn", {"rope_parameters": YARN | {"beta_fast": 32, "beta_slow": 2}}),
    ("qwen3-moe", {"norm_topk_prob": False}),
    ("qwen3-moe", {"num_experts_per_tok": 7}),
    ("qwen3-moe-unnormed", {"norm_topk_prob": True}),
    ("phi3-sliding", {"sliding_window": None}),
    ("phi3-longrope", {"original_max_position_embeddings": 16}),
    ("phi3-longrope-long", {"original_max_position_embeddings": 256}),
    ("phi3-partial", {"rope_parameters": None}),
    ("gemma2", {"attn_logit_softcapping": None}),
    ("gemma2", {"final_logit_softcapping": None}),
    ("gemma2", {"query_pre_attn_scalar": 24}),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("gemma3", {"query_pre_attn_scalar": 24}),
    ("gemma3", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
    ("gemma3", {"sliding_window": WINDOW + 1}),
    *(("granite", {key: value * 1.1}) for key, value in MULTIPLIERS.items()),
    ("olmo2", {"rms_norm_eps": 1.0}),
]


@pytest.mark.parametrize(("name", "change"), MATTERS)
def test_what_a_layout_says_matters(name: str, change: dict) -> None:
    expected = logits(build(name))
    assert (logits(build(name, **change)) - expected).abs().max() > 1e-2 * expected.abs().max()


# -- old forms -------------------------------------------------------------------------------------------------------


def as_converted(folder: Path) -> None:
    """What transformers 4.33's models/falcon/convert_custom_code_checkpoint.py did to a RefinedWeb folder."""
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    names = {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_head_kv": "num_kv_heads"}
    config = {names.get(key, key): value for key, value in config.items()} | {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "new_decoder_architecture": "n_head_kv" in config,
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("form", "name"), [(form, name) for form, old_form in OLD_FORMS.items() for name in old_form.layouts]
)
def test_old_forms_are_the_same_model(form: str, name: str, tmp_path: Path) -> None:
    old_form = OLD_FORMS[form]
    old_form(save(name, tmp_path, **old_form.changes))
    if old_form.refused:
        with pytest.raises((ValueError, OSError), match=old_form.refused):
            AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
        as_converted(tmp_path)
    expected = logits(build(name, **old_form.changes))
    difference = (loaded_logits(tmp_path) - expected).abs().max()
    assert difference <= 1e-6 * expected.abs().max()  # a mapped file is aligned otherwise, and so are kernels' sums


@pytest.mark.parametrize(("name", "form"), [("mixtral", "mixtral-fused"), ("qwen3-moe", "qwen3-moe-fused")])
def test_fused_experts_are_what_transformers_writes(name: str, form: str, tmp_path: Path) -> None:
    save(name, tmp_path / "ours")
    OLD_FORMS[form](tmp_path / "ours")
    build(name).save_pretrained(tmp_path / "theirs", save_original_format=False)
    ours, theirs = (load_file(tmp_path / who / "model.safetensors") for who in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
