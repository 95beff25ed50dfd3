"""The commands as a user types them, on a small model, from text to a validated engine: each once in a new process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from act_scales.store import load_act_scales
from recipes import tiny_llama
from recipes.models import RECIPES
from recipes.recipe import find
from smoothquant.artifacts.card import CARD
from tests import zoo
from tests.forked import assert_one_line, in_a_new_process, smoothquant

RECIPE = find("tiny-llama", RECIPES)
SMALL = ("--samples", 8, "--length", 128)


def result(*arguments: object, run: Callable[..., subprocess.CompletedProcess[str]] = smoothquant) -> dict:
    found = run(*arguments, "--json", "--quiet")
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the commands make of the bundled model, one after another."""
    out = tmp_path_factory.mktemp("commands")
    model, scales = tiny_llama.PATH, out / "model.act_scales.safetensors"
    result("calibrate", model, "--text", tiny_llama.CALIBRATION_TEXT, *SMALL, "--out", scales, run=in_a_new_process)
    for target, *options in (("hf",), ("w8a8",), ("onnx", "--lm-head", "int8"), ("onnx", "--groups", "none")):
        name = "-".join([target, *options]).replace("--", "")
        run = in_a_new_process if target == "w8a8" else smoothquant
        result("export", target, model, scales, "--out", out / name, *options, run=run)
    for name in ("onnx-lm-head-int8", "onnx-groups-none"):
        run = in_a_new_process if "int8" in name else smoothquant
        result("build", "onnxruntime", out / name, "--out", out / f"engine-{name}", run=run)
    return out


def validate(*engines: Path, options: tuple = ()) -> dict:
    text = ("--text", tiny_llama.EVALUATION_TEXT, *SMALL)
    return result("validate", *engines, "--reference", tiny_llama.PATH, *text, *options, run=in_a_new_process)


def test_every_engine_is_validated(folder: Path) -> None:
    names = ("hf", "w8a8", "engine-onnx-lm-head-int8", "engine-onnx-groups-none")
    report = folder / "report.html"
    found = validate(*(folder / name for name in names), options=("--report", report, "--no-thresholds"))
    assert {validation["passed"] for validation in found["validations"]} == {None}
    ratio = {validation["label"]: validation["metrics"]["perplexity_ratio"] for validation in found["validations"]}
    assert abs(ratio["hf"] - 1) < 1e-3  # rounded to float16 once more
    assert abs(ratio["w8a8"] - 1) < 0.01
    assert abs(ratio["engine-onnx-lm-head-int8"] - 1) < 0.01
    assert ratio["engine-onnx-groups-none"] > 1.1  # what SmoothQuant is for
    assert report.stat().st_size > 10_000


def test_a_missed_threshold_is_status_1(folder: Path) -> None:
    text = ("--text", tiny_llama.EVALUATION_TEXT, *SMALL)
    engine = folder / "engine-onnx-groups-none"
    found = smoothquant("validate", engine, "--reference", tiny_llama.PATH, *text, "--kl-mean", "0.01")
    assert found.returncode == 1
    assert "missed; kl_mean" in found.stderr.splitlines()[-1]
    assert "would have passed" in found.stderr.splitlines()[-1]


def test_thresholds_that_nobody_gave(folder: Path) -> None:
    """Those of the family's recipes hold; where none shall, it is said that nothing was judged."""
    command = ("validate", "--reference", tiny_llama.PATH, "--text", tiny_llama.EVALUATION_TEXT, *SMALL)
    bad, good = folder / "engine-onnx-groups-none", folder / "engine-onnx-lm-head-int8"
    found = smoothquant(*command, good)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("wanted: passed") == 3
    found = smoothquant(*command, bad)
    assert found.returncode == 1
    assert "engine-onnx-groups-none: mean KL" in found.stderr.splitlines()[-1]
    found = smoothquant(*command, bad, "--no-thresholds")
    assert found.returncode == 0, found.stderr
    assert "engine-onnx-groups-none: measured; no threshold was given" in found.stdout
    assert "passed" not in found.stdout
    found = smoothquant(*command, bad, "--no-thresholds", "--kl-mean", 1)
    assert_one_line(found, 2, "--no-thresholds beside thresholds or a recipe; expected one or the other")


def test_generate(folder: Path) -> None:
    found = result("generate", folder / "engine-onnx-lm-head-int8", "def main(", "--max-new-tokens", 12)
    assert len(found["tokens"]) == 12
    shown = in_a_new_process("generate", folder / "engine-onnx-lm-head-int8", "-", "--quiet", input="def main(")
    assert found["text"] in shown.stdout


def test_scales(folder: Path, tmp_path: Path) -> None:
    ours = folder / "model.act_scales.safetensors"
    shown = result("scales", "show", ours, run=in_a_new_process)
    assert shown["linears"]["model.layers.1.self_attn.q_proj"]["outliers"] == 4  # as injected
    result("scales", "convert", ours, "--out", tmp_path / "published.pt")
    result("export", "w8a8", tiny_llama.PATH, tmp_path / "published.pt", "--out", tmp_path / "w8a8")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "w8a8" / name).read_bytes() == (folder / "w8a8" / name).read_bytes()


def test_run_resumes(tmp_path: Path) -> None:
    arguments = ("run", "tiny-llama", "--model", tiny_llama.PATH, "--text", tiny_llama.CALIBRATION_TEXT, *SMALL)
    first = result(*arguments, "--out", tmp_path, run=in_a_new_process)
    assert [validation["passed"] for validation in first["validations"]] == [True]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert result(*arguments, "--out", tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    changed = smoothquant(*arguments, "--out", tmp_path, "--alpha", "0.6")  # other inputs: not silently replaced
    assert changed.returncode == 2
    assert "pass --overwrite" in changed.stderr
    assert result(*arguments, "--out", tmp_path, "--alpha", "0.6", "--overwrite")["validations"][0]["passed"]


@pytest.mark.parametrize("searches", [True, False])
def test_run_makes_every_target(searches: bool, tmp_path: Path) -> None:
    """Several targets share search or calibration, export and reference: each is what an export alone makes."""
    arguments = ("run", "tiny-llama", "--model", tiny_llama.PATH, "--text", tiny_llama.CALIBRATION_TEXT, *SMALL)
    targets = ("--target", "w8a8", "--target", "tensorrt-llm", "--target", "onnxruntime")
    found = result(*arguments, *targets, *(() if searches else ("--no-search",)), "--out", tmp_path / "out")
    names = ["w8a8", "tensorrt-llm", "onnxruntime"]
    folders = {label: Path(folder).relative_to(tmp_path / "out") for label, folder in found["engines"].items()}
    assert folders == dict(zip(names, map(Path, ("w8a8", "trtllm", "engine/onnxruntime")), strict=True))
    assert [validation["label"] for validation in found["validations"]] == names
    assert {validation["passed"] for validation in found["validations"]} == {True}
    scales, plan = tmp_path / "out/act_scales.safetensors", tmp_path / "out/plan"
    given = ("--plan", plan) if searches else (scales, "--alpha", RECIPE.alpha)
    assert (plan.exists(), scales.exists()) == (searches, not searches)
    for target in ("w8a8", "trtllm", "onnx"):
        alone = tmp_path / target
        result("export", target, tiny_llama.PATH, *given, "--out", alone)
        cards = [folder / target / CARD for folder in (tmp_path, tmp_path / "out")]
        assert ["Not yet:" in card.read_text() for card in cards] == [True, target == "onnx"]  # else it was validated
        for path in (path for path in alone.iterdir() if path.is_file() and path.name != CARD):
            assert path.read_bytes() == (tmp_path / "out" / target / path.name).read_bytes(), path


@pytest.mark.parametrize(
    ("layout", "target", "status", "said"),
    [
        ("llama", "tensorrt", 3, "tensorrt"),
        ("mixtral", "tensorrt-llm", 2, "mixtral in TensorRT-LLM: its SmoothQuant layers have no experts"),
    ],
)
def test_run_refuses_before_any_work(layout: str, target: str, status: int, said: str, tmp_path: Path) -> None:
    if target == "tensorrt" and find_spec("tensorrt"):
        pytest.skip("TensorRT is here")
    model, out = zoo.save(layout, tmp_path / "model"), tmp_path / "out"
    arguments = ("run", layout, "--model", model, "--text", tiny_llama.CALIBRATION_TEXT, *SMALL, "--quiet")
    assert_one_line(smoothquant(*arguments, "--target", "onnxruntime", "--target", target, "--out", out), status, said)
    assert not out.exists()


def test_a_family_file(tmp_path: Path, folder: Path) -> None:
    import shutil

    model, family = tmp_path / "model", tmp_path / "mine.py"
    shutil.copytree(tiny_llama.PATH, model, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    config = json.loads((model / "config.json").read_text()) | {
        "architectures": ["MineForCausalLM"],
        "model_type": "mine",
    }
    (model / "config.json").write_text(json.dumps(config))
    family.write_text(
        "from dataclasses import replace\nfrom recipes.llama import FAMILY as LLAMA\n"
        'FAMILY = replace(LLAMA, name="mine", architectures=("MineForCausalLM",))\n'
    )
    scales = tmp_path / "published.pt"  # of no model in particular
    load_act_scales(folder / "model.act_scales.safetensors").save_pt(scales)
    refused = smoothquant("export", "w8a8", model, scales, "--out", tmp_path / "out")
    assert refused.returncode == 2
    assert "pass --family FILE" in refused.stderr
    arguments = ("export", "w8a8", model, scales, "--family", family, "--out", tmp_path / "out")
    unknown = smoothquant(*arguments)
    assert unknown.returncode == 2
    assert "pass --trust-family" in unknown.stderr
    manifest = result(*arguments, "--trust-family")["manifest"]
    assert manifest["inputs"]["family"] == "mine"


def test_recipes_and_doctor() -> None:
    listed = {recipe["name"]: recipe for recipe in result("recipes")["recipes"]}
    assert listed["llama-2-70b"]["alpha"] == 0.9
    assert listed["llama-2-7b"]["published_wikitext2_perplexity"] == {"fp16": 5.474, "w8a8": 5.515}
    assert len(listed) == len(RECIPES)
    report = result("doctor", run=in_a_new_process)
    elsewhere = ("build tensorrt", "build onnxruntime --provider", "check --compiler")  # a GPU, or an optional package
    here = [ability for ability in report["abilities"] if not ability["command"].startswith(elsewhere)]
    assert len(here) >= 8
    assert {ability["ready"] for ability in here} == {True}  # the tests need everything


def test_help_teaches() -> None:
    shown = in_a_new_process("--help").stdout
    assert "smoothquant search MODEL --text" in shown
    for command in ("calibrate", "search", "validate", "generate", "run", "demo", "doctor", "recipes"):
        assert smoothquant(command, "--help").returncode == 0


def test_help_waits_for_nothing() -> None:
    """The command line is parsed before torch or onnx is imported: they take a second and more."""
    heavy = ("torch", "onnx", "onnxruntime", "transformers")
    code = f"import sys, recipes.cli; recipes.cli.parser(); print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
