"""Whatever is wrong: one line that says what, what was expected and what to do; a status; nothing half-written.

The real command line, in a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from act_scales.store import ActScales
from recipes import tiny_llama
from smoothquant.journal import work_folder
from tests.forked import assert_one_line, small_files, smoothquant
from tests.models import OUTLIER, hooked_absmax, sample_ids, save_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def scales(model: Path) -> Path:
    path = model / "model.act_scales.safetensors"
    ActScales(hooked_absmax(model, sample_ids())).save(path)
    return path


def spoiled(folder: Path, fault: str) -> Path:
    """A model folder with something wrong in it."""
    save_llama(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(weights)
    if fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif fault == "corrupt":
        weights.write_bytes(b"\x00" * 100)
    elif fault == "missing":
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    elif fault == "shape":
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(3, 64)
        save_file(tensors, weights)
    elif fault == "nan":
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(tensors, weights)
    elif fault == "architecture":
        content = json.loads(config.read_text()) | {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
        config.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("truncated", "model.safetensors: truncated or corrupt"),
        ("corrupt", "model.safetensors: truncated or corrupt"),
        ("missing", "model-1.safetensors: missing shard; expected a whole, readable file; download this file again"),
        ("shape", "tensor model.layers.0.mlp.up_proj.weight has shape [3, 64]; expected [128, 64] by config.json"),
        ("nan", "tensor model.layers.1.mlp.up_proj.weight holds NaN or Inf"),
        (
            "architecture",
            "architecture MambaForCausalLM (model_type 'mamba') is not known; expected one of LlamaForCausalLM",
        ),
    ],
)
def test_spoiled_model(fault: str, said: str, tmp_path: Path, text_file: Path, scales: Path) -> None:
    folder = spoiled(tmp_path / "model", fault)
    out = tmp_path / "out"
    assert_one_line(smoothquant("export", "w8a8", folder, scales, "--out", out), 2, said)
    calibrated = tmp_path / "x.safetensors"
    found = smoothquant("calibrate", folder, "--text", text_file, "--out", calibrated, "--quiet")
    assert_one_line(found, 2, said)
    assert not out.exists()
    assert not calibrated.exists()


def test_paths_and_options(model: Path, scales: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_one_line(smoothquant("export", "hf", "no/such", scales, "--out", out), 2, "no/such: no such folder")
    (tmp_path / "empty").mkdir()
    assert_one_line(smoothquant("export", "hf", tmp_path / "empty", scales, "--out", out), 2, "config.json: no such")
    assert_one_line(smoothquant("export", "hf", tmp_path, scales, "--out", out), 2, "--out", "lies inside the model")
    assert_one_line(
        smoothquant("export", "hf", model, "nope.safetensors", "--out", out), 2, "nope.safetensors: no such"
    )
    found = smoothquant("export", "modelopt", model, "--out", out)
    assert_one_line(found, 2, "static activations, and no activation scales", "calibrate; give ACT_SCALES")
    for target in ("hf", "w8a8", "onnx", "trtllm"):
        found = smoothquant("export", target, model, "--out", out)
        assert_one_line(found, 2, "no activation scales to smooth by", "give ACT_SCALES, or --groups none")
        assert not list(tmp_path.glob("out*"))
    static = ("--groups", "none", "--act", "per-tensor")
    assert_one_line(smoothquant("export", "w8a8", model, "--out", out, *static), 2, "static activations, and no")
    assert_one_line(
        smoothquant("export", "hf", model, scales, "--out", out, "--alpha", "1.5"), 2, "alpha 1.5; expected a number in"
    )
    assert_one_line(smoothquant("build", "onnxruntime", model, "--out", out), 2, "not an output of this tool")
    assert_one_line(
        smoothquant("validate", model, "--reference", model, "--text", text_file), 2, "not an output of this tool"
    )
    assert_one_line(smoothquant("generate", model, "x"), 2, "not an output of this tool")
    assert not out.exists()


@pytest.fixture(scope="module")
def onnx_export(model: Path, scales: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "export"
    assert smoothquant("export", "onnx", model, scales, "--out", out).returncode == 0
    return out


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--max-length", 513), 2, "--max-length 513; expected 2 to 512, the positions that the model knows"),
        (("--chunk", 1000), 2, "--chunk 1000; expected 2 to 512, the --max-length"),
        (("--max-batch", 0), 2, "--max-batch 0; expected 1 or more"),
        (("--optimization-level", 6), 2, "--optimization-level 6; expected 0 to 5"),
        (("--workspace", "nan"), 2, "--workspace nan; expected GiB of GPU memory, more than 0"),
    ],
)
def test_limits_of_a_tensorrt_engine(
    arguments: tuple, status: int, said: str, onnx_export: Path, tmp_path: Path
) -> None:
    """Said before anything is asked of TensorRT, which need not be there."""
    out = tmp_path / "engine"
    assert_one_line(smoothquant("build", "tensorrt", onnx_export, "--out", out, *arguments), status, said)
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may have it all")
def test_without_tensorrt_or_a_gpu(onnx_export: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    found = smoothquant("build", "tensorrt", onnx_export, "--out", out)
    assert_one_line(found, 3, "pip install tensorrt, or use the image of docker/tensorrt")
    for provider in ("cuda", "tensorrt", "nv-tensorrt-rtx"):
        assert_one_line(smoothquant("build", "onnxruntime", onnx_export, "--out", out, "--provider", provider), 3)
    found = smoothquant("build", "onnxruntime", onnx_export, "--out", out, "--provider", "flux")
    assert_one_line(found, 2, "--provider flux; expected one of cpu, cuda, tensorrt, nv-tensorrt-rtx")
    assert not out.exists()


def test_exports_that_are_no_tensorrt_engine(onnx_export: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    (tmp_path / "empty").mkdir()
    assert_one_line(smoothquant("build", "tensorrt", tmp_path / "empty", "--out", out), 2, "not an output of this tool")
    copy = tmp_path / "copy"
    shutil.copytree(onnx_export, copy)
    (copy / "model.onnx.data").unlink()
    assert_one_line(smoothquant("build", "tensorrt", copy, "--out", out), 2, "model.onnx.data is missing")


def test_triton_repositories(onnx_export: Path, tmp_path: Path) -> None:
    engine, repository = tmp_path / "engine", tmp_path / "repository"
    build = ("build", "onnxruntime", onnx_export, "--out", engine, "--triton", repository)
    assert smoothquant(*build).returncode == 0
    assert (repository / "engine/1/model.onnx").exists()
    assert smoothquant(*build).returncode == 0  # finished already
    (repository / "engine/smoothquant/manifest.json").unlink()
    assert_one_line(smoothquant(*build, "--quiet"), 2, "repository/engine exists, and this tool did not make it")
    assert_one_line(smoothquant("generate", engine, "x", "--triton", "127.0.0.1:1"), 2, "no Triton server answers")
    other = ("build", "onnxruntime", onnx_export, "--out", tmp_path / "new/engine", "--triton", repository)
    assert_one_line(smoothquant(*other), 2, "repository/engine exists, and this tool did not make it")
    assert not (tmp_path / "new").exists()  # said before the build
    copy = tmp_path / "copy"
    shutil.copytree(onnx_export, copy)
    (copy / "model.onnx").write_bytes(b"\xff" * (copy / "model.onnx").stat().st_size)
    damaged = ("build", "onnxruntime", copy, "--out", tmp_path / "damaged", "--triton", tmp_path / "other", "--quiet")
    assert_one_line(smoothquant(*damaged), 2, "model.onnx")


def test_places_of_a_validation(model: Path, onnx_export: Path, text_file: Path, tmp_path: Path) -> None:
    """Tried before the reference runs."""
    command = ("validate", onnx_export, "--reference", model, "--text", text_file)
    for option in ("--report", "--out"):
        assert_one_line(smoothquant(*command, option, "/proc/x"), 2, f"{option} /proc/x: cannot write there")
        assert_one_line(smoothquant(*command, option, tmp_path), 2, f"{option} {tmp_path}: a folder")


def test_exports_that_are_no_one_engine(model: Path, scales: Path, text_file: Path, tmp_path: Path) -> None:
    for out, option, said in (
        (
            "both",
            ("--act", "both"),
            "both: the export holds two grap",
        ),
        ("bf16", ("--dtype", "bf16"), "bf16: ONNX Runtime lacks operators for a bfloat16 graph"),
    ):
        assert smoothquant("export", "onnx", model, scales, *option, "--out", tmp_path / out).returncode == 0
        found = smoothquant("validate", tmp_path / out, "--reference", model, "--text", text_file)
        assert_one_line(found, 2, said)


def test_texts(model: Path, tmp_path: Path) -> None:
    for name, content, said in (
        ("empty.txt", "", "0 tokens of text"),
        ("short.txt", "too short", "9 tokens of text"),
        ("text.pdf", "x", "cannot tell what kind of text this is; expected a .txt"),
        ("bad.jsonl", '{"text": "fine"}\nnot json\n', "bad.jsonl line 2: not JSON"),
    ):
        (tmp_path / name).write_text(content)
        found = smoothquant("calibrate", model, "--text", tmp_path / name, "--out", tmp_path / "x.safetensors")
        assert_one_line(found, 2, said)
    found = smoothquant("calibrate", model, "--text", tmp_path / "absent.txt", "--out", tmp_path / "x.safetensors")
    assert_one_line(found, 2, "absent.txt: cannot be read")
    assert not (tmp_path / "x.safetensors").exists()


def test_scales_of_another_model(model: Path, text_file: Path, tmp_path: Path) -> None:
    other = save_llama(tmp_path / "other", seed=9)
    made = tmp_path / "other.act_scales.safetensors"
    arguments = ("calibrate", other, "--text", text_file, "--samples", 2, "--length", 64, "--out", made)
    assert smoothquant(*arguments).returncode == 0
    found = smoothquant("export", "w8a8", model, made, "--out", tmp_path / "out")
    assert_one_line(found, 2, "activation scales of another model", "calibrate this model")


def test_nan_in_calibration(text_file: Path, tmp_path: Path) -> None:
    """Finite weights, activations that overflow: the first linear that shows it is named."""
    folder = save_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e38 / OUTLIER
    tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e38 / OUTLIER
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    found = smoothquant("calibrate", folder, "--text", text_file, "--out", tmp_path / "x.safetensors", "--quiet")
    assert_one_line(found, 2, "NaN or Inf in the", "model.layers.1.mlp.")
    assert not (tmp_path / "x.safetensors").exists()


def test_output_that_exists(model: Path, scales: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    for options in ((), ("--overwrite",)):
        refused = smoothquant("export", "hf", model, scales, "--out", out, *options)
        assert_one_line(refused, 2, "exists, and this tool did not make it", "move it away")
    assert (out / "precious").read_text() == "mine"
    (out / "precious").unlink()
    assert smoothquant("export", "hf", model, scales, "--out", out).returncode == 0
    again = smoothquant("export", "hf", model, scales, "--out", out)  # finished already: nothing to do
    assert again.returncode == 0


def test_output_that_cannot_be_written(model: Path, scales: Path) -> None:
    found = smoothquant("export", "hf", model, scales, "--out", "/proc/smoothquant/out")
    assert_one_line(found, 2, "/proc/smoothquant/out: cannot write there", "choose another --out")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a file system of a size")
@pytest.mark.parametrize("target", ["hf", "w8a8", "modelopt", "onnx", "trtllm"])
def test_disk_too_small(target: str, model: Path, scales: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("this container may not mount")
    try:
        found = smoothquant("export", target, model, scales, "--out", disk / "out")
        assert_one_line(found, 2, "free on this disk", "free some space")
        assert not (disk / "out").exists()
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("target", ["hf", "w8a8", "modelopt", "onnx", "trtllm"])
def test_disk_that_fills_up(target: str, model: Path, scales: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = smoothquant("export", target, model, scales, "--out", out, set_up=small_files(100_000))
    assert_one_line(found, 4, "no space left for the output")
    assert not out.exists()
    assert smoothquant("export", target, model, scales, "--out", out).returncode == 0  # with room, it goes on


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C in mid-calibration: nothing that looks whole, and the same command then does it."""
    out = tmp_path / "x.safetensors"
    arguments = ("calibrate", tiny_llama.PATH, "--text", tiny_llama.CALIBRATION_TEXT, "--out", out, "--samples", 100)
    command = [sys.executable, "-m", "recipes.cli", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    _wait_for(lambda: work_folder(out).exists() or process.poll() is not None)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "smoothquant: interrupted" in said
    assert not out.exists()
    assert smoothquant(*arguments, "--samples", 2).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
