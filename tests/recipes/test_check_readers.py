"""smoothquant check --for, and what export says of servers, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes import tiny_llama
from tests import int8_folders, zoo
from tests.forked import assert_one_line, smoothquant

LLAMA = {"model_type": "llama"}


STATIC = ("w8a8", "--act", "per-tensor")


@pytest.fixture(scope="module")
def w8a8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("readers") / "w8a8")


def exported(out: Path) -> Path:
    found = smoothquant("export", "w8a8", tiny_llama.PATH, "--groups", "none", "--out", out)
    assert found.returncode == 0, found.stderr
    [line] = [line for line in found.stdout.splitlines() if line.startswith("servers: ")]
    assert "as written on A100 and H100 by vLLM" in line
    assert "not by TensorRT-LLM, PyTorch backend 1.3 and later" in line
    return out


@pytest.mark.parametrize(
    ("server", "gpu", "status", "said"),
    [
        ("vllm", ("--gpu", "a100"), 0, "CutlassInt8ScaledMMLinearKernel"),
        ("vllm", (), 0, "CPUInt8ScaledMMLinearKernel"),
        ("vllm", ("--gpu", "b200"), 1, "no INT8 kernel for Blackwell"),
        ("sglang", ("--gpu", "9.0"), 0, "sgl_kernel.int8_scaled_mm"),
        ("sglang", ("--gpu", "cpu"), 1, "vLLM serves it on a CPU"),
        ("tensorrt-llm", (), 1, "loads, and is wrong by TensorRT-LLM, PyTorch backend 1.3"),
        ("onnxruntime", (), 1, "smoothquant export onnx"),
    ],
)
def test_a_server_is_asked_about(w8a8: Path, server: str, gpu: tuple, status: int, said: str) -> None:
    found = smoothquant("check", w8a8, "--for", server, *gpu)
    assert found.returncode == status
    text = " ".join((found.stdout + found.stderr).split())
    assert said in text
    if status:
        assert found.stderr.splitlines()[-1].startswith(f"smoothquant: {w8a8}: ")


def test_a_converted_folder_is_asked_about(tmp_path: Path) -> None:
    scales, text = tmp_path / "act_scales.safetensors", ("--text", tiny_llama.CALIBRATION_TEXT)
    static, converted = tmp_path / "static", tmp_path / "converted"
    for command in (
        ("calibrate", tiny_llama.PATH, *text, "--samples", 2, "--length", 16, "--out", scales),
        ("export", "w8a8", tiny_llama.PATH, scales, "--act", "per-tensor", "--out", static),
        ("convert", static, "--to", "modelopt", "--out", converted),
    ):
        found = smoothquant(*command)
        assert found.returncode == 0, found.stderr
    assert smoothquant("check", converted, "--for", "edge-llm", "--gpu", "a100").returncode == 0
    refused = smoothquant("check", converted, "--for", "vllm", "--gpu", "a100")
    assert (refused.returncode, "smoothquant convert FOLDER --to compressed-tensors" in refused.stdout) == (1, True)
    assert smoothquant("check", static, "--for", "vllm", "--gpu", "a100").returncode == 0


def test_programs_get_json(w8a8: Path) -> None:
    found = smoothquant("check", w8a8, "--for", "tensorrt-llm", "--json")
    content = json.loads(found.stdout)
    assert [reader["outcome"] for reader in content["readers"]] == ["refused", "loads, and is wrong"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--for", "ollama"), "expected one of vllm, sglang"),
        (("--for", "vllm", "--gpu", "a101"), "--gpu a101"),
        (("--gpu", "a100"), "--gpu without --for"),
        (("--for", "vllm", "--integrity"), "--for with --integrity"),
    ],
)
def test_a_bad_question_is_one_line(w8a8: Path, options: tuple, said: str) -> None:
    assert_one_line(smoothquant("check", w8a8, *options), 2, said)


@pytest.mark.parametrize(
    ("files", "status", "said"),
    [
        ({}, 2, "no config.json"),
        ({"config.json": {}}, 1, "not known by vLLM 0.32.0: it has no class for model_type ''"),
        ({"config.json": LLAMA}, 0, "as written (float)"),
        ({"config.json": LLAMA | {"quantization_config": int8_folders.compressed_tensors()}}, 0, "as written (CPUInt8"),
        ({"config.json": LLAMA | {"quantization_config": {"quant_method": "awq"}}}, 2, "quant_method 'awq'"),
        ({"config.json": LLAMA, "hf_quant_config.json": int8_folders.modelopt()}, 1, "--to compressed-tensors"),
        ({"config.json": {"architecture": "LlamaForCausalLM", "mapping": {}}}, 1, "smoothquant export w8a8"),
    ],
)
def test_somebody_elses_folder_is_asked_about(tmp_path: Path, files: dict, status: int, said: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    found = smoothquant("check", tmp_path, "--for", "vllm", "--gpu", "cpu")
    assert found.returncode == status
    assert said in found.stdout + found.stderr
    assert len(found.stderr.splitlines()) == bool(status)


@pytest.mark.parametrize(
    ("layout", "target", "said"),
    [
        ("bloom", STATIC, "query_key_value"),
        ("mixtral", STATIC, "one scale per token only"),
        ("falcon-7b", ("modelopt",), "finds none of its tensors, and exports zeros"),
        ("mistral", ("modelopt",), "sliding window"),
    ],
)
def test_a_folder_that_no_server_takes_is_not_written(tmp_path: Path, layout: str, target: tuple, said: str) -> None:
    model, scales, out = zoo.save(layout, tmp_path / "model"), tmp_path / "act_scales.safetensors", tmp_path / "out"
    text = ("--text", tiny_llama.CALIBRATION_TEXT, "--samples", 2, "--length", 16)
    assert smoothquant("calibrate", model, *text, "--out", scales).returncode == 0
    found = smoothquant("export", *target, model, scales, "--out", out)
    assert_one_line(found, 2, said)
    assert not out.exists()
