"""`smoothquant estimate`: the disk that it tells is what a run takes, and what cannot be is told in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from act_scales.store import ActScales
from recipes.cli import main
from recipes.families import open_announced, open_model
from recipes.synthetic import save_random_llama
from smoothquant.errors import UserError
from tests.forked import assert_one_line, smoothquant
from tests.models import TEXT, save_llama

FEW = ("--samples", "2", "--length", "32")
TARGETS = ("--target", "w8a8", "--target", "onnx", "--target", "trtllm")


def test_config_alone_says_what_the_weights_say(tmp_path: Path) -> None:
    save_llama(tmp_path / "model")
    whole = open_model(tmp_path / "model")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "model/config.json", tmp_path / "bare")
    bare = open_announced(tmp_path / "bare")
    assert bare.expected() == whole.expected()
    assert bare.checkpoint.nbytes == whole.checkpoint.nbytes
    assert bare.checkpoint.dtype == whole.checkpoint.dtype
    with pytest.raises(UserError, match=r"model\.safetensors"):
        bare.read(f"{bare.family.embedding}.weight")


def test_the_disk_is_what_a_run_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All exports together, to a percent; of the estimate itself nothing is left."""
    model, scales, out = (str(tmp_path / name) for name in ("model", "scales.safetensors", "out"))
    save_random_llama(Path(model), hidden=512, intermediate=1408, layers=2, heads=8, kv_heads=2, vocabulary=4000)
    found = {name: torch.rand(into) + 0.5 for name, (_, into) in open_model(model).linears()}
    ActScales(found).save(Path(scales))
    before = sorted(tmp_path.rglob("*"))
    assert main(["estimate", model, *FEW, *TARGETS, "--out", out, "--json", "--quiet"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    said = {step["step"]: step for step in json.loads(capsys.readouterr().out)["steps"]}
    assert list(said) == [
        "calibrate",
        "search",
        "export w8a8, onnx, trtllm",
        "build onnxruntime",
        "build tensorrt-llm",
        "validate",
    ]
    assert main(["export", *TARGETS, model, scales, "--out", out, "--quiet"]) == 0
    exported = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
    assert said["export w8a8, onnx, trtllm"]["written"] == pytest.approx(exported, rel=0.01)


def test_a_run_that_the_disk_cannot_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table is shown first. What the memory cannot hold is a warning."""
    save_llama(tmp_path / "model")
    monkeypatch.setattr("recipes.estimate.whole.free_memory", lambda: 1 << 20)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1 << 20))
    assert main(["estimate", str(tmp_path / "model"), *FEW, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "Estimate" in said.out
    assert "GB free on this disk; expected" in said.err.splitlines()[-1]
    assert "calibrate: " in said.err
    assert "of memory are needed" in said.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("nothing",), "nothing: no such folder"),
        (("model", "--length", "0"), "--length 0; expected 1 to"),
        (("model", "--length", "10000000"), "expected 1 to"),
        (("model", "--samples", "-3"), "--samples -3; expected 1 or more"),
        (("model", "--target", "gguf"), "no target 'gguf'"),
        (("model", "--target", "onnx:act=int3"), "act=int3 cannot be"),
        (("model", "--out", "model/config.json"), "--out"),
    ],
)
def test_what_cannot_be(words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert_one_line(smoothquant("estimate", *words), 2, said)


def test_a_dry_run_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    given = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), *FEW, "--no-search"]
    before = sorted(tmp_path.rglob("*"))
    assert main(["run", "llama", *given, "--out", str(tmp_path / "out"), "--dry-run", "--json", "--quiet"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    steps = [step["step"] for step in json.loads(capsys.readouterr().out)["steps"]]
    assert steps == ["calibrate", "export onnx, w8a8", "build onnxruntime", "validate"]
