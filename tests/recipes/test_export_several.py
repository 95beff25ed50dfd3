"""smoothquant export --target ... --target ...: several formats, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from act_scales.store import load_act_scales
from smoothquant.outputs import load_manifest
from smoothquant.plan import read_plan
from tests.forked import assert_one_line, smoothquant
from tests.models import open_llama, save_llama
from tests.plans import write_plan

ONNX_OPTIONS = "act=per-token|per-tensor|both, float, for=onnxruntime|tensorrt, dtype=fp32|fp16|bf16"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A folder with a model, its act scales and a plan."""
    folder = tmp_path_factory.mktemp("place")
    model, scales = open_llama(save_llama(folder / "model")), folder / "scales.safetensors"
    few = ("--samples", "2", "--length", "32", "--quiet")
    found = smoothquant("calibrate", folder / "model", "--text", text_file, *few, "--out", scales)
    assert found.returncode == 0, found.stderr
    write_plan(model, load_act_scales(scales).for_model(model), folder / "plan")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_is_what_its_own_command_makes(place: Path, tmp_path: Path) -> None:
    """Options may stand anywhere; a list of roles goes on behind its comma."""
    given, out = (place / "model", place / "scales.safetensors"), tmp_path / "out"
    options = {
        "w8a8": ("w8a8:act=per-tensor,keep-float=o,down", "--act", "per-tensor", "--keep-float", "o,down"),
        "onnx": ("onnx:dtype=fp16,act=both", "--act", "both", "--dtype", "fp16"),
        "trtllm": ("trtllm:pp=2", "--pp", "2"),
    }
    first, *others = (words[0] for words in options.values())
    more = [word for each in others for word in ("--target", each)]
    found = smoothquant("export", f"--target={first}", *given, *more, "--out", out, "--alpha", "0.7", "--json")
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["out"] == str(out)
    assert {name: one["out"] for name, one in told["targets"].items()} == {name: str(out / name) for name in options}
    for name, words in options.items():
        alone = smoothquant("export", name, *given, *words[1:], "--alpha", "0.7", "--out", tmp_path / name, "--json")
        assert alone.returncode == 0, alone.stderr
        assert contents(out / name) == contents(tmp_path / name)
        assert told["targets"][name] == json.loads(alone.stdout) | {"out": str(out / name)}
    assert "w8a8: 4 linears stay in float (--keep-float o,down)" in found.stderr


def test_a_plan_in_the_place_of_scales(place: Path, tmp_path: Path) -> None:
    model, plan = place / "model", place / "plan"
    found = smoothquant("export", "--target", "w8a8", "--target", "trtllm", model, plan, "--out", tmp_path / "out")
    assert found.returncode == 0, found.stderr
    alone = smoothquant("export", "w8a8", model, "--plan", plan, "--out", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    assert contents(tmp_path / "out/w8a8") == contents(tmp_path / "alone")
    assert load_manifest(tmp_path / "out/trtllm").origin.plan == read_plan(plan).fingerprint


REFUSED = {
    "name": (("foo",), "no target 'foo'; expected one of hf, w8a8, modelopt, onnx, trtllm"),
    "option": (("w8a8", "onnx:dtpe=fp16"), f"no option 'dtpe'; expected of {ONNX_OPTIONS}"),
    "value": (("onnx:dtype=fp8",), "dtype=fp8 cannot be; expected dtype=fp32|fp16|bf16"),
    "number": (("trtllm:tp=two",), "tp=two cannot be; expected tp=N"),
    "no value": (("onnx:dtype",), "dtype cannot be; expected dtype=fp32|fp16|bf16"),
    "a value too many": (("onnx:float=yes",), "float=yes cannot be; expected float"),
    "option twice": (("onnx:dtype=fp16,dtype=fp32",), "dtype is given twice"),
    "target twice": (("w8a8", "w8a8:act=per-tensor"), "expected each target once: its folder has its name"),
    "run-time smoothers": (
        ("w8a8", "trtllm:runtime-smoother"),
        "groups run-time, smoother_dtype float16, and --target w8a8 with groups default",
    ),
    "another cache": (("onnx:kv=int8", "trtllm"), "--target trtllm smooths with cache none"),
    "a float graph": (("w8a8", "onnx:float"), "--target onnx:float smooths with"),
    "a format's own rule": (("w8a8", "trtllm:tp=3"), "3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_pass(case: str, place: Path, tmp_path: Path) -> None:
    targets, said = REFUSED[case]
    words = [word for target in targets for word in ("--target", target)]
    given = (place / "model", place / "scales.safetensors")
    found = smoothquant("export", *words, *given, "--out", tmp_path / "out", "--quiet")
    assert_one_line(found, 2, said)
    assert not (tmp_path / "out").exists()


def test_a_float_graph_of_a_model_that_is_not_smoothed(place: Path, tmp_path: Path) -> None:
    """The other format starts from act scales, which its manifest names: the two share no pass either."""
    given = (place / "model", place / "scales.safetensors", "--groups", "none", "--out", tmp_path / "out", "--quiet")
    found = smoothquant("export", "--target", "w8a8", "--target", "onnx:float", *given)
    assert_one_line(found, 2, "--target onnx:float smooths with act_scales None")


def test_no_folder_within_an_output(place: Path, tmp_path: Path) -> None:
    given, out = (place / "model", place / "scales.safetensors"), tmp_path / "out"
    assert smoothquant("export", "hf", *given, "--out", out).returncode == 0
    before = contents(out)
    for more in ((), ("--overwrite",)):
        found = smoothquant("export", "--target", "w8a8", *given, "--out", out, "--quiet", *more)
        assert_one_line(found, 2, f"--out {out}: an output of this tool, in which others have no place")
    assert contents(out) == before


def test_what_is_there_stays(place: Path, tmp_path: Path) -> None:
    """A target that is added later is made beside the others, which are left alone; one with other options is not
    replaced in silence."""
    given, out = (place / "model", place / "scales.safetensors"), tmp_path / "out"
    first = ("export", "--target", "w8a8", *given, "--out", out)
    assert smoothquant(*first).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (out / "w8a8").rglob("*")}
    found = smoothquant(*first, "--target", "hf")
    assert found.returncode == 0, found.stderr
    assert f"{out}/w8a8: already there, unchanged" in found.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    words = ("export", "--target", "hf:dtype=float16", "--target", "w8a8:act=per-tensor", *given, "--out", out)
    assert_one_line(smoothquant(*words, "--quiet"), 2, f"{out}/hf exists and was not made by this command")
    assert smoothquant(*words, "--overwrite").returncode == 0
    assert load_manifest(out / "w8a8").origin.scheme.activations.static
