"""Tools of a machine with TensorRT-LLM, that only pretend: scripts for PATH, and what Python says is installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Takes the options that the real one has (tensorrt_llm/commands/build.py and cli_plugin_args of plugin/plugin.py, the
# same in 0.20 and in 1.2), and no others.
BUILDER = """#!{python}
import argparse, json, os, pathlib, signal, subprocess, sys, time

switch = {{"choices": ["enable", "disable"]}}
dtype = {{"choices": ["auto", "float16", "float32", "bfloat16", "int32", "disable"]}}
parser = argparse.ArgumentParser()
for name in ("checkpoint_dir", "output_dir"):
    parser.add_argument("--" + name, required=True)
for name in ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "max_beam_width", "workers"):
    parser.add_argument("--" + name, type=int)
parser.add_argument("--kv_cache_type", type=str.upper, choices=["CONTINUOUS", "PAGED", "DISABLED"])
for name in ("gemm_plugin", "gpt_attention_plugin"):
    parser.add_argument("--" + name, **dtype)
for name in ("context_fmha", "remove_input_padding", "use_paged_context_fmha", "reduce_fusion", "use_fused_mlp",
             "norm_quant_fusion"):
    parser.add_argument("--" + name, **switch)
given = parser.parse_args()
out = pathlib.Path(given.output_dir)
config = json.loads((pathlib.Path(given.checkpoint_dir) / "config.json").read_text())
world = config["mapping"]["world_size"]
print("[TensorRT-LLM] TensorRT-LLM version: {version}")
print("[TRT-LLM] [I] Set smooth_quant_gemm_plugin to float16.", file=sys.stderr)
for rank in range(world):
    if "{mode}" == "hang" and rank == world - 1:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # as its workers are
        pathlib.Path(sys.argv[0]).with_name("pids").write_text(f"{{os.getpid()}} {{child.pid}}")
        print("building", flush=True)
        time.sleep(600)
    if "{mode}" == "fail" and rank == world - 1:
        print("[TRT-LLM] [E] RuntimeError: could not find any implementation for node")
        print("shutting down")
        sys.exit(3)
    (out / f"rank{{rank}}.engine").write_bytes(b"engine" * 100)
    print(f"[TRT-LLM] [I] Serializing engine to {{out}}/rank{{rank}}.engine")
if "{mode}" != "silent":
    build = {{"max_batch_size": given.max_batch_size, "max_seq_len": given.max_seq_len, "max_beam_width": 1,
             "plugin_config": {{"use_paged_context_fmha": given.use_paged_context_fmha == "enable"}}}}
    (out / "config.json").write_text(json.dumps({{"version": "{version}", "pretrained_config": config,
                                                 "build_config": build}}))
"""
SMI = '#!/bin/sh\nprintf "%s\\n" {lines}\n'


def install(
    folder: Path, *, version: str = "1.2.1", mode: str = "work", gpus: tuple[str, ...] = ("NVIDIA H100, 9.0",)
) -> dict[str, str]:
    """Put fakes into a folder; returns the environment in which they are found.

    mode: "work", "fail" (behind the first ranks), "hang" (in the last), "silent" (leaves no config.json).
    """
    tools, site = folder / "bin", folder / "site"
    tools.mkdir(parents=True)
    script(tools / "trtllm-build", BUILDER.format(python=sys.executable, version=version, mode=mode))
    script(tools / "nvidia-smi", SMI.format(lines=" ".join(f"'{gpu}'" for gpu in gpus) or "''"))
    if version:
        info = site / f"tensorrt_llm-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: tensorrt-llm\nVersion: {version}\n")
    return os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": f"{site}:{Path.cwd()}"}


def script(path: Path, content: str) -> None:
    path.write_text(content)
    path.chmod(0o755)
