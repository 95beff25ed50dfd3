"""search --lm-head int8, and the engine that its plan makes: the real command line, in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from smoothquant.artifacts.plan import HEAD
from smoothquant.outputs import load_manifest
from smoothquant.plan import read_plan
from tests.forked import assert_one_line, smoothquant
from tests.models import TEXT, open_llama, save_llama
from tests.outputs import agree

FEW = ("--samples", 12, "--length", 96)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, and the plan that the command has made of them."""
    folder = tmp_path_factory.mktemp("place")
    save_llama(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    words = ("search", folder / "model", "--text", folder / "text.txt", *FEW, "--lm-head", "int8")
    found = smoothquant(*words, "--out", folder / "plan", "--report", folder / "plan.html")
    assert found.returncode == 0, found.stderr
    said = " ".join(found.stdout.split())
    assert "float head" in said
    assert f"try smoothquant export onnx {folder / 'model'} --plan {folder / 'plan'}" in said
    assert "Output head in INT8: its input is" in (folder / "plan.html").read_text()
    return folder


def test_from_a_model_to_a_validated_engine(place: Path, tmp_path: Path) -> None:
    """The head is the plan's target, which no option need say."""
    plan = read_plan(place / "plan").for_model(open_llama(place / "model"))
    assert plan.facts.scheme.head.quantized
    by_plan = ("--plan", place / "plan")
    found = smoothquant("export", "onnx", place / "model", *by_plan, "--out", tmp_path / "onnx")
    assert found.returncode == 0, found.stderr
    assert load_manifest(tmp_path / "onnx").origin.scheme == plan.facts.scheme
    found = smoothquant("build", "onnxruntime", tmp_path / "onnx", "--out", tmp_path / "engine")
    assert found.returncode == 0, found.stderr
    judged = ("--reference", place / "model", "--text", place / "text.txt", "--samples", 4, "--length", 64)
    found = smoothquant("validate", tmp_path / "engine", *judged, *by_plan, "--exact", "--json")
    assert found.returncode == 0, found.stderr
    [one] = json.loads(found.stdout)["validations"]
    assert one["passed"]
    assert one["exactness"]["engine"] < 1e-3  # a token now and then rounds to the other side of a step


def test_formats_without_such_a_head_take_the_plan(place: Path, tmp_path: Path) -> None:
    """And ONNX with a float one, as asked."""
    by_plan = ("--plan", place / "plan")
    for target, *more in (("w8a8",), ("trtllm",), ("hf",), ("onnx", "--lm-head", "float")):
        found = smoothquant("export", target, place / "model", *by_plan, *more, "--out", tmp_path / target)
        assert found.returncode == 0, found.stderr
        assert not load_manifest(tmp_path / target).origin.scheme.head.quantized
    stored = load_file(tmp_path / "w8a8/model.safetensors")
    assert stored["model.norm.weight"].equal(open_llama(place / "model").read("model.norm.weight"))


def test_bad_heads(place: Path, tmp_path: Path) -> None:
    text = ("--text", place / "text.txt", "--out", tmp_path / "plan")
    found = smoothquant("search", place / "model", *text, "--lm-head", "int4")
    assert found.returncode == 2
    assert "--lm-head: invalid choice: 'int4'" in found.stderr.splitlines()[-1]
    export = ("export", "onnx", place / "model", "--plan", place / "plan", "--out", tmp_path / "out")
    path, whole = place / "plan" / HEAD, load_file(place / "plan" / HEAD)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert_one_line(smoothquant(*export), 2, f"{path}: its content is not what was written")
    save_file({name: tensor[:-1].clone() for name, tensor in whole.items()}, path)
    agree(place / "plan")
    assert_one_line(smoothquant(*export), 2, f"{path}: tensor lm_head.", "expected")
    path.unlink()
    assert_one_line(smoothquant(*export), 2, HEAD)
    assert not (tmp_path / "out").exists()
