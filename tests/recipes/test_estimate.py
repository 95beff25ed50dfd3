"""`smoothquant estimate`: the disk that it tells is what a run takes, and what cannot be is told in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from act_scales.store import ActScales
from recipes.cli import main
from recipes.estimate.rates import Rates
from recipes.estimate.sizes import ModelSizes, Tokens
from recipes.estimate.steps import StepsOfRun
from recipes.families import open_announced, open_model
from recipes.synthetic import save_random_llama
from smoothquant.errors import UserError
from smoothquant.static import numbers_of
from tests.forked import assert_one_line, smoothquant
from tests.models import TEXT, save_llama

FEW = ("--samples", "2", "--length", "32")
ROUND = Rates(
    compute=torch.bfloat16,
    products={torch.bfloat16: 1e11, torch.float32: 1e11},
    int8=1e11,
    beside=1e-6,
    plain=1e-6,
    quantize=1e8,
    take=1e9,
    sha256=1e9,
    read=1e9,
    write=1e9,
    cached=True,
    read_from="nothing",
    cores=1,
)
TARGETS = ("--target", "w8a8", "--target", "onnx", "--target", "trtllm")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round numbers in the place of what this machine does, which takes seconds to measure."""
    monkeypatch.setattr("recipes.estimate.whole.measure_rates", lambda *_: ROUND)


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


def test_no_step_takes_more_than_its_limit(tmp_path: Path) -> None:
    """Of a model with a larger layer, which is read more often then."""
    config = json.loads((save_llama(tmp_path / "model") / "config.json").read_text())
    wide = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "head_dim": 128}
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide/config.json").write_text(json.dumps(config | wide))
    sizes, text, limit = ModelSizes(open_announced(tmp_path / "wide")), Tokens(64, 64), 2 * 10**9
    free, held = (StepsOfRun(sizes, ROUND, 1 << 28, 1 << 28, most) for most in (None, limit))
    pairs = ((free.calibrate(text), held.calibrate(text)), (free.export("", 0), held.export("", 0)))
    for whole, sliced in pairs:
        assert whole.peak > limit >= sliced.peak
        assert sliced.read > whole.read
        assert (sliced.seconds or 0) > (whole.seconds or 0)
    with pytest.raises(UserError, match="--memory 2GB: too little"):
        held.validate(text, {"engine": 0}, 1)


@pytest.mark.usefixtures("quick")
def test_linears_in_float_count_as_their_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_llama(tmp_path / "model")
    written = []
    for kept in ("none", "50%"):
        asked = ("--target", f"onnx:act=per-tensor,keep-float={kept}", "--out", str(tmp_path / "out"))
        assert main(["estimate", str(tmp_path / "model"), *FEW, *asked, "--json", "--quiet"]) == 0
        steps = json.loads(capsys.readouterr().out)["steps"]
        written.append(next(step["written"] for step in steps if step["step"] == "export onnx"))
    assert written[1] - written[0] == numbers_of(open_model(tmp_path / "model")) * 3 // 2  # float32 in INT8's place


@pytest.mark.usefixtures("quick")
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
        (("model", "--memory", "100MB"), "--memory 100MB: too little for model"),
        (("model", "--target", "onnx:keep-float=5%"), "--keep-float 5% without static activations"),
        (("model", "--target", "gguf"), "no target 'gguf'"),
        (("model", "--target", "onnx:act=int3"), "act=int3 cannot be"),
        (("model", "--out", "model/config.json"), "--out"),
    ],
)
def test_what_cannot_be(words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert_one_line(smoothquant("estimate", *words), 2, said)


@pytest.mark.usefixtures("quick")
def test_a_dry_run_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    given = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), *FEW, "--no-search"]
    before = sorted(tmp_path.rglob("*"))
    assert main(["run", "llama", *given, "--out", str(tmp_path / "out"), "--dry-run", "--json", "--quiet"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    steps = [step["step"] for step in json.loads(capsys.readouterr().out)["steps"]]
    assert steps == ["calibrate", "export onnx, w8a8", "build onnxruntime", "validate"]
    words = ["run", "llama", *given, "--out", str(tmp_path / "out"), "--dry-run", "--memory", "100MB"]
    assert main(words) == 2
    assert "--memory 100MB: too little for" in capsys.readouterr().err
