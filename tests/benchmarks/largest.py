"""The largest models on a small machine: one layer and two layers of their true widths really run, step by step.

    python -m tests.benchmarks.largest MODEL [--samples N] [--length N] [--memory 2GB]       MODEL: a key of `CONFIGS`

For each step, in a process of its own: seconds and peak memory with one layer and with two. The second layer's seconds
are taken for every layer that is not there; the first run's hold all that is outside of the layers, embedding and head
in full. Weights are random and dense, in files of their own; memory is that of two layers, since a step holds no more.
Beside it stands what `smoothquant estimate` says of the whole model by its config.json alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from recipes.families import open_announced
from recipes.synthetic import _Folder, _normal_rows
from smoothquant.artifacts.safetensors_files import Planned
from smoothquant.artifacts.shards import SafetensorsShards
from smoothquant.files import make_folder, write_json
from smoothquant.machine import free_memory
from tests.benchmarks.export_memory import measured
from tests.benchmarks.results import Row, publish
from tests.models import save_tokenizer

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "num_key_value_heads": 8,
}
BLOOM = {"architectures": ["BloomForCausalLM"], "model_type": "bloom", "layer_norm_epsilon": 1e-5}
CONFIGS: dict[str, dict] = {
    "llama-2-70b": {
        **LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "torch_dtype": "float16",
    },
    "falcon-180b": {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "alibi": False,
        "bias": False,
        "hidden_size": 14848,
        "layer_norm_epsilon": 1e-5,
        "multi_query": True,
        "new_decoder_architecture": True,
        "num_attention_heads": 232,
        "num_hidden_layers": 80,
        "num_kv_heads": 8,
        "parallel_attn": True,
        "vocab_size": 65024,
        "torch_dtype": "bfloat16",
    },
    "bloom-176b": {
        **BLOOM,
        "n_embed": 14336,
        "n_layer": 70,
        "num_attention_heads": 112,
        "vocab_size": 250880,
        "torch_dtype": "bfloat16",
    },
    "llama-3.1-405b": {
        **LLAMA,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "torch_dtype": "bfloat16",
    },
    "mt-nlg-like-530b": {  # Megatron-Turing NLG's published sizes, in OPT's layout: its own is not a public one
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": 20480,
        "ffn_dim": 81920,
        "num_hidden_layers": 105,
        "num_attention_heads": 128,
        "word_embed_proj_dim": 20480,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "torch_dtype": "float16",
    },
}
TARGETS = ("w8a8", "onnx", "trtllm")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--memory", help="passed on to every step that has this option")
    given = parser.parse_args()
    config = CONFIGS[given.model]
    depth = config.get("num_hidden_layers") or config["n_layer"]
    more = ["--memory", given.memory] if given.memory else []
    amount = ["--samples", str(given.samples), "--length", str(given.length)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        said = estimated(folder / "whole", config, amount)
        needed = max(
            step["memory"] for step in said if step["step"] == "calibrate" or step["step"].startswith("export")
        )
        if not more and needed > (free_memory() or needed):
            sys.exit(
                f"{given.model}: {needed / 1e9:.0f} GB of memory are needed, {(free_memory() or 0) / 1e9:.0f} are free"
            )
        one, two = (dict(steps(folder, config, layers, amount, more)) for layers in (1, 2))
    rows, details = [], {"estimate": said}
    for step, (seconds, peak) in two.items():
        first = one[step][0]
        whole = first + (depth - 1) * max(0.0, seconds - first)
        told = f"{first:.0f} s with one layer, {seconds:.0f} s with two, {peak / 1e3:.1f} GB"
        told += f": {whole / 3600:.1f} h for {depth} layers"
        rows.append(Row(f"{given.model}, {step}", told))
        details[step] = {"one": first, "two": seconds, "peak_mb": peak, "whole": whole}
    publish(f"largest_{given.model}", rows, details, command="largest")


def estimated(folder: Path, config: dict, amount: list[str]) -> list[dict]:
    """The steps of the whole model, by config.json alone."""
    make_folder(folder)
    write_json(folder / "config.json", config)
    words = [word for target in TARGETS for word in ("--target", target)]
    command = [sys.executable, "-m", "recipes.cli", "estimate", str(folder), *amount, *words, "--json", "--quiet"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)  # status 2 for a disk too small
    return json.loads(found.stdout)["steps"]


def steps(
    folder: Path, config: dict, layers: int, amount: list[str], more: list[str]
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Each step of a model with so many layers: its seconds, and its peak memory in MB."""
    model, scales, out = (str(folder / name) for name in ("model", "scales.safetensors", "out"))
    save(Path(model), config, layers)
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 9000)
    commands = {"calibrate": ["calibrate", model, "--text", str(text), *amount, "--out", scales, "--overwrite"]}
    commands |= {f"export {target}": ["export", target, model, scales, "--out", out] for target in TARGETS}
    for step, words in commands.items():
        found = measured([sys.executable, "-m", "recipes.cli", *words, *more, "--quiet"])
        shutil.rmtree(out, ignore_errors=True)
        yield step, (found.seconds, found.peak)
    shutil.rmtree(model)


def save(folder: Path, config: dict, layers: int) -> None:
    """Write a model with so many layers: normal weights, norms of ones, biases of zeros (holes in the file)."""
    make_folder(folder)
    key = "n_layer" if "n_layer" in config else "num_hidden_layers"
    write_json(folder / "config.json", config | {key: layers})
    model = open_announced(folder)
    dtype, shapes = model.checkpoint.dtype, model.expected()
    files = SafetensorsShards(_Folder(folder), {name: Planned(shape, dtype) for name, shape in shapes.items()})
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        if len(shape) > 1:
            files.write_rows(name, _normal_rows(shape, dtype, generator))
        elif name.endswith("weight"):
            files.write(name, torch.ones(shape, dtype=dtype))
    save_tokenizer(folder)


if __name__ == "__main__":
    main()
