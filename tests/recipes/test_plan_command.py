"""export --plan and validate --plan: the real command line, in processes of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from act_scales.store import load_act_scales
from smoothquant.artifacts.plan import ACT_SCALES
from smoothquant.model import Model
from smoothquant.outputs import load_manifest
from smoothquant.plan import layer_file, read_plan
from smoothquant.scheme import CACHES, PER_TENSOR, PER_TOKEN, SHARED_CACHES, scheme_of
from smoothquant.settings import SmoothingSettings
from tests.forked import assert_one_line, in_a_new_process, smoothquant
from tests.models import open_llama, save_llama
from tests.plans import change_layer, tensors_of, write_plan

FEW = ("--samples", "64", "--length", "64")
DOWN = "model.layers.1.mlp.down_proj"
SCHEMES = {
    "plan": PER_TOKEN,
    "static": replace(PER_TENSOR, float_linears=(DOWN,)),
    "everything": scheme_of("per-token", kv_cache="int8", head="int8"),
    "shared": replace(PER_TOKEN, kv_cache=SHARED_CACHES["int8"]),
}
SHARED = SmoothingSettings(0.6, cache="shared")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A folder with a model, its act scales and its plans. Nothing of it is changed."""
    folder = tmp_path_factory.mktemp("place")
    model = open_llama(save_llama(folder / "model", attention_bias=True))
    scales = folder / "scales.safetensors"
    found = smoothquant("calibrate", folder / "model", "--text", text_file, *FEW, "--out", scales, "--quiet")
    assert found.returncode == 0, found.stderr
    for name, scheme in SCHEMES.items():
        settings = SHARED if name == "shared" else SmoothingSettings(0.6)
        write_plan(model, load_act_scales(scales).for_model(model), folder / name, scheme, settings)
    return folder


@pytest.fixture(scope="module")
def model(place: Path) -> Model:
    return open_llama(place / "model")


def exported(target: str, place: Path, plan: str, out: Path, *options: object) -> Path:
    found = smoothquant("export", target, place / "model", "--plan", place / plan, "--out", out, *options)
    assert found.returncode == 0, found.stderr
    assert load_manifest(out).origin.plan == read_plan(place / plan).fingerprint
    assert "alpha" not in found.stdout
    return out


def test_export_and_validate(place: Path, tmp_path: Path, text_file: Path) -> None:
    """MODEL and PLAN are enough: neither scales nor text."""
    w8a8 = exported("w8a8", place, "plan", tmp_path / "w8a8")
    onnx = exported("onnx", place, "plan", tmp_path / "onnx")
    trtllm = exported("trtllm", place, "plan", tmp_path / "trtllm")
    exported("hf", place, "plan", tmp_path / "hf")
    stored = load_file(w8a8 / "model.safetensors")
    for index in (0, 1):
        for name, tensor in tensors_of(place / "plan", index).items():
            if name.endswith((".weight", ".bias")):
                assert stored[name].equal(tensor), name
    found = smoothquant("build", "onnxruntime", onnx, "--out", tmp_path / "engine")
    assert found.returncode == 0, found.stderr
    common = ("--reference", place / "model", "--text", text_file, *FEW, "--no-thresholds", "--json")
    engines = (tmp_path / "engine", w8a8, trtllm)
    found = in_a_new_process("validate", *engines, *common, "--plan", place / "plan", "--exact")
    assert found.returncode == 0, found.stderr
    made = json.loads(found.stdout)["validations"]
    assert [one["subject"]["inputs"]["plan"] for one in made] == 3 * [read_plan(place / "plan").fingerprint]
    engine = made[0]["exactness"]
    assert engine["engine"] < 3 * engine["pytorch"]
    fingerprint = read_plan(place / "plan").fingerprint
    found = smoothquant("validate", w8a8, *common)
    assert_one_line(found, 2, f"{w8a8}: made by the plan with fingerprint {fingerprint}", "give it with --plan")
    found = smoothquant("validate", w8a8, *common, "--plan", place / "static")
    assert_one_line(found, 2, f"made by the plan with fingerprint {fingerprint}, not by {place / 'static'}")
    found = smoothquant("validate", w8a8, *common, "--plan", tmp_path / "nowhere")
    assert_one_line(found, 2, f"{tmp_path / 'nowhere'}: not an output of this tool")
    found = smoothquant("validate", w8a8, *common, "--plan", w8a8)
    assert_one_line(found, 2, f"{w8a8} was made by smoothquant export w8a8; expected a plan")


def test_the_target_is_the_plans(place: Path, tmp_path: Path) -> None:
    """Activations, cache, head and linears in float, unless the options say them, too."""
    static = load_manifest(exported("w8a8", place, "static", tmp_path / "w8a8")).origin.scheme
    assert static == SCHEMES["static"]
    assert load_manifest(exported("modelopt", place, "static", tmp_path / "modelopt")).origin.scheme == static
    assert load_manifest(exported("onnx", place, "static", tmp_path / "onnx")).origin.scheme == static
    everything = load_manifest(exported("onnx", place, "everything", tmp_path / "all")).origin.scheme
    assert (everything.kv_cache, everything.head.dtype) == (CACHES["int8"], "int8")
    plain = load_manifest(exported("onnx", place, "everything", tmp_path / "head", "--lm-head", "float")).origin.scheme
    assert not plain.head.quantized
    shared = load_manifest(exported("trtllm", place, "shared", tmp_path / "trtllm")).origin
    assert (shared.scheme.kv_cache, shared.smoothing) == (SHARED_CACHES["int8"], SHARED)
    assert load_manifest(exported("trtllm", place, "plan", tmp_path / "act", "--act", "per-token")).origin.plan


REFUSED = {
    "scales": ("w8a8", "plan", ("SCALES",), "--plan with ACT_SCALES", "expected one of them"),
    "alpha": ("w8a8", "plan", ("--alpha", "0.5"), "--plan with --alpha 0.5", "leave --alpha away"),
    "groups": ("onnx", "plan", ("--groups", "default"), "--plan with --groups default", "leave --groups away"),
    "keep float": (
        "w8a8",
        "static",
        ("--keep-float", "auto"),
        "--keep-float auto with --plan",
        "expected none, or a share",
    ),
    "act": (
        "w8a8",
        "plan",
        ("--act", "per-tensor"),
        "per-tensor activations, by a plan for another target",
        "expected per-token activations, as the plan has it",
    ),
    "act of modelopt": ("modelopt", "plan", (), "per-tensor activations, by a plan for another target", ""),
    "both": ("onnx", "plan", ("--act", "both"), "per-tensor activations, by a plan for another target", ""),
    "float": ("onnx", "plan", ("--float",), "--float with --plan", "nothing is quantized by --float"),
    "kv": ("onnx", "plan", ("--kv", "int8"), "a KV cache in int8, per-tensor, by a plan for another target", ""),
    "float kv": ("onnx", "everything", ("--kv", "float"), "a KV cache in float", "expected a KV cache in int8"),
    "kv of w8a8": ("w8a8", "everything", (), "a KV cache in float", "expected a KV cache in int8, per-tensor"),
    "shared kv": ("onnx", "shared", (), "KV cache 'shared'", "expected one for 'own'"),
    "kv of trtllm": ("trtllm", "everything", (), "KV cache 'none'", "expected one for 'shared'"),
    "weights": (
        "trtllm",
        "plan",
        ("--weights", "per-tensor"),
        "per-tensor weights, by a plan for another target",
        "expected per-channel weights",
    ),
    "no plugins": ("trtllm", "static", ("--no-plugins",), "groups 'default' with W8A8_SQ_PER_CHANNEL", ""),
    "run-time smoother": ("trtllm", "plan", ("--runtime-smoother",), "groups 'default' with --runtime-smoother", ""),
    "another folder": ("w8a8", "model", (), "model: not an output of this tool", ""),
    "no folder": ("w8a8", "nowhere", (), "nowhere: not an output of this tool", ""),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_anything_is_written(what: str, place: Path, tmp_path: Path) -> None:
    target, plan, more, *said = REFUSED[what]
    words = [place / "scales.safetensors" if word == "SCALES" else word for word in more]
    found = smoothquant("export", target, place / "model", *words, "--plan", place / plan, "--out", tmp_path / "out")
    assert_one_line(found, 2, *said)
    assert not list(tmp_path.iterdir())


def _another_model(folder: Path) -> None:
    shutil.rmtree(folder / "model")
    save_llama(folder / "model", seed=3, attention_bias=True)


def _another_architecture(folder: Path) -> None:
    shutil.rmtree(folder / "model")
    save_llama(folder / "model", attention_bias=True, intermediate_size=96)


def _damaged(folder: Path) -> None:
    path = folder / "plan" / layer_file(0)
    content = bytearray(path.read_bytes())
    content[-7] ^= 4
    path.write_bytes(content)


def _without_scales(folder: Path) -> None:
    (folder / "plan" / ACT_SCALES).unlink()


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "another model": (_another_model, "plan: a plan for model "),
    "another architecture": (_another_architecture, "plan: a plan for model "),
    "damaged": (_damaged, "layers/00000.safetensors: its content is not what was written"),
    "without act scales": (_without_scales, ACT_SCALES),
    "without a range": (
        lambda folder: change_layer(folder / "plan", 1, {DOWN + ".input_absmax": None}),
        f"layers/00001.safetensors: tensor {DOWN}.input_absmax is missing",
    ),
    "with another layer's": (
        lambda folder: change_layer(folder / "plan", 0, {DOWN + ".smoothing_scale": torch.ones(128)}),
        f"layers/00000.safetensors: tensor {DOWN}.smoothing_scale; expected tensors of layer 0",
    ),
    "with a scale of 0": (
        lambda folder: change_layer(folder / "plan", 1, {DOWN + ".weight_scale": torch.zeros(64)}),
        f"tensor {DOWN}.weight_scale holds others than finite numbers above 0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_plan_that_is_not_this_models(fault: str, place: Path, tmp_path: Path, text_file: Path) -> None:
    """Neither an export nor a validation takes it."""
    folder = tmp_path / "copy"
    for name in ("model", "plan"):
        shutil.copytree(place / name, folder / name)
    w8a8 = exported("w8a8", folder, "plan", tmp_path / "w8a8")
    break_it, said = FAULTS[fault]
    break_it(folder)
    for target in ("w8a8", "onnx", "hf"):
        found = smoothquant("export", target, folder / "model", "--plan", folder / "plan", "--out", tmp_path / "out")
        assert_one_line(found, 2, said)
    common = ("--reference", folder / "model", "--text", text_file, *FEW, "--no-thresholds")
    validated = smoothquant("validate", w8a8, *common, "--plan", folder / "plan")
    assert_one_line(validated, 2, said)
    assert {path.name for path in tmp_path.iterdir()} == {"copy", "w8a8"}


def test_the_plan_is_apart_from_the_output(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "plan"
    shutil.copytree(place / "plan", folder)
    found = smoothquant("export", "w8a8", place / "model", "--plan", folder, "--out", folder, "--overwrite")
    assert_one_line(found, 2, "is the plan", "choose another --out")
    found = smoothquant("export", "w8a8", place / "model", "--plan", folder, "--out", folder / "out")
    assert_one_line(found, 2, "lies inside the plan")
    assert read_plan(folder).fingerprint == read_plan(place / "plan").fingerprint
