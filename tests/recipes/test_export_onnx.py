"""smoothquant export onnx: its options, together and against each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from act_scales.store import ActScales
from builders.engine.exports import open_export
from recipes.cli import main
from recipes.families import open_model
from recipes.targets import TARGETS
from smoothquant.artifacts.manifest import OnnxOptions
from smoothquant.outputs import load_manifest
from smoothquant.scheme import PER_TOKEN, scheme_of
from tests import zoo
from tests.exporters.onnx.graphs import Runner
from tests.families.case import Case
from tests.models import sample_ids


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("llama", tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def scales(case: Case) -> Path:
    assert case.act_scales
    return case.root / "act_scales.safetensors"


def export(capsys: pytest.CaptureFixture[str], case: Case, *arguments: object) -> tuple[int, str]:
    """Status, and what is said on stderr."""
    command = ["export", "onnx", str(case.folder), *map(str, arguments), "--quiet"]
    capsys.readouterr()  # transformers' progress, where the folder was made just now
    status = main(command)
    return status, capsys.readouterr().err.strip()


def test_all_at_once(case: Case, scales: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--act", "both", "--dtype", "fp16", "--kv", "int8", "--lm-head", "int8", "--keep-float", "down")
    assert export(capsys, case, scales, *options, "--opset", 17, "--out", tmp_path / "out")[0] == 0
    origin = load_manifest(tmp_path / "out").origin
    downs = tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(2))
    assert origin.onnx == OnnxOptions("fp16", 17)
    assert origin.schemes == (
        scheme_of("per-token", kv_cache="int8", head="int8"),
        scheme_of("per-tensor", kv_cache="int8", head="int8", float_linears=downs),
    )
    for act in ("per-token", "per-tensor"):
        found = open_export(tmp_path / "out", act)
        assert found.origin.schemes == (origin.schemes[act == "per-tensor"],)
        assert Runner(found.graph).run(sample_ids())[0].isfinite().all()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--float", "--act", "per-tensor"), "--float with --act per-tensor; expected one of them"),
        (("--float", "--kv", "int8"), "--float with --kv int8; expected one of them"),
        (("--float", "--alpha", "0.5"), "--float with --alpha 0.5; expected one of them"),
        (("--float", "--groups", "paper"), "smoothing groups 'paper' with --float; expected one of none (the default)"),
        (("--float", "--lm-head", "int8"), "a float graph with an int8 lm_head"),
        (("--float", "--keep-float", "down"), "--keep-float down without static activations"),
        (("--keep-float", "down"), "--keep-float down without static activations; expected --act per-tensor"),
        (
            ("--act", "both", "--keep-float", "fc1"),
            "linears 'fc1' to keep in float; expected auto, none, a budget as in 5%, or of down",
        ),
        (("--keep-float", "5%"), "--keep-float 5% without static activations; expected --act per-tensor"),
        (("--act", "per-tensor", "--keep-float", "200%"), "a budget of '200%' for linears in float; expected above 0%"),
        (("--act", "per-tensor", "--keep-float=-5%"), "a budget of '-5%' for linears in float; expected above 0%"),
        (("--act", "per-tensor", "--keep-float", "0.001%"), "none of this model fits into; expected at least"),
        (("--for", "tensorrt", "--dtype", "fp32"), "--for tensorrt with --dtype fp32; expected fp16 or bf16; drop one"),
        (("--for", "onnxruntime", "--dtype", "bf16"), "--for onnxruntime with --dtype bf16; expected fp32 or fp16"),
        (
            ("--for", "tensorrt", "--embedding", "int8"),
            "--embedding int8; expected a float embedding: TensorRT",
        ),
        (("--cache", "in-place"), "--cache in-place without --capacity; expected --cache in-place with --capacity N"),
        (("--capacity", "32"), "--cache grown with --capacity 32; expected --cache in-place with --capacity N"),
        (("--cache", "in-place", "--capacity", "9999"), "--capacity 9999; expected 2 to "),
        (
            ("--cache", "in-place", "--capacity", "32", "--opset", "21"),
            "opset 21 with a cache in place; expected opset 24",
        ),
        (
            ("--cache", "in-place", "--capacity", "32", "--for", "tensorrt", "--kv", "int8"),
            "expected a float cache: TensorRT writes no integers in place; drop --kv, or leave --cache out",
        ),
        (("--opset", "17", "--dtype", "bf16"), "a bfloat16 body in opset 17; expected opset 21; give TensorRT 8.6"),
    ],
)
def test_contradictions(
    options: tuple, said: str, case: Case, scales: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, err = export(capsys, case, scales, *options, "--out", tmp_path / "out")
    assert (status, err.count("\n")) == (2, 0)
    assert said in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("stored", "half"), [("float16", "fp16"), ("bfloat16", "bf16"), ("float32", "fp16")])
def test_an_engine_sets_the_body(
    stored: str, half: str, case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorRT's is the checkpoint's own half type, by `export onnx --for` and by `run`."""
    folder = zoo.save("llama", tmp_path / "model", dtype=getattr(torch, stored))
    plain = ("export", "onnx", str(folder), "--float", "--quiet")
    for number, (options, body) in enumerate(
        (
            ((), "fp32"),
            (("--for", "onnxruntime"), "fp32"),
            (("--for", "onnxruntime", "--dtype", "fp16"), "fp16"),
            (("--for", "tensorrt"), half),
            (("--for", "tensorrt", "--dtype", "bf16"), "bf16"),
        )
    ):
        out = tmp_path / str(number)
        assert main([*plain, *options, "--out", str(out)]) == 0, capsys.readouterr().err
        found = load_manifest(out).origin.onnx
        assert found is not None
        assert found.body == body
    model = open_model(folder)
    for target, body in (("tensorrt", half), ("onnxruntime", "fp32"), ("openvino", "fp32")):
        assert TARGETS[target].writer(tmp_path / target, model, PER_TOKEN).options["onnx"].body == body
    assert TARGETS["tensorrt"].export != TARGETS["onnxruntime"].export


def test_scales_without_output_ranges(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As published ones are."""
    published = tmp_path / "published.pt"
    torch.save(dict(case.act_scales.input_absmax), published)
    assert not ActScales(case.act_scales.input_absmax).output_absmax
    status, err = export(capsys, case, published, "--kv", "int8", "--out", tmp_path / "out")
    assert (status, err.count("\n")) == (2, 0)
    assert "an INT8 KV cache without the range of the outputs of model.layers.0.self_attn.q_proj; expected" in err
    assert "calibrate this model" in err
