"""INT8 folders in the other dialect: the same numbers, and the same function where a pre_quant_scale was folded."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from exporters.huggingface import convert as module
from exporters.huggingface.convert import convert
from exporters.huggingface.dialects import DIALECTS
from recipes.families import open_int8_model
from smoothquant import workroom
from smoothquant.contract import TOLERANCE, relative_error
from smoothquant.errors import UserError
from smoothquant.outputs import load_manifest
from tests.families.case import Case
from tests.forked import smoothquant
from tests.int8_folders import edit_json, linears, save_compressed_tensors, save_modelopt
from tests.models import sample_ids

MakeLlama = Callable[..., Path]
LAYOUTS = ("llama-tied", "phi3", "bloom", "falcon-40b", "mixtral", "gemma3", "opt", "qwen3-moe-unnormed")
HEADS, KV_HEADS, HEAD_DIM, INNER = 4, 2, 16, 128  # of `save_llama`
WHOLE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_is_the_same(layout: str, tmp_path: Path) -> None:
    first = Case(layout, tmp_path).export("w8a8 static")
    there, back = tmp_path / "there", tmp_path / "back"
    convert(open_int8_model(first), DIALECTS["modelopt"], there)
    convert(open_int8_model(there), DIALECTS["compressed-tensors"], back)
    assert (back / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    assert json.loads((back / "config.json").read_text()) == json.loads((first / "config.json").read_text())
    assert (back / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()


def test_it_is_what_the_export_writes(make_llama: MakeLlama, tmp_path: Path) -> None:
    """Of a float16 model, whose floats both forms keep."""
    case = Case("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(case.folder, dtype=torch.float16)
    model.save_pretrained(case.folder)
    convert(open_int8_model(case.export("w8a8 static")), DIALECTS["modelopt"], tmp_path / "converted")
    exported = case.export("modelopt")
    for name in ("model.safetensors", "hf_quant_config.json"):
        assert (tmp_path / "converted" / name).read_bytes() == (exported / name).read_bytes()


def factors(*names: str, size: int = 64, seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    """One pre_quant_scale, 1/4 to 4, for linears of every layer."""
    shared = torch.exp2(4 * torch.rand(size, generator=torch.Generator().manual_seed(seed)) - 2).to(dtype)
    return {f"model.layers.{layer}.{name}": shared for layer in range(2) for name in names}


def every_factor() -> dict[str, Tensor]:
    """A pre_quant_scale for every linear of a Llama, that folds."""
    queries = {
        name: factor.view(KV_HEADS, 1, HEAD_DIM).expand(-1, HEADS // KV_HEADS, -1).reshape(-1).contiguous()
        for name, factor in factors("self_attn.o_proj", size=KV_HEADS * HEAD_DIM, seed=2).items()
    }
    norms = factors(*WHOLE[0]) | factors(*WHOLE[1], seed=1)
    return norms | queries | factors("mlp.down_proj", size=INNER, seed=3)


def dequantized_logits(folder: Path, model: Path, ids: Tensor) -> Tensor:
    """Logits of a float model with the weights that a folder's numbers stand for. A pre_quant_scale multiplies the
    input, so the columns that read it."""
    tensors = load_file(folder / "model.safetensors")
    state = {name: tensor.float() for name, tensor in tensors.items() if not name.endswith("_scale")}
    for name in linears(tensors):
        state[f"{name}.weight"] *= tensors[f"{name}.weight_scale"].reshape(-1, 1)
        state[f"{name}.weight"] *= tensors.get(f"{name}.pre_quant_scale", torch.ones(1)).float()
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    plain.load_state_dict(state)
    with torch.no_grad():
        return plain(ids).logits


@pytest.mark.parametrize("biased", [False, True])
def test_folded_scales_leave_the_function_alone(biased: bool, make_llama: MakeLlama, tmp_path: Path) -> None:
    model, ids = make_llama(attention_bias=biased, mlp_bias=biased), sample_ids()
    folder = save_modelopt(model, tmp_path / "int8", every_factor())
    convert(open_int8_model(folder), DIALECTS["compressed-tensors"], tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    for name in linears(before):  # what an integer kernel multiplies is what it was, at the same steps
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
        assert torch.equal(after[f"{name}.input_scale"][0], before[f"{name}.input_scale"])
    assert not [name for name in after if name.endswith("pre_quant_scale")]
    assert not torch.equal(
        after["model.layers.0.input_layernorm.weight"], before["model.layers.0.input_layernorm.weight"]
    )
    expected = dequantized_logits(folder, model, ids)
    assert relative_error(dequantized_logits(tmp_path / "out", model, ids), expected) <= TOLERANCE
    broken = after | {"model.layers.0.input_layernorm.weight": before["model.layers.0.input_layernorm.weight"]}
    save_file(broken, tmp_path / "out/model.safetensors")  # the control: one fold that was not made
    assert relative_error(dequantized_logits(tmp_path / "out", model, ids), expected) > 100 * TOLERANCE


def test_what_reads_a_folded_norm_in_float_is_compensated(make_llama: MakeLlama, tmp_path: Path) -> None:
    model, ids, up = make_llama(), sample_ids(), "model.layers.0.mlp.up_proj"
    smoothing = every_factor()
    del smoothing[up]
    folder = save_modelopt(model, tmp_path / "int8", smoothing)
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{up}.weight"] = load_file(model / "model.safetensors")[f"{up}.weight"]
    ones = torch.ones_like(tensors.pop(f"{up}.weight_scale"))
    del tensors[f"{up}.input_scale"]
    save_file(tensors, folder / "model.safetensors")
    convert(open_int8_model(folder), DIALECTS["compressed-tensors"], tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head", up]
    found = []
    for path in (folder, tmp_path / "out"):
        held = load_file(path / "model.safetensors") | {f"{up}.weight_scale": ones}
        save_file(held, path / "model.safetensors")
        found.append(dequantized_logits(path, model, ids))
    assert relative_error(*found) <= TOLERANCE


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in every_factor().items() if not key.endswith(name)}


REFUSED: dict[str, tuple[Mapping[str, Tensor], str]] = {
    "q and k differ": (
        every_factor() | factors("self_attn.k_proj", seed=9),
        "model.layers.0.self_attn.q_proj and model.layers.0.self_attn.k_proj read one input",
    ),
    "up has none": (without("up_proj"), "model.layers.0.mlp.gate_proj and model.layers.0.mlp.up_proj read one input"),
    "query heads differ": (
        factors("self_attn.o_proj", seed=5),
        "model.layers.0.self_attn.o_proj has a pre_quant_scale that differs between query heads",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fold_is_refused_by_name(case: str, make_llama: MakeLlama, tmp_path: Path) -> None:
    smoothing, said = REFUSED[case]
    folder = save_modelopt(make_llama(), tmp_path / "int8", smoothing)
    refused(folder, tmp_path / "out", "compressed-tensors", said)


def test_a_scale_behind_no_fold_is_refused(tmp_path: Path) -> None:
    """BLOOM's dense_4h_to_h reads a GELU, through which nothing can be folded."""
    first, name = Case("bloom", tmp_path).export("modelopt"), "transformer.h.1.mlp.dense_4h_to_h"
    tensors = load_file(first / "model.safetensors")
    columns = tensors[f"{name}.weight"].shape[1]
    save_file(tensors | {f"{name}.pre_quant_scale": torch.full((columns,), 2.0)}, first / "model.safetensors")
    refused(first, tmp_path / "out", "compressed-tensors", f"{name} has a pre_quant_scale, and nothing before it")


def test_a_norm_that_float16_cannot_hold_is_refused(make_llama: MakeLlama, tmp_path: Path) -> None:
    tiny = {name: factor * 1e-5 for name, factor in factors(*WHOLE[0], dtype=torch.float32).items()}
    folder = save_modelopt(make_llama(dtype=torch.float16), tmp_path / "int8", tiny)
    refused(folder, tmp_path / "out", "compressed-tensors", "model.layers.0.input_layernorm: torch.float16 cannot hold")


def test_dynamic_scales_have_no_place_in_modelopt(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = save_compressed_tensors(make_llama(), tmp_path / "int8")
    refused(folder, tmp_path / "out", "modelopt", "per-token activations, whose scales are found at run time")
    refused(folder, tmp_path / "out", "compressed-tensors", "in the form of compressed-tensors already")


def test_a_scale_below_0_has_no_place_in_modelopt(make_llama: MakeLlama, tmp_path: Path) -> None:
    """AutoRound writes such scales."""
    folder, name = save_compressed_tensors(make_llama(), tmp_path / "int8", static=True), "model.layers.1.mlp.up_proj"
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{name}.weight_scale"][3] *= -1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = smoothquant("convert", folder, "--to", "modelopt", "--out", tmp_path / "out", "--quiet")
    [line] = found.stderr.splitlines()
    assert (found.returncode, f"{name} has weight_scales below 0" in line) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_scale_per_matrix_becomes_one_per_channel(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = save_compressed_tensors(make_llama(), tmp_path / "int8", "tensor", static=True, scale_dtype=torch.bfloat16)
    convert(open_int8_model(folder), DIALECTS["modelopt"], tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    for name in linears(before):
        assert torch.equal(after[f"{name}.weight"], before[f"{name}.weight"])
        scale = after[f"{name}.weight_scale"]
        assert torch.equal(scale, before[f"{name}.weight_scale"].float().expand(len(scale)))


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "too soon to be kept"])
def test_an_interrupted_conversion_goes_on_and_is_the_same(
    kept: bool, make_llama: MakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workroom, "KEEP_EVERY", -1.0 if kept else 3600.0)
    folder = save_modelopt(make_llama(num_hidden_layers=3), tmp_path / "int8")
    convert(open_int8_model(folder), DIALECTS["compressed-tensors"], tmp_path / "whole")
    fold, seen = module.fold_layer, []

    def stopped(source: object, index: int) -> object:
        seen.append(index)
        if seen == [0, 1]:
            raise KeyboardInterrupt
        return fold(source, index)

    monkeypatch.setattr(module, "fold_layer", stopped)
    for _ in range(2):
        try:
            convert(open_int8_model(folder), DIALECTS["compressed-tensors"], tmp_path / "resumed")
        except KeyboardInterrupt:
            assert not (tmp_path / "resumed").exists()
    assert seen == ([0, 1, 1, 2] if kept else [0, 1, 0, 1, 2])
    for name in load_manifest(tmp_path / "whole").files:
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_command(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = save_modelopt(make_llama(), tmp_path / "int8", every_factor())
    command = ("convert", folder, "--to", "compressed-tensors", "--out", tmp_path / "out")
    found = smoothquant(*command, "--json", "--quiet")
    assert (found.returncode, found.stderr) == (0, "")
    assert json.loads(found.stdout)["manifest"]["step"] == "convert"
    again = smoothquant(*command)
    assert (again.returncode, "unchanged" in again.stdout) == (0, True)
    assert open_int8_model(tmp_path / "out").scheme.activations.static
    edit_json(folder / "generation_config.json", {"temperature": 0.5})
    stale = smoothquant(*command, "--quiet")
    assert (stale.returncode, "pass --overwrite" in stale.stderr) == (2, True)
    assert smoothquant(*command, "--overwrite", "--quiet").returncode == 0
    inside = smoothquant("convert", folder, "--to", "compressed-tensors", "--out", folder / "out", "--quiet")
    assert (inside.returncode, "lies inside the folder" in inside.stderr) == (2, True)


def refused(folder: Path, out: Path, to: str, said: str) -> None:
    """By the command, in one line, with nothing left behind."""
    found = smoothquant("convert", folder, "--to", to, "--out", out, "--quiet")
    assert found.returncode == UserError.exit_code, found.stderr
    [line] = found.stderr.splitlines()
    assert said in line
    assert not list(out.parent.glob("out*"))
