"""`smoothquant build tensorrt-llm` with a `trtllm-build` that only pretends: every way in which it can end."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from builders.tensorrt_llm.build.command import BuildLimits, container_command, doubts, options
from builders.tensorrt_llm.build.environment import find_environment
from builders.tensorrt_llm.format.config import CheckpointConfig, parse
from builders.tensorrt_llm.format.releases import TRITON, has_kernels, triton_image
from exporters.trtllm.versions import FIRST, RELEASES, STABLE, builds_engines
from smoothquant.artifacts.manifest import TrtllmOptions
from smoothquant.artifacts.seal import opened
from smoothquant.errors import MissingPackageError, UserError
from smoothquant.journal import work_folder
from smoothquant.outputs import MANIFEST, OURS
from smoothquant.workspace import Workspace
from tests.builders.tensorrt_llm.checkpoints import PER_TOKEN, write
from tests.builders.tensorrt_llm.fake_tools import install
from tests.forked import assert_one_line, smoothquant
from tests.models import save_tokenizer
from tests.outputs import made_from, top
from tests.zoo import build


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write(build("llama"), folder, PER_TOKEN, tp=2)
    save_tokenizer(folder)
    return folder


def config(**changes: object) -> CheckpointConfig:
    numbers = {"vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return parse({"architecture": "LlamaForCausalLM", "dtype": "float16", **numbers, **changes})


def test_an_engine(checkpoint: Path, tmp_path: Path) -> None:
    environment, out = install(tmp_path / "tools"), tmp_path / "engine"
    arguments = ("build", "tensorrt-llm", checkpoint, "--out", out, "--max-batch-size", 4, "--max-seq-len", 256)
    found = smoothquant(*arguments, "--workers", 2, "--json", env=environment)
    assert found.returncode == 0, found.stderr
    assert "Set smooth_quant_gemm_plugin to float16" in found.stderr  # its log, on either stream
    manifest = json.loads(found.stdout)["manifest"]
    assert manifest == opened(json.loads((out / MANIFEST).read_text()))
    assert top(out) == {"rank0.engine", "rank1.engine", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (out / OURS).iterdir()} == {"manifest.json", "trtllm-build.log"}
    assert manifest["inputs"]["limits"] == {
        "max_batch_size": 4,
        "max_input_len": 256,
        "max_seq_len": 256,
        "max_num_tokens": 8192,
        "workers": 2,
    }
    assert (manifest["inputs"]["tensorrt_llm"], manifest["inputs"]["gpu"]) == ("1.2.1", ["NVIDIA H100"])
    assert "Serializing engine" in (out / "smoothquant/trtllm-build.log").read_text()
    dry = smoothquant(*arguments, "--workers", 2, "--dry-run")
    assert shlex.split(dry.stdout) == manifest["results"]["command"]
    before = (out / "rank0.engine").stat().st_mtime_ns
    assert smoothquant(*arguments, "--workers", 2, env=environment).returncode == 0
    assert (out / "rank0.engine").stat().st_mtime_ns == before  # finished: not built again
    assert_one_line(smoothquant(*arguments, env=environment), 2, "exists and was not made", "--overwrite")
    assert not work_folder(out).exists()


def test_a_failed_build(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    arguments = ("build", "tensorrt-llm", checkpoint, "--out", out, "--quiet")
    found = smoothquant(*arguments, env=install(tmp_path / "broken", mode="fail"))
    log = str(work_folder(out) / "output/smoothquant/trtllm-build.log")
    assert_one_line(found, 2, "failed with status 3", "could not find any implementation for node", f"see {log}")
    assert "could not find any implementation" in Path(log).read_text()
    assert not out.exists()
    found = smoothquant(*arguments, env=install(tmp_path / "silent", mode="silent"))
    assert_one_line(found, 2, "trtllm-build left no config.json")
    assert not out.exists()
    assert smoothquant(*arguments, env=install(tmp_path / "tools")).returncode == 0
    assert (out / "rank1.engine").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build(number: signal.Signals, checkpoint: Path, tmp_path: Path) -> None:
    """Nothing that looks whole, no process left behind, and the same command then does it."""
    out = tmp_path / "engine"
    arguments = ["build", "tensorrt-llm", str(checkpoint), "--out", str(out)]
    environment = install(tmp_path / "hanging", mode="hang")
    command = [sys.executable, "-m", "recipes.cli", *arguments]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    pids = tmp_path / "hanging/bin/pids"
    deadline = time.monotonic() + 60
    while not (pids.exists() and pids.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    tool, worker = map(int, pids.read_text().split())
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "smoothquant: interrupted" in said
    assert "Traceback" not in said
    assert not out.exists()
    assert [alive(pid) for pid in (tool, worker)] == [False, False]
    assert smoothquant(*arguments, env=install(tmp_path / "tools")).returncode == 0
    assert (out / "rank0.engine").exists()


def alive(pid: int) -> bool:
    for _ in range(100):  # an orphan is reaped by whoever inherited it
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return False
        except (ProcessLookupError, FileNotFoundError):
            return False
        time.sleep(0.02)
    return True


def test_without_the_tool(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    found = smoothquant("build", "tensorrt-llm", checkpoint, "--out", out, "--max-batch-size", 8)
    instead = f"smoothquant-tensorrt-llm build tensorrt-llm {checkpoint} --out {out} --max-batch-size 8"
    assert found.stderr.rstrip().endswith(instead)  # no limits that were not asked for
    assert_one_line(found, 3, "trtllm-build is not on PATH", "TensorRT-LLM 0.20.0 to 1.2.1", "--gpus all", instead)
    assert not out.exists()
    dry = smoothquant("build", "tensorrt-llm", checkpoint, "--out", out, "--dry-run", "--json")
    assert json.loads(dry.stdout)["command"][0] == "trtllm-build"


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        (
            {"version": "1.3.0rc22"},
            "TensorRT-LLM 1.3.0rc22 builds no SmoothQuant engines; expected TensorRT-LLM 0.20.0",
        ),
        ({"version": "0.17.0"}, "TensorRT-LLM 0.17.0 builds no SmoothQuant engines"),
        ({"version": ""}, "cannot tell its version of TensorRT-LLM"),
        ({"gpus": ()}, "no GPU is visible here"),
        ({"gpus": ("NVIDIA H100, 9.0", "NVIDIA B200, 10.0")}, "NVIDIA B200 has compute capability 10.0"),
        (
            {"gpus": ("Tesla T4, 7.5",)},
            r"Tesla T4 has compute capability 7.5, .*; expected compute capability 8.0 to 9",
        ),
    ],
)
def test_environments_that_build_nothing(
    tools: dict, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in install(tmp_path / "tools", **tools).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MissingPackageError, match=said) as caught:
        find_environment("docker run this")
    assert caught.value.exit_code == 3


def test_gpus() -> None:
    assert all(map(has_kernels, ("8.0", "8.6", "8.9", "9.0", "12.0", "12.1")))
    assert not any(map(has_kernels, ("6.1", "7.0", "7.5", "9.9", "10.0", "10.3", "11.0")))


def test_what_is_no_reason_to_stop(tmp_path: Path) -> None:
    """Another version than the checkpoint was exported for, and a GPU that not every version has kernels for."""
    inputs = made_from("per-token", trtllm=TrtllmOptions(PER_TOKEN, "float16", 1, 1, "1.2.1"))
    with Workspace(tmp_path / "checkpoint", "export trtllm", inputs) as work:
        write(build("llama"), work.folder, PER_TOKEN)
        work.own()
        work.commit()
    arguments = ("build", "tensorrt-llm", tmp_path / "checkpoint", "--out", tmp_path / "engine")
    plain = smoothquant(*arguments, env=install(tmp_path / "right"))
    assert plain.returncode == 0
    assert "exported for" not in plain.stderr
    tools = install(tmp_path / "other", version="1.1.0", gpus=("NVIDIA GeForce RTX 5090, 12.0",))
    found = smoothquant(*arguments, "--overwrite", env=tools)
    assert found.returncode == 0, found.stderr
    assert re.search(r"exported for TensorRT-LLM 1\.2\.1\b.*\b1\.1\.0\b", found.stderr)
    assert re.search(r"RTX 5090\b.* compute capability 12\.0: only later versions", found.stderr)


def test_a_missing_gpu_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    environment = install(tmp_path / "tools", gpus=())
    found = smoothquant("build", "tensorrt-llm", checkpoint, "--out", out, env=environment)
    assert_one_line(found, 3, "no GPU is visible here", "--gpus all")
    assert not out.exists()
    assert not work_folder(out).exists()


def test_a_checkpoint_with_faults_is_not_built(tmp_path: Path) -> None:
    write(build("llama"), tmp_path / "checkpoint", PER_TOKEN, tp=2)
    for rank in range(2):
        (tmp_path / f"checkpoint/rank{rank}.safetensors").unlink()
    found = smoothquant(
        "build", "tensorrt-llm", tmp_path / "checkpoint", "--out", tmp_path / "engine", env=install(tmp_path / "tools")
    )
    assert_one_line(found, 2, "rank0.safetensors: no such file", "(and 1 more)", "see smoothquant check")


INT8_CACHE = {"quantization": {"kv_cache_quant_algo": "INT8"}}


def test_limits_from_the_model() -> None:
    whole = BuildLimits().resolved(config(max_position_embeddings=131072))
    assert (whole.max_input_len, whole.max_seq_len, whole.max_num_tokens) == (131072, 131072, 8192)
    one_piece = BuildLimits().resolved(config(max_position_embeddings=131072, **INT8_CACHE))
    assert one_piece.max_num_tokens == 131072
    assert BuildLimits(max_batch_size=9000).resolved(config(max_position_embeddings=512)).max_num_tokens == 9000
    short = BuildLimits(max_seq_len=512, max_input_len=100, max_num_tokens=64).resolved(
        config(max_position_embeddings=4096)
    )
    assert (short.max_input_len, short.max_seq_len, short.max_num_tokens) == (100, 512, 64)


@pytest.mark.parametrize(
    ("limits", "changes", "said"),
    [
        (BuildLimits(), {}, "does not say how long its context is; give --max-seq-len"),
        (BuildLimits(max_batch_size=0, max_seq_len=9), {}, "--max-batch-size 0; expected a positive number"),
        (BuildLimits(max_seq_len=64, max_input_len=65), {}, "--max-input-len 65; expected at most --max-seq-len, 64"),
        (
            BuildLimits(max_seq_len=64, max_num_tokens=16),
            {},
            "--max-num-tokens 16; expected at least --max-batch-size, 32",
        ),
        (BuildLimits(max_seq_len=64, max_num_tokens=40), INT8_CACHE, "expected at least --max-input-len, 64"),
        (
            BuildLimits(max_seq_len=129),
            {"architecture": "GPT2LMHeadModel", "max_position_embeddings": 128},
            "--max-seq-len 129; expected at most 128, the model's learned positions",
        ),
    ],
)
def test_limits_that_contradict(limits: BuildLimits, changes: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        limits.resolved(config(**changes))


@pytest.mark.parametrize(
    ("limits", "changes", "said"),
    [
        ({"max_seq_len": 100000}, {}, ["--max-seq-len 100000 is beyond the 1024 positions that the model knows"]),
        ({"max_seq_len": 1024, "max_num_tokens": 65536}, {}, []),
        ({"max_seq_len": 9000}, {"architecture": "BloomForCausalLM"}, []),
        ({}, {"max_position_embeddings": 131072}, []),
        ({}, INT8_CACHE, []),
        (
            {},
            {"max_position_embeddings": 131072, **INT8_CACHE},
            ["--max-num-tokens 131072: with an INT8 KV cache"],
        ),
    ],
)
def test_doubts(limits: dict, changes: dict, said: list[str]) -> None:
    what = config(**{"max_position_embeddings": 1024, **changes})
    found = doubts(BuildLimits(**limits).resolved(what), what)
    assert [line[: len(start)] for line, start in zip(found, said, strict=True)] == said


def test_doubts_are_told(checkpoint: Path, tmp_path: Path) -> None:
    found = smoothquant(
        "build",
        "tensorrt-llm",
        checkpoint,
        "--out",
        tmp_path,
        "--dry-run",
        "--max-seq-len",
        100000,
        "--json",
        "--quiet",
    )
    assert found.returncode == 0
    said = "--max-seq-len 100000 is beyond the 512 positions that the model knows"
    assert f"warning: {said}" in found.stderr
    assert any(said in warning for warning in json.loads(found.stdout)["warnings"])


def test_an_int8_cache_is_no_paged_context() -> None:
    limits = BuildLimits(max_seq_len=512)
    assert options(config(), limits)["use_paged_context_fmha"] == "enable"
    assert options(config(**INT8_CACHE), limits)["use_paged_context_fmha"] == "disable"


def test_a_window_is_no_paged_context() -> None:
    """A cache of the window's size is a ring: prompts are computed in one piece, unless all fit into the window."""
    windowed = replace(config(max_position_embeddings=32768), window=4096)
    limits = BuildLimits().resolved(windowed)
    assert limits.max_num_tokens == 32768
    assert doubts(limits, windowed)[0].startswith("--max-num-tokens 32768: with a window of 4096 tokens prompts are")
    with pytest.raises(UserError, match="--max-input-len, 32768: with a window of 4096 tokens prompts are computed in"):
        BuildLimits(max_num_tokens=8192).resolved(windowed)
    for longest, context in ((4097, "disable"), (4096, "enable")):
        assert options(windowed, BuildLimits(max_seq_len=longest))["use_paged_context_fmha"] == context


def test_versions() -> None:
    for version in ("0.20.0", "0.21.0", "1.0.0", "1.1.0rc5", "1.2.1", "1.3.0rc20"):
        assert builds_engines(version)
    for version in ("0.19.0", "0.20.0rc3", "1.3.0rc21", "1.3.0", "1.4.0rc1", "unknown", ""):
        assert not builds_engines(version)
    assert set(TRITON) <= set(RELEASES)
    for command in (("build", "tensorrt-llm"), ("export", "trtllm")):
        assert f"{FIRST} to {STABLE}" in " ".join(smoothquant(*command, "--help").stdout.split())
    assert triton_image("1.1.0") == "nvcr.io/nvidia/tritonserver:25.12-trtllm-python-py3"
    assert triton_image("1.2.1") is None


def test_the_container_mounts_what_it_needs(tmp_path: Path) -> None:
    beside = container_command(tmp_path / "my model", tmp_path / "engine", BuildLimits())
    assert f"-v '{tmp_path}:{tmp_path}'" in beside.replace('"', "'") or f"-v {tmp_path}:{tmp_path} " in beside
    assert f"'{tmp_path}/my model'" in beside
    apart = container_command(Path("/data/checkpoint"), Path("/engines/new"), BuildLimits(workers=2))
    assert "-v /data:/data -v /engines:/engines smoothquant-tensorrt-llm" in apart
    assert apart.endswith("--out /engines/new --workers 2")


def test_the_doctor_knows(tmp_path: Path) -> None:
    def asked(environment: dict[str, str] | None = None) -> tuple[dict, list[str]]:
        found = smoothquant("doctor", "--json", env=environment)
        assert found.returncode == 0, found.stderr
        content = json.loads(found.stdout)
        return {entry["command"]: entry for entry in content["abilities"]}, content["advice"]

    here, _ = asked()
    assert "docker/tensorrt-llm" in here["build tensorrt-llm"]["how"]
    assert not here["build tensorrt-llm"]["ready"]
    assert here["check, validate (TensorRT-LLM), serve-config"]["ready"]
    there, advice = asked(install(tmp_path / "right", version="1.2.1"))
    assert there["build tensorrt-llm"]["ready"]
    assert not any("builds no engines" in line for line in advice)
    _, advice = asked(install(tmp_path / "new", version="1.3.0"))
    assert "TensorRT-LLM 1.3.0 builds no engines (1.3.0rc20 was the last that does): use 1.2.1" in advice
