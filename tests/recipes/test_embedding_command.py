"""--embedding of the real command line: an engine and its validation by a plan, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.targets import TARGETS, hold_embedding
from smoothquant.outputs import load_manifest
from smoothquant.scheme import scheme_of
from tests.families.case import Case
from tests.forked import assert_one_line, smoothquant
from tests.models import TEXT
from tests.plans import write_plan

SCHEME = scheme_of("per-token", head="int8", embedding="int8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a text, and a plan with an embedding in INT8."""
    case = Case("llama-tied", tmp_path_factory.mktemp("place"))
    write_plan(case.model, case.act_scales, case.root / "plan", SCHEME)
    (case.root / "text.txt").write_text(TEXT)
    return case.root


def test_a_validated_engine(place: Path, tmp_path: Path) -> None:
    """The plan says what no option need say; validation knows it, and tells it."""
    by_plan = ("--plan", place / "plan")
    for words in (
        ("export", "onnx", place / "model", *by_plan, "--out", tmp_path / "onnx"),
        ("build", "onnxruntime", tmp_path / "onnx", "--out", tmp_path / "engine"),
    ):
        found = smoothquant(*words)
        assert found.returncode == 0, found.stderr
    assert load_manifest(tmp_path / "engine").origin.scheme == SCHEME
    judged = ("--reference", place / "model")
    text = ("--text", place / "text.txt", "--samples", 4, "--length", 64)
    found = smoothquant("validate", tmp_path / "engine", *judged, *text, *by_plan, "--exact", "--json")
    [one] = json.loads(found.stdout)["validations"]
    assert one["subject"]["inputs"]["embedding"] == "int8"
    assert one["exactness"]["ratio"] == pytest.approx(1, abs=0.1)


def test_what_others_have_in_float_and_what_is_refused(place: Path, tmp_path: Path) -> None:
    model, by_plan, out = place / "model", ("--plan", place / "plan"), ("--out", tmp_path / "out")
    for target in ("w8a8", "trtllm"):
        found = smoothquant("export", target, model, *by_plan, "--out", tmp_path / target)
        assert found.returncode == 0, found.stderr
        said = "the plan has its output head and its embedding in INT8: this format has that in float"
        assert said in found.stdout + found.stderr
    asked = ("export", "onnx", model, "--embedding", "int8", *out)
    assert_one_line(smoothquant(*asked, "--float"), 2, "a float graph with an int8 embedding")
    assert_one_line(smoothquant(*asked, "--dtype", "bf16", *by_plan), 2, "--embedding float")
    assert not (tmp_path / "out").exists()
    found = smoothquant("export", "onnx", model, *by_plan, "--embedding", "float", *out)
    assert found.returncode == 0, found.stderr
    assert not load_manifest(tmp_path / "out").origin.scheme.embedding.quantized


def test_targets_that_share_an_export() -> None:
    """Have an embedding in INT8 if all of them may."""
    for names, expected in (
        (("onnxruntime",), True),
        (("w8a8", "onnxruntime"), True),
        (("onnxruntime", "tensorrt"), True),  # TensorRT has an export of its own
        (("tensorrt",), False),
        (("w8a8", "tensorrt-llm"), False),
    ):
        assert hold_embedding([TARGETS[name] for name in names]) == expected
